"""The CUDA kernels of sparse_row_ffn, run on the CPU, against float64; and bugs planted in them."""

import ctypes

import pytest
import torch
from simulated import DTYPES, ROOT, planted, pointer

from adaptive.ops import sparse_row_ffn

SOURCE = "cuda/sparse_row_ffn.cu"
SHIM = ROOT / "tests/cuda_on_cpu/sparse_ffn_shim.cpp"
GUARD = 16  # rows around the output that a wrong kernel may write and a right one must not
MARGIN = 1 << 14  # floats around the workspace, likewise
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class SparseArgs(ctypes.Structure):
    """SparseRowFfnArgs of csrc/sparse_row_ffn.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("activations", "input", "up", "down", "out")),
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("rows", "neurons", "in_features", "out_features")),
        *((name, ctypes.c_int64) for name in ("activations_stride", "input_stride")),
        *((name, ctypes.c_int64) for name in ("up_stride", "down_stride")),
    )


class SparseFfn:
    """sparse_row_ffn as CUDA would run it; checks that nothing around its memory is written."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        library.sparse_args_bytes.restype = library.sparse_workspace_bytes.restype = ctypes.c_int64
        library.sparse_ffn.argtypes = [
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
        ]  # fmt: skip
        assert library.sparse_args_bytes() == ctypes.sizeof(SparseArgs)
        library.set_seed(0)

    def __call__(self, activations, x, up, down, short=0):
        (rows, neurons), out_features = activations.shape, down.shape[1]
        around = torch.full((rows + 2 * GUARD, out_features), 77.0, dtype=x.dtype)
        out = around[GUARD : GUARD + rows].fill_(torch.nan)
        args = SparseArgs(
            *map(pointer, (activations, x, up, down, out)), DTYPES[x.dtype],
            rows, neurons, x.shape[1], out_features,
            activations.stride(0), x.stride(0), up.stride(0), down.stride(0),
        )  # fmt: skip
        wanted = self.library.sparse_workspace_bytes(ctypes.byref(args))
        memory = torch.full((wanted // 4 + 2 * MARGIN,), torch.nan)
        memory[:MARGIN], memory[MARGIN + wanted // 4 :] = 77, 77
        message = ctypes.create_string_buffer(1000)
        start = pointer(memory) + 4 * MARGIN
        if self.library.sparse_ffn(ctypes.byref(args), start, wanted - short, message):
            raise RuntimeError(message.value.decode())
        for edge in (around[:GUARD], around[GUARD + rows :], memory[:MARGIN], memory[-MARGIN:]):
            assert (edge == 77).all()
        return out


@pytest.fixture
def sparse_ffn(builder):
    return SparseFfn(builder.library(*builder.objects(ROOT / "csrc" / SOURCE, SHIM)))


def draw(dtype, **sizes):
    return sparse_row_ffn.make_inputs(**sizes, dtype=dtype, device="cpu")


def check(made, activations, x, up, down):
    activations, x, up, down = (t.double() for t in (activations, x, up, down))
    weights = activations * (x @ up.T)
    exact, terms = weights @ down, weights.abs() @ down.abs()
    bound = torch.finfo(made.dtype).eps * exact.abs() + 64 * torch.finfo(torch.float32).eps * (
        terms + (activations * (x.abs() @ up.abs().T)) @ down.abs()
    )
    assert ((made.double() - exact).abs() <= bound + torch.finfo(made.dtype).tiny).all()


@every_dtype
@pytest.mark.parametrize("sizes", sparse_row_ffn.edges, ids=str)
def test_edges(sparse_ffn, dtype, sizes):
    arguments = draw(dtype, **sizes)
    check(sparse_ffn(*arguments), *arguments)


def placed(tensor, pitch=None, first=0):
    """The same rows at a distance, NaN between and behind them."""
    rows, width = tensor.shape
    wide = torch.full((rows + 2, pitch or width), torch.nan, dtype=tensor.dtype)
    return wide[:rows, first : first + width].copy_(tensor)


def check_everything(sparse_ffn, dtype):
    """Enough to notice a small bug."""
    for rows, active in ((1, 0.3), (3, 0.4), (9, 0.1)):
        sizes = {"neurons": 300, "in_features": 328, "out_features": 2120, "active": active}
        activations, x, up, down = map(placed, draw(dtype, rows=rows, **sizes))
        made = sparse_ffn(activations, x, up, down)
        check(made, activations, x, up, down)
        for row in {0, rows - 1}:  # one row alone
            alone = sparse_ffn(activations[row : row + 1], x[row : row + 1], up, down)
            assert torch.equal(alone, made[row : row + 1])
        sparse_ffn.library.set_seed(1)
        assert torch.equal(sparse_ffn(activations, x, up, down), made)
        sparse_ffn.library.set_seed(0)
        idle = (activations == 0).all(0)
        up[idle], down[idle] = torch.nan, torch.nan
        apart = [
            placed(tensor, pitch, first=3)  # an odd pitch: nothing is aligned
            for tensor, pitch in ((activations, 311), (x, 339), (up, 341), (down, 2129))
        ]
        assert torch.equal(sparse_ffn(*apart), made)


@every_dtype
def test_rows_threads_strides_and_idle_neurons(sparse_ffn, dtype):
    check_everything(sparse_ffn, dtype)


def test_refusals_name_the_argument(sparse_ffn):
    sizes = {"neurons": 8, "in_features": 32, "out_features": 32}
    with pytest.raises(RuntimeError, match="adaptive::sparse_row_ffn: activations must have at"):
        sparse_ffn(*draw(torch.float32, rows=17, **sizes))
    with pytest.raises(RuntimeError, match="must have a multiple of 8 features"):
        sparse_ffn(*draw(torch.float32, rows=1, neurons=8, in_features=36, out_features=32))
    with pytest.raises(RuntimeError, match="workspace must have 128 bytes, got 127"):
        sparse_ffn(*draw(torch.float32, rows=1, **sizes), short=1)


MUTANTS = {
    "a neuron beyond the last": ("&& neuron < a.neurons", "&& neuron <= a.neurons"),
    "places of the warp alone": ("w < warp;", "w < 0;"),
    "the last warp not counted": (
        "w < kNeurons / kLanes; ++w) listed", "w < kNeurons / kLanes - 1; ++w) listed"),
    "no barrier before places": (
        "found[warp] = __popc(active);\n  }\n  __syncthreads();",
        "found[warp] = __popc(active);\n  }"),
    "no barrier before products": (
        "listed.count += found[w];\n  }\n  __syncthreads();", "listed.count += found[w];\n  }"),
    "no barrier before sums": (
        "* product;\n    }\n  }\n  __syncthreads();", "* product;\n    }\n  }"),
    "the first neuron for all": ("begin + listed.neuron[i];", "begin + listed.neuron[0];"),
    "up assumed dense": ("neuron * a.up_stride", "neuron * a.in_features"),
    "down assumed dense": ("listed.neuron[i] * a.down_stride", "listed.neuron[i] * a.out_features"),
    "input assumed dense": ("row * a.input_stride", "row * a.in_features"),
    "activations assumed dense": (
        "(a.activations) + row * a.activations_stride", "(a.activations) + row * a.neurons"),
    "activation of another neuron": ("own[neuron]", "own[begin]"),
    "weights of other rows": ("listed.weight[i][first + r]", "listed.weight[i][r]"),
    "all rows take part": (
        "if ((listed.rows[i] >> (first + r) & 1) == 0) continue;", ""),
    "columns of one round": (
        "column < a.out_features;\n         column += kThreads * kElements",
        "column < a.out_features;\n         column = 1 << 30"),
    "rows beyond the last": ("if (first + r >= a.rows) continue;", ""),
    "the last part left out": ("part < parts; ++part) sum", "part < parts - 1; ++part) sum"),
    "parts of one row": ("(blockIdx.x * a.rows + first + r)", "(blockIdx.x + first + r)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(builder, tmp_path, name):
    mutant = planted(tmp_path / "csrc", SOURCE, SOURCE, *MUTANTS[name])
    sparse_ffn = SparseFfn(builder.library(*builder.objects(mutant, SHIM)))
    with pytest.raises((AssertionError, RuntimeError)):
        check_everything(sparse_ffn, torch.bfloat16)
