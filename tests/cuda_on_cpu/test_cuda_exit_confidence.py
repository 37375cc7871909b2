"""The CUDA kernels of exit_confidence, run on the CPU, against float64; and bugs in them."""

import ctypes
import math

import pytest
import torch
import torch.nn.functional as F
from simulated import DTYPES, ROOT, planted, pointer
from test_cuda_skinny_linear import LinearArgs, scale_fields, widened

from adaptive.ops import exit_confidence

SOURCE, ROW = "cuda/exit_confidence.cu", "cuda/linear_row.cuh"
SHIM = ROOT / "tests/cuda_on_cpu/exit_shim.cpp"
GUARD = 16  # rows around the outputs that a wrong kernel may write and a right one must not
SPARE = 1024  # floats behind the workspace, likewise
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class ExitArgs(ctypes.Structure):
    """ExitConfidenceArgs of csrc/exit_confidence.h."""

    _fields_ = (
        ("linear", LinearArgs),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("tokens", "top", "lse", "entropy", "workspace")),
        ("workspace_bytes", ctypes.c_int64),
    )


class Exit:
    """exit_confidence as CUDA would run it; checks that nothing around the outputs is written."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        library.exit_args_bytes.restype = library.exit_workspace_bytes.restype = ctypes.c_int64
        assert library.exit_args_bytes() == ctypes.sizeof(ExitArgs)
        library.set_seed(0)

    def __call__(
        self, hidden, weight, bias=None, scale=1.0, softcap=0.0, scales=None, *, short_workspace=0
    ):
        rows = len(hidden)
        sizes = ((2,), (2,), (), ())
        types = (torch.int64, *[torch.float32] * 3)
        around = [
            torch.full((rows + 2 * GUARD, *size), 77, dtype=type_)
            for size, type_ in zip(sizes, types, strict=True)
        ]
        made = tuple(t[GUARD:-GUARD] for t in around)
        linear = LinearArgs(
            pointer(hidden), pointer(weight), pointer(bias), None, DTYPES[hidden.dtype],
            rows, hidden.shape[1], len(weight), hidden.stride(0), weight.stride(0),
            *scale_fields(hidden, scales),
        )  # fmt: skip
        args = ExitArgs(linear, scale, softcap, *map(pointer, made), None, 0)
        wanted = self.library.exit_workspace_bytes(ctypes.byref(args))
        workspace = torch.full((wanted // 4 + SPARE,), torch.nan)
        args.workspace, args.workspace_bytes = pointer(workspace), wanted - short_workspace
        message = ctypes.create_string_buffer(1000)
        if self.library.exit_confidence(ctypes.byref(args), message):
            raise RuntimeError(message.value.decode())
        for tensor in around:
            assert (tensor[:GUARD] == 77).all()
            assert (tensor[-GUARD:] == 77).all()
        assert workspace[-SPARE:].isnan().all()
        return made


@pytest.fixture
def confidence(builder):
    return Exit(builder.library(*builder.objects(ROOT / "csrc" / SOURCE, SHIM)))


def draw(dtype, rows, width, vocab, bias=False, scale=1.0, softcap=0.0, group=0):
    return exit_confidence.make_inputs(
        rows, width, vocab, bias, scale, softcap, group, dtype=dtype, device="cpu"
    )


def exact(hidden, weight, bias=None, scale=1.0, softcap=0.0, scales=None):
    """The formula of adaptive/ops/exit_confidence.py in float64."""
    logits = hidden.double() @ widened(weight, scales).T
    logits = (logits if bias is None else logits + bias.double()) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    ranked = torch.sort(logits, descending=True, stable=True)
    tokens, top = ranked.indices[:, :2], ranked.values[:, :2]
    if len(weight) == 1:
        tokens, top = (F.pad(t, (0, 1), value=v) for t, v in ((tokens, -1), (top, -math.inf)))
    entropy = torch.special.entr(torch.softmax(logits, -1)).sum(-1)
    return tokens, top, torch.logsumexp(logits, -1), entropy


def check(made, *arguments):
    right = exact(*arguments)
    assert torch.equal(made[0], right[0])
    for own, true in zip(made[1:], right[1:], strict=True):
        torch.testing.assert_close(own, true.float(), rtol=5e-6, atol=5e-6, equal_nan=True)


@every_dtype
@pytest.mark.parametrize("sizes", exit_confidence.edges, ids=str)
def test_edges(confidence, dtype, sizes):
    arguments = draw(dtype, **sizes)
    check(confidence(*arguments), *arguments)


def same(left, right):
    return all(
        torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)) for a, b in zip(left, right, strict=True)
    )


def check_everything(confidence, dtype):
    """Enough to notice a small bug."""
    for rows in (1, 4, 5, 16):
        # More slices than the threads that merge them would take too long here: 3, the last short.
        hidden, weight, bias, scale, softcap = draw(dtype, rows, 144, 145, True, 9.0, 20.0)
        made = confidence(hidden, weight, bias, scale, softcap)
        check(made, hidden, weight, bias, scale, softcap)
        check(confidence(hidden, weight, None, -2.0), hidden, weight, None, -2.0)
        for row in (0, rows - 1):
            alone = confidence(hidden[row : row + 1], weight, bias, scale, softcap)
            assert same(alone, [t[row : row + 1] for t in made])
        confidence.library.set_seed(1)
        assert same(confidence(hidden, weight, bias, scale, softcap), made)
        confidence.library.set_seed(0)
        wide = torch.full((rows + 145, 155), torch.nan, dtype=dtype)
        spread = wide[:, 3 : 3 + 144]
        spread[:rows], spread[rows:] = hidden, weight
        assert same(confidence(spread[:rows], spread[rows:], bias, scale, softcap), made)
    for places in ([0, 1], [7, 8], [63, 64], [130, 144], [64, 128, 140]):
        given = chosen_logits(dtype, places)
        check(confidence(*given), *given)
    for value in (math.nan, math.inf, -math.inf):
        hidden, weight, bias = chosen_logits(dtype, [3])
        bias[[9, 70]] = value
        check(confidence(hidden, weight, bias), hidden, weight, bias)
        bias[:] = value
        check(confidence(hidden, weight, bias), hidden, weight, bias)


def chosen_logits(dtype, places):
    """Two rows whose logits are the bias: zeros of both signs, and the same maximum at `places`."""
    bias = torch.zeros(145, dtype=dtype)
    bias[::3] = -0.0
    bias[places] = 5.0
    return torch.zeros(2, 32, dtype=dtype), torch.ones(145, 32, dtype=dtype), bias


@every_dtype
def test_rows_threads_strides_and_special_values(confidence, dtype):
    check_everything(confidence, dtype)


@every_dtype
def test_int8_weights(confidence, dtype):
    for rows, group in ((1, 128), (3, 64), (16, 32)):
        arguments = draw(dtype, rows, 640, 145, True, 9.0, 20.0, group)
        made = confidence(*arguments)
        check(made, *arguments)
        assert same(confidence(arguments[0][-1:], *arguments[1:]), [t[-1:] for t in made])


def test_more_slices_than_threads_that_merge_them(confidence):
    arguments = draw(torch.float32, 2, 32, 64 * 300 + 5)
    check(confidence(*arguments), *arguments)


def test_refusals_name_the_argument(confidence):
    start = "adaptive::exit_confidence: "
    with pytest.raises(RuntimeError, match=start + "hidden must have at most 16 rows, got 17"):
        confidence(*draw(torch.float32, 17, 64, 3))
    with pytest.raises(RuntimeError, match=start + "hidden must have a multiple of 8 features"):
        confidence(*draw(torch.float32, 2, 60, 3))
    with pytest.raises(RuntimeError, match=start + "weight must have a row for each token, got 0"):
        confidence(*draw(torch.float32, 2, 64, 0))
    with pytest.raises(RuntimeError, match=start + "workspace must have 48 bytes, got 44"):
        confidence(*draw(torch.float32, 2, 64, 3), short_workspace=4)


MUTANTS = {
    "tokens beyond the last": (SOURCE, "&& token < a.out_features", ""),
    "tokens of the next warp": (SOURCE, "blockIdx.x) * kSliceTokens + warp * kWarpTokens",
        "blockIdx.x) * kSliceTokens + warp * (kWarpTokens - 1)"),
    "last ties win": (SOURCE, "x_is_nan) && token < other", "x_is_nan) && token > other"),
    "NaN below all": (SOURCE, "if (x_is_nan != y_is_nan) return x_is_nan;",
        "if (x_is_nan != y_is_nan) return y_is_nan;"),
    "second of the higher side alone": (SOURCE, "if (beats(low.top[0], low.tokens[0],",
        "if (beats(low.top[1], low.tokens[1],"),
    "shift of the mean forgotten": (SOURCE, " + fmaxf(shift, -100.0f) * low.sum)", ")"),
    "-inf weighed": (SOURCE, "if (low.top[0] == -kInfinity) return made;", ""),
    "one warp left out": (SOURCE, "w = 1; w < kWarps; ++w", "w = 1; w < kWarps - 1; ++w"),
    "warps read early": (SOURCE, "of_warps[warp][lane] = mine;\n  __syncthreads();",
        "of_warps[warp][lane] = mine;"),
    "slices of another row": (SOURCE, "static_cast<int64_t>(row) * p.slices + blockIdx.x",
        "static_cast<int64_t>(row) + p.slices * blockIdx.x"),
    "halves read early": (SOURCE, "    __syncthreads();\n    if (thread < half)",
        "    if (thread < half)"),
    "scale before the bias": (SOURCE, "(logit + bias_of<T>(a, token)) * p.scale",
        "logit * p.scale + bias_of<T>(a, token)"),
    "cap forgotten": (SOURCE, "if (p.softcap > 0.0f)", "if (p.softcap < 0.0f)"),
    "mean added to the entropy": (SOURCE, "logf(all.sum) - all.weighted",
        "logf(all.sum) + all.weighted"),
    "one lane left out": (ROW, "distance = kLinearLanes / 2;", "distance = kLinearLanes / 4;"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(builder, tmp_path, name):
    mutant = planted(tmp_path / "csrc", SOURCE, *MUTANTS[name])
    confidence = Exit(builder.library(*builder.objects(mutant, SHIM)))
    with pytest.raises((AssertionError, RuntimeError)):
        check_everything(confidence, torch.float16)
