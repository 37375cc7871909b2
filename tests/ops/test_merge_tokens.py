"""Laws of merge_tokens: which tokens become one, what they become, and what stays as it is."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive.ops import merge_tokens, unmerge_tokens
from adaptive.ops.merge_tokens import most_pairs


@st.composite
def rows(draw, ragged=True):
    """Arguments of which many metrics are equal, so that ties are common."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    protect = draw(st.integers(0, 4))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    hidden = torch.randn(batch, tokens, 8, generator=rng)
    kinds = draw(st.sampled_from([2, 5, 100]))
    metric = torch.randn(kinds, 8, generator=rng)
    metric = metric[torch.randint(0, kinds, (batch, tokens), generator=rng)]
    sizes = lengths = None
    if draw(st.booleans()):
        sizes = torch.randint(1, 9, (batch, tokens), generator=rng).float()
    if ragged and draw(st.booleans()):
        lengths = torch.randint(0, tokens + 1, (batch,), generator=rng).int()
    removed = draw(st.integers(0, most_pairs(tokens, protect)))
    return hidden, metric, removed, sizes, lengths, None, protect


def matched(metric, length, pairs, protect):
    """Pairs (source, target) of one row, by the words of the docstring, in plain Python."""
    unit = torch.nn.functional.normalize(metric.double(), dim=-1).tolist()
    found = []
    targets = [t for t in range(protect, length) if t % 2]
    for source in (t for t in range(protect, length) if t % 2 == 0 and targets):
        cosines = [
            round(sum(x * y for x, y in zip(unit[source], unit[t], strict=True)), 5)
            for t in targets
        ]
        best = max(range(len(targets)), key=lambda i: (cosines[i], -i))
        found.append((-cosines[best], source, targets[best]))
    return [(source, target) for _, source, target in sorted(found)[:pairs]]


def lengths_of(hidden, lengths):
    return [hidden.shape[1]] * len(hidden) if lengths is None else lengths.tolist()


@given(st.integers(0, 2**16), st.integers(0, 3), st.integers(3, 20))
def test_the_most_similar_pairs_merge(seed, protect, tokens):
    most = most_pairs(tokens, protect)
    rng = torch.Generator().manual_seed(seed)
    hidden, metric = (torch.randn(1, tokens, 8, generator=rng) for _ in range(2))
    for pairs in range(most + 1):
        _, sizes, groups = merge_tokens(hidden, metric, pairs, protect=protect)
        chosen = matched(metric[0], tokens, pairs, protect)
        gone = {source for source, _ in chosen}
        slots = {t: i for i, t in enumerate(t for t in range(tokens) if t not in gone)}
        wanted = [slots[dict(chosen).get(t, t)] for t in range(tokens)]
        assert groups[0].tolist() == wanted
        assert sizes[0].tolist() == [wanted.count(slot) for slot in range(tokens - pairs)]


@given(rows())
def test_sizes_add_up_and_means_are_weighted(arguments):
    hidden, _, removed, sizes, lengths, _, _ = arguments
    out, out_sizes, groups = merge_tokens(*arguments)
    sizes = torch.ones(hidden.shape[:2]) if sizes is None else sizes
    for row, length in enumerate(lengths_of(hidden, lengths)):
        assert (groups[row, length:] == -1).all()
        assert out_sizes[row].sum() == sizes[row, :length].sum()
        for slot in range(hidden.shape[1] - removed):
            members = (groups[row] == slot).nonzero()[:, 0]
            assert out_sizes[row, slot] == sizes[row, members].sum()
            if len(members) == 0:
                assert (out[row, slot] == 0).all()
            elif len(members) == 1:
                assert torch.equal(out[row, slot], hidden[row, members[0]])
            else:
                weight = sizes[row, members, None].double()
                mean = (hidden[row, members] * weight).sum(0) / weight.sum()
                torch.testing.assert_close(out[row, slot], mean.float(), rtol=1e-5, atol=1e-5)


