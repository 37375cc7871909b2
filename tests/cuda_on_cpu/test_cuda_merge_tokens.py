"""The CUDA kernels of merge_tokens, run on the CPU, against their reference; and bugs planted."""

import ctypes

import pytest
import torch
from simulated import DTYPES, ROOT, planted, pointer

from adaptive.ops import merge_tokens

SOURCE = "cuda/merge_tokens.cu"
SHIM = ROOT / "tests/cuda_on_cpu/merge_shim.cpp"
GUARD = 64  # elements around each output that a wrong kernel may write and a right one must not
UNWRITTEN = 7777
POINTERS = ("hidden", "metric", "sizes", "lengths", "counts", "out", "out_sizes", "groups")
SIZES = ("batch", "tokens", "width", "metric_width", "removed", "protect")


class MergeArgs(ctypes.Structure):
    """MergeTokensArgs of csrc/merge_tokens.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in SIZES),
        ("hidden_stride", ctypes.c_int64 * 2),
        ("metric_stride", ctypes.c_int64 * 2),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
    )


class Merge:
    """merge_tokens as CUDA would run it; checks that nothing around the outputs is written."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        library.args_bytes.restype = library.workspace_bytes.restype = ctypes.c_int64
        assert library.args_bytes() == ctypes.sizeof(MergeArgs)
        library.set_seed(0)

    def __call__(self, hidden, metric, removed, *rest, short=0):
        sizes, lengths, counts, protect = rest
        shapes = merge_tokens.outputs(hidden, metric, removed)
        around = [torch.full((t.numel() + 2 * GUARD,), UNWRITTEN, dtype=t.dtype) for t in shapes]
        made = [t[GUARD:-GUARD].view(s.shape) for t, s in zip(around, shapes, strict=True)]
        args = MergeArgs(
            *map(pointer, (hidden, metric, sizes, lengths, counts, *made)), DTYPES[hidden.dtype],
            *hidden.shape, metric.shape[2], removed, protect,
            hidden.stride()[:2], metric.stride()[:2],
        )  # fmt: skip
        wanted = self.library.workspace_bytes(ctypes.byref(args))
        workspace = torch.full((wanted // 4 + 2 * GUARD,), torch.nan)
        args.workspace = workspace[GUARD:].data_ptr()
        args.workspace_bytes = wanted - short
        message = ctypes.create_string_buffer(1000)
        if self.library.merge_tokens(ctypes.byref(args), message):
            raise RuntimeError(message.value.decode())
        for t in around:
            assert (t[:GUARD] == UNWRITTEN).all()
            assert (t[-GUARD:] == UNWRITTEN).all()
        assert workspace[:GUARD].isnan().all()
        assert workspace[-GUARD:].isnan().all()
        return made


@pytest.fixture
def merge(builder):
    return Merge(builder.library(*builder.objects(ROOT / "csrc" / SOURCE, SHIM)))


def check(merge, *arguments):
    made, right = merge(*arguments), merge_tokens.reference(*arguments)
    assert torch.equal(made[2], right[2])
    assert torch.equal(made[1], right[1])
    last = 0 if made[0].dtype == torch.float32 else torch.finfo(made[0].dtype).eps
    torch.testing.assert_close(made[0], right[0], rtol=max(2e-5, last), atol=2e-5)
    alone = torch.nn.functional.one_hot(right[2] + 1, right[0].shape[1] + 1).sum(1)[:, 1:] == 1
    assert torch.equal(made[0][alone], right[0][alone])


def draw(sizes, dtype=torch.float32, seed=0):
    return merge_tokens.make_inputs(**sizes, dtype=dtype, device="cpu", seed=seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", merge_tokens.edges, ids=str)
def test_edges(merge, sizes, dtype):
    check(merge, *draw(sizes, dtype))


def ties():
    """Tokens of few kinds, so that many cosines are equal, some NaN and some of zeros."""
    rng = torch.Generator().manual_seed(0)
    kinds = torch.eye(8)[torch.randint(0, 3, (3, 150), generator=rng)]
    kinds[0, 5], kinds[1, 6], kinds[2, 7], kinds[2, 8] = 0.0, 0.0, torch.nan, torch.nan
    return torch.randn(3, 150, 8, generator=rng), kinds, 41, None, None, None, 1


def check_everything(merge):
    """Enough to notice a small bug."""
    for seed in range(2):
        merge.library.set_seed(seed)
        for sizes in merge_tokens.edges[1:]:
            check(merge, *draw(sizes, seed=seed))
        check(merge, *draw(merge_tokens.edges[5], torch.bfloat16, seed))
    check(merge, *ties())
    hidden, metric, removed, *rest = draw({"batch": 3, "tokens": 20, "removed": 4})
    wide = torch.full((2, 3, 33, 80), torch.nan)
    wide[0, :, :20, :64], wide[1, :, :20, :64] = hidden, metric
    check(merge, wide[0, :, :20, :64], wide[1, :, :20, :64], removed, *rest)
    # A length out of range counts as the nearest; a row of few tokens has no pair.
    lengths, none = torch.tensor([-3, 99, 2], dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    check(merge, hidden, metric, removed, None, lengths, none, 1)
    # Rows of no features: they have sizes, and places.
    check(merge, *draw({"batch": 2, "tokens": 9, "width": 0, "removed": 3, "sized": True}))
    # All that merge lie behind what one tile of lanes holds.
    check(merge, *draw({"batch": 1, "tokens": 140, "removed": 69}))


def test_strides_ties_and_bad_lengths(merge):
    check_everything(merge)


def test_a_short_workspace_is_refused(merge):
    with pytest.raises(RuntimeError, match=r"workspace must have .* bytes"):
        merge(*draw(merge_tokens.edges[3]), short=8)


MUTANTS = {
    "a length too large taken": ("min(static_cast<int64_t>(a.lengths[row]), a.tokens)",
                                 "static_cast<int64_t>(a.lengths[row])"),
    "rows that do not fit": ("max(asked, r.length - p.kept)", "asked"),
    "the last of equal targets": ("cosine > best)", "cosine >= best)"),
    "the last of equal lanes": ("theirs < found)", "theirs > found)"),
    "NaN left": ("if (cosine != cosine) cosine = kNoCosine;", ""),
    "target's norm left out": ("product / max(sqrtf(other_norm), kLeastNorm)", "product"),
    "own norm left out": (" / max(sqrtf(norm), kLeastNorm);", ";"),
    "a chunk not waited for": ("      __syncthreads();\n#pragma unroll 8", "#pragma unroll 8"),
    "features beyond the last": (" && column + c < a.metric_width", ""),
    "sources and targets swapped": ("is_own ? p.first_source : p.first_target",
                                    "is_own ? p.first_target : p.first_source"),
    "equal sources by the last": ("i < source / 2)", "i > source / 2)"),
    "one pair too many": ("rank < r.pairs", "rank <= r.pairs"),
    "merged tokens keep a slot": ("count += groups[t] >= 0", "count += 1"),
    "into the token before": ("p.first_target + 2 * (kGoes", "p.first_target - 1 + 2 * (kGoes"),
    "members before their slot": ("tile = 0; tile < a.tokens", "tile = slot; tile < a.tokens"),
    "sizes forgotten": ("sum += size * ", "sum += "),
    "the mean of a lone token": ("if (members == 1)", "if (members == -1)"),
    "no sizes without features": ("column < kMeanThreads || ", ""),
    "padding divided": ("members == 0 ? 0.0f : ", ""),
    "hidden assumed dense": ("row * a.hidden_stride[0]", "row * a.tokens * a.width"),
    "metric assumed dense": ("token * a.metric_stride[1]", "token * a.metric_width"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(builder, tmp_path, name):
    mutant = planted(tmp_path / "csrc", SOURCE, SOURCE, *MUTANTS[name])
    merge = Merge(builder.library(*builder.objects(mutant, SHIM)))
    with pytest.raises((AssertionError, RuntimeError)):
        check_everything(merge)
