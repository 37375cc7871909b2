"""The CUDA kernel of skinny_linear, run on the CPU, against float64; and bugs planted in it."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from simulated import DTYPES, ROOT, planted, pointer

from adaptive.ops import skinny_linear

SOURCE = "cuda/skinny_linear.cu"
SHIM = ROOT / "tests/cuda_on_cpu/linear_shim.cpp"
GUARD = 16  # rows around the output that a wrong kernel may write and a right one must not
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class LinearArgs(ctypes.Structure):
    """SkinnyLinearArgs of csrc/skinny_linear.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input", "weight", "bias", "out")),
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("rows", "in_features", "out_features")),
        *((name, ctypes.c_int64) for name in ("input_stride", "weight_stride")),
        ("weight_scales", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("scales_stride", "group")),
    )


def scale_fields(x, scales):
    """What LinearArgs ends with."""
    return (None, 0, 0) if scales is None else (
        pointer(scales), scales.stride(0), x.shape[1] // scales.shape[1]
    )  # fmt: skip


class Linear:
    """skinny_linear as CUDA would run it; checks that nothing around the output is written."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        library.linear_args_bytes.restype = ctypes.c_int64
        assert library.linear_args_bytes() == ctypes.sizeof(LinearArgs)
        library.set_seed(0)

    def __call__(self, x, weight, bias=None, scales=None):
        rows, out_features = len(x), len(weight)
        around = torch.full((rows + 2 * GUARD, max(out_features, 1)), 77.0, dtype=x.dtype)
        out = around[GUARD:-GUARD, :out_features]
        out.fill_(torch.nan)
        args = LinearArgs(
            pointer(x), pointer(weight), pointer(bias), pointer(out), DTYPES[x.dtype],
            rows, x.shape[1], out_features, x.stride(0), weight.stride(0), *scale_fields(x, scales),
        )  # fmt: skip
        message = ctypes.create_string_buffer(1000)
        if self.library.linear(ctypes.byref(args), message):
            raise RuntimeError(message.value.decode())
        assert (around[:GUARD] == 77).all()
        assert (around[-GUARD:] == 77).all()
        return out


@pytest.fixture
def linear(builder):
    return Linear(builder.library(*builder.objects(ROOT / "csrc" / SOURCE, SHIM)))


def draw(dtype, rows, in_features, out_features, bias=False, group=0):
    return skinny_linear.make_inputs(
        rows, in_features, out_features, bias, group, dtype=dtype, device="cpu"
    )


def widened(weight, scales=None):
    """The weight in float64."""
    if scales is None:
        return weight.double()
    parts = weight.double().unflatten(1, (scales.shape[1], -1))
    return (parts * scales.double()[..., None]).flatten(1)


def check(made, x, weight, bias=None, scales=None):
    weight = widened(weight, scales)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    bound = torch.finfo(made.dtype).eps * exact.abs() + 64 * torch.finfo(torch.float32).eps
    assert ((made.double() - exact).abs() <= bound).all()


@every_dtype
@pytest.mark.parametrize("sizes", skinny_linear.edges, ids=str)
def test_edges(linear, dtype, sizes):
    arguments = draw(dtype, **sizes)
    check(linear(*arguments), *arguments)


def check_everything(linear, dtype):
    """Enough to notice a small bug."""
    for rows in (1, 2, 4, 5, 16):
        x, weight, bias = draw(dtype, rows, 1096, 19, bias=True)
        made = linear(x, weight, bias)
        check(made, x, weight, bias)
        for row in (0, rows - 1):  # one row alone
            assert torch.equal(linear(x[row : row + 1], weight, bias), made[row : row + 1])
        linear.library.set_seed(1)
        assert torch.equal(linear(x, weight, bias), made)
        linear.library.set_seed(0)
        # An odd pitch, NaN between the rows: nothing is aligned, nothing else is read.
        wide = torch.full((rows + 19, 1107), torch.nan, dtype=dtype)
        spread = wide[:, 3 : 3 + 1096]
        spread[:rows], spread[rows:] = x, weight
        assert torch.equal(linear(spread[:rows], spread[rows:], bias), made)


def check_int8(linear, dtype):
    """The same of int8 weights: each load of 16 has its own group, or two or eight share one."""
    for rows, group in ((1, 32), (2, 64), (4, 128), (5, 32), (16, 64)):
        x, weight, bias, scales = draw(dtype, rows, 1152, 19, bias=True, group=group)
        made = linear(x, weight, bias, scales)
        check(made, x, weight, bias, scales)
        assert torch.equal(linear(x[-1:], weight, bias, scales), made[-1:])
        linear.library.set_seed(1)
        assert torch.equal(linear(x, weight, bias, scales), made)
        linear.library.set_seed(0)
        wide = torch.full((rows, 1163), torch.nan, dtype=dtype)
        bytes_around = torch.full((19, 1163), 127, dtype=torch.int8)
        factors = torch.full((19, 39), torch.nan)
        spread = (
            wide[:, 3 : 3 + 1152].copy_(x),
            bytes_around[:, 3 : 3 + 1152].copy_(weight),
            bias,
            factors[:, 1 : 1 + scales.shape[1]].copy_(scales),
        )
        assert torch.equal(linear(*spread), made)


@every_dtype
def test_rows_threads_and_strides(linear, dtype):
    check_everything(linear, dtype)
    check_int8(linear, dtype)


def test_groups_that_cut_a_load_are_refused(linear):
    x, weight, bias, _ = draw(torch.float32, 1, 96, 3, group=32)
    with pytest.raises(RuntimeError, match="weight_scales must be of groups of a power of two"):
        linear(x, weight, bias, torch.ones(3, 2))


def test_refusals_name_the_argument(linear):
    with pytest.raises(RuntimeError, match="adaptive::skinny_linear: input must have at most 16"):
        linear(*draw(torch.float32, 17, 64, 3))
    with pytest.raises(RuntimeError, match="input must have a multiple of 8 features"):
        linear(*draw(torch.float32, 2, 60, 3))


ROW = "cuda/linear_row.cuh"
SECOND = """i < {}; ++i) {{
      const int column = first + i * kLinearLanes * V::kElements;
      if (column >= width)"""
MUTANTS = {
    "features beyond the last": (
        SOURCE, "feature >= a.out_features", "feature > a.out_features"),
    "columns beyond the last": (ROW, "if (column >= width) continue;", ""),
    "one lane left out": (ROW, "distance = kLinearLanes / 2;", "distance = kLinearLanes / 4;"),
    "rows beyond the last": (SOURCE, "r < a.rows && lane == r", "lane == r"),
    "bias taken away": (SOURCE, "whole + bias", "whole - bias"),
    "bias of the block": (ROW, "(a.bias)[feature]", "(a.bias)[feature % 8]"),
    "weight rows assumed dense": (ROW, "const W*>(a.weight) + feature * a.weight_stride",
        "const W*>(a.weight) + feature * a.in_features"),
    "int8 rows assumed dense": (ROW, "const int8_t*>(a.weight) + feature * a.weight_stride",
        "const int8_t*>(a.weight) + feature * a.in_features"),
    "input rows assumed dense": (ROW, "r * a.input_stride + column", "r * a.in_features + column"),
    "second load skipped": (ROW, SECOND.format("kInFlight"), SECOND.format(1)),
    "factor of the row's first group": (ROW, "scales[column / group]",
        "scales[column / group * 0]"),
    "factors of another row": (ROW, "feature * a.scales_stride", "feature * a.group"),
    "int8 weights without a factor": (ROW, "(weights.x[part + e]) * scale",
        "(weights.x[part + e])"),
    "int8 weights without a sign": (ROW, "static_cast<float>(weights.x[part + e])",
        "static_cast<float>(static_cast<uint8_t>(weights.x[part + e]))"),
    "first inputs for every part": (ROW, "a.input_stride + part, p.wide", "a.input_stride, p.wide"),
    "int8 columns beyond the last": (ROW, "column < a.in_features;",
        "column < a.in_features + 32 * 16;"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(builder, tmp_path, name):
    mutant = planted(tmp_path / "csrc", SOURCE, *MUTANTS[name])
    linear = Linear(builder.library(*builder.objects(mutant, SHIM)))
    with pytest.raises((AssertionError, RuntimeError)):  # noqa: PT012
        check_everything(linear, torch.bfloat16)
        check_int8(linear, torch.bfloat16)