@given(rows())
def test_order_stays_and_the_protected_stay_alone(arguments):
    hidden, _, _, _, lengths, _, protect = arguments
    _, _, groups = merge_tokens(*arguments)
    for row, length in enumerate(lengths_of(hidden, lengths)):
        first = {}
        for t in range(length):
            first.setdefault(int(groups[row, t]), []).append(t)
        for t in range(min(protect, length)):
            assert first[t] == [t]
        stay = [next(t for t in m if t % 2 or len(m) == 1) for _, m in sorted(first.items())]
        assert stay == sorted(stay)


@given(rows())
def test_rows_do_not_depend_on_each_other(arguments):
    made = merge_tokens(*arguments)
    for row in range(len(arguments[0])):
        alone = merge_tokens(
            *(t[row : row + 1] if isinstance(t, torch.Tensor) else t for t in arguments)
        )
        assert all(torch.equal(a[row], b[0]) for a, b in zip(made, alone, strict=True))


@given(rows(ragged=False), st.integers(1, 9))
def test_a_row_does_not_see_its_padding(arguments, more):
    hidden, metric, removed, sizes, _, _, protect = arguments
    batch, tokens, _ = hidden.shape
    padding = torch.full((batch, more, 8), torch.nan)
    wider = [torch.cat([t, padding], 1) for t in (hidden, metric)]
    if sizes is not None:
        sizes = torch.cat([sizes, padding[..., 0]], 1)
    lengths = torch.full((batch,), tokens, dtype=torch.int32)
    made = merge_tokens(*wider, removed, sizes, lengths, None, protect)
    alone = merge_tokens(*arguments)
    kept = tokens - removed
    assert torch.equal(made[0][:, :kept], alone[0])
    assert torch.equal(made[1][:, :kept], alone[1])
    assert torch.equal(made[2][:, :tokens], alone[2])
    assert (made[0][:, kept:] == 0).all()


@given(st.integers(0, 2**16), st.integers(4, 24))
def test_sets_may_be_permuted(seed, tokens):
    """Which tokens become one does not depend on the order within the two sets."""
    rng = torch.Generator().manual_seed(seed)
    hidden, metric = (torch.randn(1, tokens, 8, generator=rng) for _ in range(2))
    order = torch.arange(tokens)
    for parity in (0, 1):
        own = torch.arange(parity, tokens, 2)
        order[own] = own[torch.randperm(len(own), generator=rng)]
    pairs = most_pairs(tokens, 0) // 2
    groups = merge_tokens(hidden, metric, pairs, protect=0)[2][0]
    permuted = merge_tokens(hidden[:, order], metric[:, order], pairs, protect=0)[2][0]
    together = groups[:, None] == groups
    assert torch.equal(together[order][:, order], permuted[:, None] == permuted)


def test_of_equal_cosines_the_first_pair_and_the_first_target():
    metric = torch.ones(1, 9, 8)
    _, sizes, groups = merge_tokens(torch.randn(1, 9, 8), metric, 2)
    assert groups.tolist() == [[0, 1, 1, 2, 1, 3, 4, 5, 6]]
    assert sizes.tolist() == [[1, 3, 1, 1, 1, 1, 1]]


def test_nan_is_below_every_cosine():
    metric = torch.randn(1, 9, 8)
    metric[0, 2] = torch.nan
    metric[0, 4], metric[0, 1] = -metric[0, 3], metric[0, 3]
    _, _, groups = merge_tokens(torch.randn(1, 9, 8), metric, 3)
    assert (groups == groups[0, 2]).sum() == 1


def test_counts_say_how_many_merge_in_each_row():
    hidden, metric = torch.randn(2, 4, 12, 8)
    counts = torch.tensor([2, 3, 5, 0], dtype=torch.int32)
    lengths = torch.tensor([12, 12, 12, 9], dtype=torch.int32)
    _, sizes, _ = merge_tokens(hidden, metric, 2, None, lengths, counts)
    assert (sizes > 0).sum(1).tolist() == [10, 9, 7, 9]
    # A row that would not fit merges more than it was asked to.
    none = torch.zeros(4, dtype=torch.int32)
    _, sizes, _ = merge_tokens(hidden, metric, 2, None, None, none)
    assert (sizes > 0).sum(1).tolist() == [10] * 4


