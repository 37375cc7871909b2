"""Small bugs planted in the CUDA kernels of select_tokens: these checks must notice each."""

import math

import pytest
import torch
from simulated import ROOT, planted
from simulated_sparse import SPARSE_SOURCES, Sparse

from adaptive.ops import select_tokens

SOURCE = "cuda/select_tokens.cu"
SHARED, DIGITS = "cuda/select_tokens.cuh", "cuda/select_tokens_digits.cuh"

MUTANTS = {
    "keys that score -inf visited": (
        SHARED, "if (score[u] != kMinusInfinity) visit",
        "if (i + u * kSelectThreads < last) visit"),
    "-0 below 0": (SHARED, "bits = __float_as_uint(score + 0.0f)", "bits = __float_as_uint(score)"),
    "negative scores not turned": (SHARED, "bits >> 31 ? ~bits : ", "bits >> 31 ? bits : "),
    "weights rounded down": (SHARED, "rint(static_cast<double>(score) / unit)",
        "static_cast<double>(score) / unit"),
    "sums of a warp overwritten": (SHARED, "__syncthreads();  // whoever", "// whoever"),
    "sums of a warp read early": (
        SHARED, "scratch[warp] = sum;\n  __syncthreads();", "scratch[warp] = sum;"),
    "bins left for the next pass": (DIGITS, "    bin = 0;\n", ""),
    "bins added before they are full": (
        DIGITS, "if (bad) atomicMax(&state.refused, 1u);\n  __syncthreads();",
        "if (bad) atomicMax(&state.refused, 1u);"),
    "bins counted before they are cleared": (
        DIGITS, "forced_weight = 0;\n  __syncthreads();", "forced_weight = 0;"),
    "first digits ignored": (DIGITS, "key >> (kPrefixShift & 31) == by_number", "key >= by_number"),
    "first digits of the share ignored": (
        DIGITS, "key >> (kPrefixShift & 31) == by_weight", "key >= by_weight"),
    "number without the forced": (DIGITS, "(s.args.budget) - state.forced", "(s.args.budget)"),
    "share ignored": (DIGITS, "if (kShares && equals > 0)", "if (false)"),
    "share of the forced ignored": (DIGITS, "share - static_cast<double>(forced)", "share"),
    "share rounded down": (DIGITS, "static_cast<Weight>(ceil(need))", "static_cast<Weight>(need)"),
    "all ties for a share": (DIGITS, "state.by_weight == key && enough < equals", "false"),
    "one tie too many": (DIGITS, "equals = enough;", "equals = enough + 1;"),
    "NaN chosen": (DIGITS, "kPass == 0 && score != score", "false"),
    "every block the last": (DIGITS, "static_cast<uint32_t>(s.chunks - 1)",
        "state.arrived[kPass] - 1"),
    "sinks before the first seen": (
        SOURCE, "first + min(static_cast<int>(a.sinks), length - first)",
        "min(static_cast<int>(a.sinks), length)"),
    "a length beyond the capacity": (SOURCE, "|| length > capacity", ""),
    "wrong batch": (SOURCE, "a.lengths[line / a.kv_heads]", "a.lengths[0]"),
    "forced keys counted unseen": (
        SOURCE, "own += scores[i] != kMinusInfinity;\n  for", "++own;\n  for"),
    "ties of the chunks before": (SOURCE, "atomicAdd(&before.equal, tally.equal);", ""),
    "ties placed without limit": (SOURCE, "min(equal_before, equals)] = i", "equal_before] = i"),
    "last ties win": (SOURCE, "equal_before < equals)", "equal_before + 1 > equals)"),
    "nothing after the last": (SOURCE, "indices[i] = -1;", ";"),
}  # fmt: skip


def cases():
    """Arguments that tell the kernels' paths apart; few, since every mutant runs them."""
    rng = torch.Generator().manual_seed(0)
    plain = torch.randn(2, 2, 9000, generator=rng)
    shares = (2 * plain).exp()
    ties = torch.randint(0, 3, (2, 2, 9000), generator=rng).float()
    ties[..., ::7] = -0.0
    close = 1 + torch.rand(2, 2, 9000, generator=rng) * 2.0**-14
    for scores in (plain, shares, ties):
        scores[..., :600:3] = scores[..., 5::11] = scores[1, 1, :700] = -math.inf
    lengths = torch.tensor([9000, 8200], dtype=torch.int32)
    for scores in (plain, shares, ties, close):
        yield scores, 1500, lengths, 5, 40, 1.0
    yield ties, 6500, lengths, 0, 0, 1.0
    for scores in (shares, ties, close):
        yield scores, 4000, lengths, 5, 40, 0.3
    yield ties, 1500, lengths, 0, 0, 0.3
    yield shares, 9000, None, 0, 0, 1 - 2.0**-40
    yield ties, 9000, None, 3, 3, 1 - 2.0**-53
    few = torch.zeros(1, 1, 90)
    few[0, 0, 7:12] = torch.tensor([1.0, 2.0**-33, 3 * 2.0**-33, 0.75 * 2.0**-32, 0.25])
    yield few, 90, None, 0, 0, 1 - 2.0**-53
    yield few, 90, None, 0, 0, 1 - 2.0**-33


def caught(sparse):
    """Whether any check fails: a simulator report, or a choice that is not the CPU kernel's."""
    try:
        for multiprocessors, seed in ((1, 1), (40, 2)):
            sparse.set_device(multiprocessors)
            sparse.set_seed(seed)
            for arguments in cases():
                with torch.no_grad():
                    expected = select_tokens(*arguments)
                for a, b in zip(sparse.select(*arguments), expected, strict=True):
                    assert torch.equal(a, b)
            scores = torch.rand(2, 2, 9000)
            scores[0, 1, 8999] = math.nan
            lengths = torch.tensor([9000, 9001], dtype=torch.int32)
            assert (sparse.select(scores, 80, lengths)[1] < 0).tolist() == [[0, 1], [1, 1]]
    except (AssertionError, RuntimeError):
        return True
    return False


def test_the_real_kernels_pass(sparse):
    assert not caught(sparse)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(builder, objects, sparse_objects, tmp_path, name):
    pairs = zip(SPARSE_SOURCES, sparse_objects, strict=True)
    kept = [made for path, made in pairs if path != ROOT / "csrc" / SOURCE]
    mutant = planted(tmp_path / "csrc", SOURCE, *MUTANTS[name])
    assert caught(Sparse(builder.library(*builder.objects(mutant), *kept, *objects)))
