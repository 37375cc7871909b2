"""The CUDA kernel of route_tokens, run on the CPU, against its reference; and bugs planted."""

import pytest
import torch
from simulated import planted
from simulated_routing import Routing, sources

from adaptive.ops import route_tokens

SOURCE = "cuda/route_tokens.cu"


@pytest.fixture
def routing(builder):
    return Routing(builder.library(*builder.objects(*sources())))


def check(routing, *arguments):
    expected = route_tokens.reference(*arguments)
    for made, right in zip(routing.route_tokens(*arguments), expected, strict=True):
        assert torch.equal(made, right)


@pytest.mark.parametrize("sizes", route_tokens.edges, ids=str)
def test_edges(routing, sizes):
    check(routing, *route_tokens.make_inputs(**sizes, device="cpu"))


def check_scores(routing):
    """Scores that differ in any digit of their keys, signs, zeros, infinities, and all equal."""
    rng = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (3, 300), generator=rng).int()
    every = bits.view(torch.float32).nan_to_num(nan=1.0, posinf=torch.inf, neginf=-torch.inf)
    low = (torch.randint(0, 90, (3, 300), generator=rng) + 0x3F000000).int().view(torch.float32)
    zeros = torch.tensor([0.0, -0.0, -1e-45, 1e-45]).repeat(3, 75)
    ends = torch.tensor([torch.inf, -torch.inf, 3e38, -3e38, 1.0]).repeat(3, 60)
    for scores in (every, low, zeros, ends, torch.ones(3, 300)):
        for wanted in (1, 2, 33, 60, 150, 299):
            check(routing, scores, None, wanted)
        for limit in (-torch.inf, -0.0, 0.0, 1.0, torch.inf):
            check(routing, scores, limit)
    valid = torch.rand(3, 300, generator=rng) < 0.5
    for capacity in (1, 40, 0.3, 0.999, 1.0):
        check(routing, every, None, capacity, valid)


def check_refusals(routing):
    """NaN spoils its row and no other; behind the mask it is nothing."""
    scores = torch.rand(4, 600, generator=torch.Generator().manual_seed(1))
    scores[2, 577] = torch.nan
    for option in ((0.5, None), (None, 7), (None, 0.25)):
        tokens, counts, slots = routing.route_tokens(scores, *option)
        right = route_tokens.reference(scores, *option)
        assert counts[2] == -1
        assert (tokens[2] == -1).all()
        assert (slots[2] == -1).all()
        good = [0, 1, 3]
        for made, expected in zip((tokens, counts, slots), right, strict=True):
            assert torch.equal(made[good], expected[good])
        valid = ~scores.isnan()
        check(routing, scores, *option, valid)


def check_everything(routing):
    """Enough to notice a small bug."""
    for seed in range(2):
        routing.library.set_seed(seed)
        for sizes in (
            {"tokens": 70, "capacity": 0.25}, {"tokens": 1100, "capacity": 0.4},
            {"tokens": 3000, "capacity": 1000}, {"tokens": 1500, "threshold": 0.5},
            {"tokens": 33, "threshold": 0.25}, {"tokens": 5, "capacity": 0.125},
        ):  # fmt: skip
            for padded in (False, True):
                check(
                    routing,
                    *route_tokens.make_inputs(3, **sizes, padded=padded, device="cpu", seed=seed),
                )
    scores, _, _, valid = route_tokens.make_inputs(3, 40, padded=True, device="cpu")
    wide = torch.full((3, 47), torch.nan)
    wide[:, 4:44] = scores
    far = torch.ones(3, 50, dtype=torch.bool)
    far[:, 5:45] = valid
    check(routing, wide[:, 4:44], None, 0.5, far[:, 5:45])
    check(routing, scores, None, 5, valid[:1].expand(3, -1))
    check_scores(routing)
    check_refusals(routing)


def test_scores_strides_masks_and_nan(routing):
    check_everything(routing)


MUTANTS = {
    "a threshold is beyond": ("border.key = key_of(a.threshold);",
                              "border = {key_of(a.threshold), 0};"),
    "shares are rounded up": ("static_cast<int64_t>(a.share * static_cast<double>(count))",
                              "static_cast<int64_t>(a.share * static_cast<double>(count) + 0.999)"),
    "a share may leave nothing": ("room = share > 1 ? share : 1;", "room = share;"),
    "padding counts in shares": ("++count;", "count = row.tokens / kThreads + 1;"),
    "padding is routed": ("key[u] = here[u] ?", "here[u] = token < end;\n      key[u] = here[u] ?"),
    "ties go to all": ("ahead < border.equals)", "true)"),
    "ties go to the last": ("border.equals);\n    if (taken)", "0);\n    if (taken)"),
    "ties of the warps before forgotten": ("before.equal + __popc(ties & below)",
                                           "__popc(ties & below)"),
    "the rest of a digit forgotten": ("return {key, rest};", "return {key, room};"),
    "three digits": ("pass < kDigits; ++pass", "pass < kDigits - 1; ++pass"),
    "other prefixes counted": ("& known) == 0) ", "& known) == 0 || known != 0) "),
    "no barrier after a histogram": ("    });\n    __syncthreads();\n    key |=",
                                     "    });\n    key |="),
    "bins are not cleared": ("bins[i / kDigitBins][i % kDigitBins] = 0;", ""),
    "NaN is not looked for": ("bad = bad || score != score;", ""),
    "NaN in one warp": ("bad = bad || refused[w];", "bad = refused[0];"),
    "the end of the list kept": ("i < row.tokens; i += kThreads) list[i] = -1",
                                 "i < row.tokens - 1; i += kThreads) list[i] = -1"),
    "slots of others kept": ("if (token < end) slots[token] = taken ? slot : -1;",
                             "if (taken) slots[token] = slot;"),
    "no barrier after the counts": ("found[warp] = own;\n  __syncthreads();",
                                    "found[warp] = own;"),
    "zeros have signs": ("key_of(row.scores[token])",
                         "(__float_as_uint(row.scores[token]) >> 31 ? "
                         "~__float_as_uint(row.scores[token]) : "
                         "__float_as_uint(row.scores[token]) | 0x80000000u)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(builder, tmp_path, name):
    mutant = planted(tmp_path / "csrc", SOURCE, SOURCE, *MUTANTS[name])
    objects = builder.objects(*sources("route_tokens", mutant))
    routing = Routing(builder.library(*objects))
    with pytest.raises((AssertionError, RuntimeError)):
        check_everything(routing)