@given(rows())
def test_unmerged_tokens_have_the_state_of_their_group(arguments):
    out, _, groups = merge_tokens(*arguments)
    states = unmerge_tokens(out, groups)
    assert states.shape == arguments[0].shape
    for row, group in enumerate(groups.tolist()):
        for t, slot in enumerate(group):
            wanted = torch.zeros(8) if slot < 0 else out[row, slot]
            assert torch.equal(states[row, t], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_instruction_set_gives_the_reference(level, dtype):
    for sizes in merge_tokens.edges:
        arguments = merge_tokens.make_inputs(**sizes, dtype=dtype, device="cpu", seed=1)
        made, right = merge_tokens(*arguments), merge_tokens.reference(*arguments)
        assert torch.equal(made[2], right[2])
        assert torch.equal(made[1], right[1])
        last = torch.finfo(dtype).eps if dtype != torch.float32 else 2e-5
        torch.testing.assert_close(made[0], right[0], rtol=last, atol=2e-5)


def test_numpy_comes_back_as_numpy():
    hidden = np.random.default_rng(0).standard_normal((1, 6, 8), dtype=np.float32)
    made = merge_tokens(hidden, hidden, 1)
    assert all(isinstance(array, np.ndarray) for array in made)
    assert made[0].shape == (1, 5, 8)


def test_the_reference_has_a_gradient():
    hidden = torch.randn(1, 7, 8, dtype=torch.float32, requires_grad=True)
    metric = torch.randn(1, 7, 8)
    out, _, _ = merge_tokens.reference(hidden, metric, 2)
    out.sum().backward()
    assert torch.isfinite(hidden.grad).all()
    assert (hidden.grad > 0).all()


H, ONE = torch.zeros(2, 6, 8), torch.ones(2, dtype=torch.int32)
BAD = {
    "hidden is a list": ({"hidden": [1]}, TypeError, "hidden must be .*got list"),
    "hidden of rank 2": (
        {"hidden": H[0]}, ValueError, r"hidden must have 3 dimensions, got shape \[6, 8\]"),
    "hidden float64": (
        {"hidden": H.double()}, TypeError, "hidden must be float32 or float16 or bfloat16"),
    "a width of 12": (
        {"hidden": torch.zeros(2, 6, 12)}, ValueError, "hidden must have a multiple of 8 features"),
    "hidden transposed": (
        {"hidden": torch.zeros(2, 8, 6).transpose(1, 2)}, ValueError, "hidden must be contiguous"),
    "metric of another dtype": (
        {"metric": H.half()}, TypeError, "metric must be float32, got torch.float16"),
    "metric of fewer tokens": (
        {"metric": H[:, :5]}, ValueError, "metric must have size 6 in dimension 1"),
    "no features in the metric": (
        {"metric": H[:, :, :0]}, ValueError, "metric must have a multiple of 8 features"),
    "more pairs than there are": ({"removed": 3}, ValueError, r"removed must be in 0\.\.2, got 3"),
    "a negative number": ({"removed": -1}, ValueError, "removed must .*got -1"),
    "half a token": ({"removed": 0.5}, TypeError, "removed must be a whole number.*got float"),
    "sizes of one row": (
        {"sizes": torch.ones(1, 6)}, ValueError, "sizes must have size 2 in dimension 0"),
    "sizes int": ({"sizes": torch.ones(2, 6).int()}, TypeError, "sizes must be float32"),
    "lengths int64": ({"lengths": ONE.long()}, TypeError, "lengths must be int32, got torch.int64"),
    "a length too large": (
        {"lengths": 7 * ONE}, IndexError, r"lengths\[0\] must be in 0\.\.6, got 7"),
    "a negative count": ({"counts": -ONE}, IndexError, r"counts\[0\] must be in 0\.\..*, got -1"),
    "protect below 0": ({"protect": -1}, ValueError, "protect must be at least 0, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    changes, error, message = BAD[name]
    with torch.no_grad(), pytest.raises(error, match="adaptive::merge_tokens: .*" + message):
        merge_tokens(**{"hidden": H, "metric": H, "removed": 1, **changes})
