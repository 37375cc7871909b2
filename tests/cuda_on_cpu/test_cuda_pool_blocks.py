"""The CUDA kernel of pool_blocks, run on the CPU, against its reference; and bugs planted in it."""

import ctypes

import pytest
import torch
from simulated import DTYPES, ROOT, planted, pointer

from adaptive.ops import pool_blocks

SOURCE = "cuda/pool_blocks.cu"
SHIM = ROOT / "tests/cuda_on_cpu/pool_shim.cpp"
GUARD = 4096  # elements around the output that a wrong kernel may write and a right one must not
I32 = torch.int32
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class PoolArgs(ctypes.Structure):
    """PoolBlocksArgs of csrc/pool_blocks.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("source", "offsets", "means")),
        ("dtype", ctypes.c_int32),
        *((n, ctypes.c_int64) for n in ("batch", "heads", "tokens", "head_dim", "block_size")),
        ("cuts", ctypes.c_int64),
        ("source_stride", ctypes.c_int64 * 3),
        ("offsets_stride", ctypes.c_int64),
    )


class Pool:
    """pool_blocks as CUDA would run it; checks that nothing around the output is written."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        library.pool_args_bytes.restype = ctypes.c_int64
        assert library.pool_args_bytes() == ctypes.sizeof(PoolArgs)
        library.set_seed(0)

    def __call__(self, source, block_size=64, offsets=None):
        batch, heads, tokens, head_dim = source.shape
        shape = (batch, heads, -(-tokens // block_size), head_dim)
        number = shape[0] * shape[1] * shape[2] * shape[3]
        around = torch.full((number + 2 * GUARD,), 77.0)
        means = around[GUARD:-GUARD]
        means.fill_(torch.nan)
        args = PoolArgs(
            pointer(source), pointer(offsets), pointer(means), DTYPES[source.dtype], *source.shape,
            block_size, 0 if offsets is None else offsets.shape[1], source.stride()[:3],
            0 if offsets is None else offsets.stride(0),
        )  # fmt: skip
        message = ctypes.create_string_buffer(1000)
        if self.library.pool(ctypes.byref(args), message):
            raise RuntimeError(message.value.decode())
        assert (around[:GUARD] == 77).all()
        assert (around[-GUARD:] == 77).all()
        return means.view(shape).clone()


@pytest.fixture
def pool(builder):
    return Pool(builder.library(*builder.objects(ROOT / "csrc" / SOURCE, SHIM)))


def draw(dtype, **sizes):
    full = {"batch": 2, "heads": 2, "tokens": 200, "head_dim": 72}
    return pool_blocks.make_inputs(**{**full, **sizes}, dtype=dtype, device="cpu")


def check(pool, given):
    right = pool_blocks.reference(*given)
    torch.testing.assert_close(pool(*given), right, rtol=2e-5, atol=2e-5)


@every_dtype
@pytest.mark.parametrize("number", range(len(pool_blocks.edges)))
def test_edges(pool, dtype, number):
    check(pool, pool_blocks.make_inputs(**pool_blocks.edges[number], dtype=dtype, device="cpu"))


@every_dtype
@pytest.mark.parametrize("head_dim", [32, 40, 64, 128, 248, 256])
def test_head_dims(pool, dtype, head_dim):
    check(pool, draw(dtype, head_dim=head_dim, sequences=2))


@every_dtype
def test_layouts_and_what_does_not_count(pool, dtype):
    """Token-major, then an odd pitch; NaN before, after and between the rows that count."""
    source, size, _ = draw(dtype, tokens=150)
    offsets = torch.tensor([[3, 70, 140], [90, 90, 90]], dtype=I32)
    expected = pool(source, size, offsets)
    place = torch.arange(150)
    outside = (place < offsets[:, :1]) | (place >= offsets[:, -1:])
    source = source.masked_fill(outside[:, None, :, None], torch.nan)
    odd = torch.full((2, 2, 150, 75), torch.nan, dtype=dtype)
    odd[..., :72] = source
    wide = torch.full((2, 5), 99, dtype=I32)
    wide[:, :3] = offsets
    for other in (source.transpose(1, 2).contiguous().transpose(1, 2), odd[..., :72]):
        assert torch.equal(pool(other, size, wide[:, :3]), expected)


def bad_offsets():
    rows = [[0, 200], [-1, 100], [0, 201], [90, 80], [2**31 - 1, 2**31 - 1], [200, 200]]
    return torch.tensor(rows, dtype=I32)


@every_dtype
def test_bad_offsets_make_their_row_nan_alone(pool, dtype):
    source, size, _ = draw(dtype, batch=6)
    made = pool(source, size, bad_offsets())
    bad = torch.tensor([False, True, True, True, True, False])
    assert torch.equal(made.flatten(1).isnan().all(1), bad)
    assert torch.equal(made[0], pool(source[:1], size)[0])
    assert (made[5] == 0).all()


@every_dtype
@pytest.mark.parametrize("seed", [1, 2])
def test_results_do_not_depend_on_the_order_of_threads(pool, dtype, seed):
    given = draw(dtype, sequences=1)
    expected = pool(*given)
    pool.library.set_seed(seed)
    assert torch.equal(pool(*given), expected)


def test_refusals_name_the_argument(pool):
    with pytest.raises(RuntimeError, match="adaptive::pool_blocks: head_dim must be a multiple"):
        pool(torch.zeros(1, 1, 9, 44))


def check_everything(pool):
    for dtype in (torch.float32, torch.bfloat16):
        for seed in (0, 1, 2):
            pool.library.set_seed(seed)
            check(pool, draw(dtype, tokens=130, block_size=100, sequences=2))
            check(pool, draw(dtype, head_dim=256))
        test_layouts_and_what_does_not_count(pool, dtype)
        test_bad_offsets_make_their_row_nan_alone(pool, dtype)


def test_the_real_kernel_passes(pool):
    check_everything(pool)


MUTANTS = {
    "partial sums read early": ("  __syncthreads();\n  const float count", "  const float count"),
    "tokens before the first offset": ("first > low ? first : low", "first"),
    "tokens behind the last offset": (
        "first + a.block_size < high ? first + a.block_size : high", "first + a.block_size"),
    "first offset of row 0": ("a.offsets + batch * a.offsets_stride", "a.offsets"),
    "the second cut for the last": ("cuts[a.cuts - 1]", "cuts[1]"),
    "negative offsets": ("low >= 0 && ", ""),
    "descending offsets": ("low <= high && ", ""),
    "offsets beyond the tokens": (" && high <= a.tokens", ""),
    "rows read twice": ("token += rows * kInFlight", "token += rows"),
    "loads left out": ("if (token + i * rows >= tokens) continue;", "if (i > 2) continue;"),
    "divided by the block": ("tokens > 0 ? static_cast<float>(tokens) : 1.0f",
                             "static_cast<float>(a.block_size)"),
    "empty blocks are NaN": ("tokens > 0 ? static_cast<float>(tokens) : 1.0f",
                             "static_cast<float>(tokens)"),
    "heads beyond 128 columns": ("d += kThreads", "d += 2 * kThreads"),
    "source assumed dense": ("next * a.source_stride[2]", "next * a.head_dim"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(builder, tmp_path, name):
    mutant = planted(tmp_path / "csrc", SOURCE, SOURCE, *MUTANTS[name])
    pool = Pool(builder.library(*builder.objects(mutant, SHIM)))
    with pytest.raises((AssertionError, RuntimeError)):
        check_everything(pool)
