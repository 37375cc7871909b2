"""The CUDA kernels of gather_tokens and combine_tokens, run on the CPU; and bugs planted."""

import pytest
import torch
from simulated import DTYPES, planted
from simulated_routing import Routing, sources

from adaptive.ops import combine_tokens, gather_tokens

GATHER, COMBINE = "cuda/gather_tokens.cu", "cuda/combine_tokens.cu"
WIDTHS = (1, 7, 8, 9, 64, 1024, 1032, 2600)


@pytest.fixture
def routing(builder):
    return Routing(builder.library(*builder.objects(*sources())))


def check_gather(routing, hidden, listed):
    assert torch.equal(
        routing.gather_tokens(hidden, listed), gather_tokens.reference(hidden, listed)
    )


def check_combine(routing, hidden, update, listed, weights=None):
    """Out of place, with no bit of difference where nothing is added, and in place."""
    before = hidden.clone()
    right = combine_tokens.reference(hidden, update, listed, weights)
    made = routing.combine_tokens(hidden, update, listed, weights)
    assert torch.equal(hidden, before)
    eps = torch.finfo(hidden.dtype).eps
    torch.testing.assert_close(made, right, rtol=eps, atol=1e-7)
    untouched = torch.ones(hidden.shape[:2], dtype=torch.bool)
    for row, places in zip(untouched, listed.long(), strict=True):
        row[places[places >= 0]] = False
    assert torch.equal(made[untouched], hidden[untouched])
    routing.combine_tokens(hidden, update, listed, weights, out=hidden)
    assert torch.equal(hidden, made)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", gather_tokens.edges, ids=str)
