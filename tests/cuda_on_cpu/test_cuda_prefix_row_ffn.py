"""The CUDA kernels of prefix_row_ffn, run on the CPU, against float64; and bugs planted in them."""

import ctypes

import pytest
import torch
from simulated import DTYPES, ROOT, planted, pointer

from adaptive.ops import prefix_row_ffn
from adaptive.ops.prefix_row_ffn import ACTIVATIONS

SOURCE, ROW = "cuda/prefix_row_ffn.cu", "cuda/linear_row.cuh"
SHIM = ROOT / "tests/cuda_on_cpu/prefix_ffn_shim.cpp"
GUARD = 16  # rows around the output that a wrong kernel may write and a right one must not
MARGIN = 1 << 14  # floats around the workspace, likewise
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class PrefixArgs(ctypes.Structure):
    """PrefixRowFfnArgs of csrc/prefix_row_ffn.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input", "widths", "gate", "up", "down", "out")),
        *((name, ctypes.c_int32) for name in ("dtype", "activation")),
        *((name, ctypes.c_int64) for name in ("rows", "neurons", "in_features", "out_features")),
        *((name, ctypes.c_int64) for name in ("input_stride", "gate_stride")),
        *((name, ctypes.c_int64) for name in ("up_stride", "down_stride")),
    )


class PrefixFfn:
    """prefix_row_ffn as CUDA would run it; checks that nothing around its memory is written."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        library.prefix_args_bytes.restype = library.prefix_workspace_bytes.restype = ctypes.c_int64
        library.prefix_ffn.argtypes = [
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
        ]  # fmt: skip
        assert library.prefix_args_bytes() == ctypes.sizeof(PrefixArgs)
        library.set_seed(0)

    def __call__(self, x, widths, gate, up, down, activation="silu", short=0):
        rows, (out_features, neurons) = len(x), down.shape
        around = torch.full((rows + 2 * GUARD, out_features), 77.0, dtype=x.dtype)
        out = around[GUARD : GUARD + rows].fill_(torch.nan)
        args = PrefixArgs(
            *map(pointer, (x, widths, gate, up, down, out)), DTYPES[x.dtype],
            list(ACTIVATIONS).index(activation), rows, neurons, x.shape[1], out_features,
            x.stride(0), 0 if gate is None else gate.stride(0), up.stride(0), down.stride(0),
        )  # fmt: skip
        wanted = self.library.prefix_workspace_bytes(ctypes.byref(args))
        memory = torch.full((wanted // 4 + 2 * MARGIN,), torch.nan)
        memory[:MARGIN], memory[MARGIN + wanted // 4 :] = 77, 77
        message = ctypes.create_string_buffer(1000)
        start = pointer(memory) + 4 * MARGIN
        if self.library.prefix_ffn(ctypes.byref(args), start, wanted - short, message):
            raise RuntimeError(message.value.decode())
        for edge in (around[:GUARD], around[GUARD + rows :], memory[:MARGIN], memory[-MARGIN:]):
            assert (edge == 77).all()
        return out


@pytest.fixture
def prefix_ffn(builder):
    return PrefixFfn(builder.library(*builder.objects(ROOT / "csrc" / SOURCE, SHIM)))


def draw(dtype, **sizes):
    return prefix_row_ffn.make_inputs(**sizes, dtype=dtype, device="cpu")


def check(made, x, widths, gate, up, down, activation):
    """As good as float32 sums: the reference makes them, in another order."""
    right = prefix_row_ffn.reference(x, widths, gate, up, down, activation)
    relative = max(3e-5, torch.finfo(made.dtype).eps)
    torch.testing.assert_close(made, right, rtol=relative, atol=3e-5)


@every_dtype
@pytest.mark.parametrize("sizes", prefix_row_ffn.edges, ids=str)
def test_edges(prefix_ffn, dtype, sizes):
    given = draw(dtype, **sizes)
    check(prefix_ffn(*given), *given)


def placed(tensor, pitch=None, first=0):
    """The same rows at a distance, NaN between and behind them."""
    rows, width = tensor.shape
    wide = torch.full((rows + 2, pitch or width), torch.nan, dtype=tensor.dtype)
    return wide[:rows, first : first + width].copy_(tensor)


def check_everything(prefix_ffn, dtype):
    """Enough to notice a small bug."""
    for widths, activation in (
        ([52], "silu"), ([0, 61, 8], "gelu_tanh"), ([5, 30, 71, 0, 71, 16, 33, 1], "silu"),
    ):  # fmt: skip
        sizes = {"neurons": 88, "in_features": 328, "out_features": 37, "activation": activation}
        x, _, gate, up, down, _ = draw(dtype, rows=len(widths), **sizes)
        widths = torch.tensor(widths)
        given = [*map(placed, (gate, up, down)), activation]
        x = placed(x)
        made = prefix_ffn(x, widths, *given)
        check(made, x, widths, *given)
        for row in range(len(widths)):  # one row alone, in a kernel for as many and for one
            first = row // 4 * 4
            own = slice(first, first + 4) if row % 4 else slice(row, row + 1)
            other = prefix_ffn(x[own], widths[own], *given)
            assert torch.equal(other, made[own])
        prefix_ffn.library.set_seed(1)
        assert torch.equal(prefix_ffn(x, widths, *given), made)
        prefix_ffn.library.set_seed(0)
        widest = int(widths.max())
        gate, up, down, _ = given
        gate[widest:], up[widest:], down[:, -(-widest // 8) * 8 :] = (torch.nan,) * 3
        apart = [  # an odd pitch: nothing is aligned
            placed(tensor, pitch, first=3)
            for tensor, pitch in ((x, 339), (gate, 341), (up, 343), (down, 97))
        ]
        assert torch.equal(prefix_ffn(apart[0], widths, *apart[1:], activation), made)
    wild = torch.where(widths == 0, 96 - (1 << 40), widths)
    plain = draw(dtype, rows=8, **{**sizes, "gated": False, "activation": "relu"})
    check(prefix_ffn(plain[0], wild, *plain[2:]), plain[0], widths, *plain[2:])
    wild[1], widths[1] = 1 << 40, 88
    check(prefix_ffn(plain[0], wild, *plain[2:]), plain[0], widths, *plain[2:])


@every_dtype
def test_rows_threads_strides_and_unused_neurons(prefix_ffn, dtype):
    check_everything(prefix_ffn, dtype)


def test_refusals_name_the_argument(prefix_ffn):
    sizes = {"neurons": 8, "in_features": 32, "out_features": 32}
    with pytest.raises(RuntimeError, match="adaptive::prefix_row_ffn: input must have at most 16"):
        prefix_ffn(*draw(torch.float32, rows=17, **sizes))
    with pytest.raises(RuntimeError, match="input must have a multiple of 8 features"):
        prefix_ffn(*draw(torch.float32, rows=1, neurons=8, in_features=36, out_features=32))
    with pytest.raises(RuntimeError, match="up must have a multiple of 8 neurons"):
        prefix_ffn(*draw(torch.float32, rows=1, neurons=12, in_features=32, out_features=32))
    with pytest.raises(RuntimeError, match="workspace must have 32 bytes, got 31"):
        prefix_ffn(*draw(torch.float32, rows=1, **sizes), short=1)


MUTANTS = {
    "a neuron beyond the width": (SOURCE, "neuron < width) << r", "neuron <= width) << r"),
    "widths not rounded up": (SOURCE, "(inside + kStep - 1) / kStep", "inside / kStep"),
    "negative widths kept": (SOURCE, "width < 0 ? 0 : width <", "width <"),
    "zeros of nobody's neurons left out": (SOURCE, "if (!read) return;", "if (!users) return;"),
    "gate of the neuron before": (
        SOURCE, "(p.gate, neuron, lane", "(p.gate, neuron - (neuron > 0), lane"),
    "both activated": (
        SOURCE, "sum_lanes(gate[r])) * held",
        "sum_lanes(gate[r])) * activated(p.activation, held)"),
    "up not activated": (SOURCE, ": activated(p.activation, held);", ": held;"),
    "a cube too small": (SOURCE, "0.044715f * x * x * x", "0.044715f * x * x"),
    "another row's place": (SOURCE, "hidden[static_cast<int64_t>(r) * neurons]",
        "hidden[static_cast<int64_t>(rows - 1 - r) * neurons]"),
    "rows end early": (SOURCE, "column < ends[row];", "column + 8 < ends[row];"),
    "ends read early": (SOURCE, "neurons);\n  __syncthreads();", "neurons);"),
    "the first row is the widest": (
        SOURCE, "widest = ends[r] > widest ? ends[r] : widest", "widest = ends[0]"),
    "features beyond the last": (
        SOURCE, "feature >= a.out_features", "feature > a.out_features"),
    "rows beyond the last": (SOURCE, "if (r >= rows || lane != r) continue;",
        "if (lane != r) continue;"),
    "gate rows assumed dense": (
        SOURCE, "gate.weight_stride = args.gate_stride", "gate.weight_stride = args.in_features"),
    "first inputs for every part": (ROW, "input_stride + column + part", "input_stride + column"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(builder, tmp_path, name):
    mutant = planted(tmp_path / "csrc", SOURCE, *MUTANTS[name])
    for dtype in ("float>", "simt::float16>"):  # what is left compiles faster
        text = mutant.read_text()
        run = f"return launch<{dtype}(args, hidden, stream);"
        assert text.count(run) == 1
        mutant.write_text(text.replace(run, "return;"))
    prefix_ffn = PrefixFfn(builder.library(*builder.objects(mutant, SHIM)))
    with pytest.raises((AssertionError, RuntimeError)):
        check_everything(prefix_ffn, torch.bfloat16)