def test_gather_edges(routing, sizes, dtype):
    check_gather(routing, *gather_tokens.make_inputs(**sizes, dtype=dtype, device="cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", combine_tokens.edges, ids=str)
def test_combine_edges(routing, sizes, dtype):
    check_combine(routing, *combine_tokens.make_inputs(**sizes, dtype=dtype, device="cpu"))


def spread(tensor, before, after, dim):
    """The same elements with NaN around them, in dimension `dim`."""
    sizes = list(tensor.shape)
    sizes[dim] += before + after
    made = torch.full(sizes, torch.nan, dtype=tensor.dtype)
    return made.narrow(dim, before, tensor.shape[dim]).copy_(tensor)


def in_any_order(listed, rng):
    return torch.stack([row[torch.randperm(len(row), generator=rng)] for row in listed])


def check_gather_of_all_kinds(routing):
    rng = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for width in WIDTHS:
            hidden, listed = gather_tokens.make_inputs(2, 9, width, 6, dtype=dtype, device="cpu")
            check_gather(routing, hidden, in_any_order(listed, rng))
        hidden, listed = gather_tokens.make_inputs(3, 9, 64, 6, dtype=dtype, device="cpu")
        for before, after in ((8, 8), (1, 0), (4, 8)):
            check_gather(routing, spread(hidden, before, after, 2), listed)
        check_gather(routing, spread(hidden.transpose(0, 1), 1, 2, 0).transpose(0, 1), listed)
        wide = torch.full((3, 11), 5, dtype=torch.int32)
        wide[:, 2:8] = listed
        check_gather(routing, hidden, wide[:, 2:8])
        check_gather(routing, hidden[:1].expand(3, -1, -1), listed)
        for wrong in (9, -2, 2**31 - 1):
            listed[1, 2] = wrong
            made = routing.gather_tokens(hidden, listed)
            assert made[1, 2].isnan().all()
            made[1, 2], listed[1, 2] = 0, -1
            assert torch.equal(made, gather_tokens.reference(hidden, listed))


def check_combine_of_all_kinds(routing):
    rng = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for width in WIDTHS:
            for weighted in (False, True):
                hidden, update, listed, weights = combine_tokens.make_inputs(
                    2, 9, width, 6, weighted, dtype=dtype, device="cpu"
                )
                update[listed < 0] = torch.nan
                update = update.nan_to_num() if width == 9 else update
                listed_so = listed if width != 9 else in_any_order(listed, rng)
                clean = update.masked_fill((listed_so < 0)[..., None], 0)
                right = combine_tokens.reference(hidden, clean, listed_so, weights)
                made = routing.combine_tokens(hidden, update, listed_so, weights)
                torch.testing.assert_close(made, right, rtol=torch.finfo(dtype).eps, atol=1e-7)
                check_combine(routing, hidden, clean, listed_so, weights)
        hidden, update, listed, weights = combine_tokens.make_inputs(
            3, 9, 64, 6, True, dtype=dtype, device="cpu"
        )
        for before, after in ((8, 8), (1, 0), (4, 8)):
            check_combine(routing, spread(hidden, before, after, 2), update, listed, weights)
            check_combine(routing, hidden.clone(), spread(update, before, after, 2), listed)
        other = spread(update.transpose(0, 1), 1, 2, 0).transpose(0, 1)
        check_combine(routing, hidden.clone(), other, listed, weights[:, :1].expand(-1, 6).clone())
        far = spread(weights, 3, 2, 1)
        check_combine(routing, hidden.clone(), update, listed, far)
        out = spread(torch.zeros_like(hidden), 1, 2, 1)
        routing.combine_tokens(hidden, update, listed, weights, out=out)
        assert torch.equal(out, routing.combine_tokens(hidden, update, listed, weights))
        for wrong in (9, -2, 2**31 - 1):
            listed[2, 2] = wrong  # of the last row: nothing writes there afterwards
            made = routing.combine_tokens(hidden, update, listed, weights)
            listed[2, 2] = -1
            assert torch.equal(made, routing.combine_tokens(hidden, update, listed, weights))


def test_gather_of_any_width_stride_and_order(routing):
    check_gather_of_all_kinds(routing)


def test_combine_of_any_width_stride_and_order(routing):
    check_combine_of_all_kinds(routing)


MUTANTS = {
    "gather: a token too many": (GATHER, "token >= a.tokens", "token > a.tokens"),
    "gather: the last token is none": (GATHER, "token >= a.tokens", "token >= a.tokens - 1"),
    "gather: nothing is not zeros": (GATHER, "token == -1 ? 0u : ~0u", "0x3f803f80u"),
    "gather: out of range is zeros": (GATHER, "token == -1 ? 0u : ~0u", "0u"),
    "gather: half of a row": (GATHER, "first += kThreads * kUnrolled", "first += 2 * p.units"),
    "gather: the batch's stride": (GATHER, "batch * p.unit_stride[0] +", "batch * a.tokens +"),
    "gather: the list's stride": (GATHER, "batch * a.list_stride", "batch * a.chosen"),
    "combine: a token too many": (COMBINE, "token >= a.tokens", "token > a.tokens"),
    "combine: nothing is the first token": (
        COMBINE, "if (token < 0 || token >= a.tokens) return;",
        "if (token < -1 || token >= a.tokens) return;"),
    "combine: weights are left out": (COMBINE, "weight * simt::to_float(added)",
                                      "simt::to_float(added)"),
    "combine: rounded twice": (COMBINE, "weight * simt::to_float(added)",
                               "simt::to_float(rounded<T>(weight * simt::to_float(added)))"),
    "combine: the weights' stride": (COMBINE, "batch * a.weights_stride", "batch * a.chosen"),
    "combine: the update's stride": (COMBINE, "entry * a.update_stride[1]", "entry * a.width"),
    "combine: hidden is not copied": (COMBINE, "if (!a.in_place()) {", "if (false) {"),
    "combine: a vector of a row is not copied": (
        COMBINE, "*reinterpret_cast<Vector<T>*>(to + i) =", "if (i > 0) *reinterpret_cast<"
        "Vector<T>*>(to + i) ="),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(builder, tmp_path, name):
    source, *change = MUTANTS[name]
    mutant = planted(tmp_path / "csrc", source, source, *change)
    objects = builder.objects(*sources(mutant.stem, mutant))
    routing = Routing(builder.library(*objects))
    check = check_gather_of_all_kinds if source == GATHER else check_combine_of_all_kinds
    with pytest.raises((AssertionError, RuntimeError)):
        check(routing)
