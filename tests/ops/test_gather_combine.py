"""Laws of gather_tokens and combine_tokens: rows go where the list says, and no bit moves else."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from levels import DTYPES, every_dtype
from routing_cases import listed, normal, spread
from torch.autograd import gradcheck

from adaptive.ops import combine_tokens, gather_tokens, route_tokens


@st.composite
def calls(draw):
    """hidden, update, tokens in any order with gaps, and weights."""
    batch, length, width = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 12)),
        draw(st.integers(1, 70)),
    )
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**16))
    chosen = draw(st.integers(0, length + 2))
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.full((batch, length + 2), -1, dtype=torch.int32)
    tokens[:, :length] = torch.stack([torch.randperm(length, generator=rng) for _ in tokens])
    tokens = torch.stack([row[torch.randperm(len(row), generator=rng)] for row in tokens])
    tokens = tokens[:, :chosen]
    weights = normal(batch, chosen, seed=seed + 1) if draw(st.booleans()) else None
    hidden = normal(batch, length, width, dtype=dtype, seed=seed + 2)
    return hidden, normal(batch, chosen, width, dtype=dtype, seed=seed + 3), tokens, weights


@given(calls())
def test_rows_go_where_the_list_says(call):
    hidden, update, tokens, weights = call
    before = hidden.clone()
    with torch.no_grad():
        rows = gather_tokens(hidden, tokens)
        made = combine_tokens(hidden, update, tokens, weights)
    assert torch.equal(hidden, before)
    touched = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    for b, places in enumerate(tokens.tolist()):
        for i, token in enumerate(places):
            if token < 0:
                assert (rows[b, i] == 0).all()
                continue
            assert torch.equal(rows[b, i], hidden[b, token])
            touched[b, token] = True
            factor = 1.0 if weights is None else weights[b, i].double()
            exact = hidden[b, token].double() + factor * update[b, i].double()
            torch.testing.assert_close(
                made[b, token].double(),
                exact,
                rtol=0.51 * torch.finfo(hidden.dtype).eps,
                atol=2e-7 * (1 + exact.abs().max().item()),
            )
    assert torch.equal(made[~touched], hidden[~touched])


@given(calls())
def test_in_place_gives_the_same_bits(call):
    hidden, update, tokens, weights = call
    with torch.no_grad():
        right = combine_tokens(hidden, update, tokens, weights)
    combine_tokens.into(hidden, hidden=hidden, update=update, tokens=tokens, weights=weights)
    assert torch.equal(hidden, right)


@every_dtype
@pytest.mark.parametrize("width", [1, 31, 64, 2049])
def test_every_level_gives_the_reference(width, dtype, level):
    arguments = combine_tokens.make_inputs(2, 9, width, 5, True, dtype=dtype, device="cpu")
    with torch.no_grad():
        made = combine_tokens(*arguments)
    right = combine_tokens.reference(*arguments)
    torch.testing.assert_close(made, right, rtol=torch.finfo(dtype).eps, atol=1e-7)


@every_dtype
def test_sums_are_rounded_once_and_keep_what_is_not_finite(dtype, level):
    largest = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).smallest_normal / 8
    values = torch.tensor([1.0, 1.0, torch.inf, torch.nan, -torch.inf, largest, tiny, -0.0])
    added = torch.tensor([3.0, -1.0, 1.0, 1.0, torch.inf, largest, tiny, 0.0])
    hidden, update = (t.to(dtype).view(1, 1, -1) for t in (values, added))
    weights = torch.full((1, 1), torch.finfo(dtype).eps / 4)
    with torch.no_grad():
        made = combine_tokens(hidden, update, listed([[0]]), weights)
        whole = combine_tokens(hidden, update, listed([[0]]))
    right = (hidden.double() + weights[..., None].double() * update.double()).to(dtype)
    torch.testing.assert_close(made, right, rtol=0, atol=0, equal_nan=True)
    right = (hidden.double() + update.double()).to(dtype)
    torch.testing.assert_close(whole, right, rtol=0, atol=0, equal_nan=True)


@every_dtype
def test_routing_all_and_adding_the_layer_is_the_layer(dtype):
    """With every token routed, gather changes no bit, and combine is the residual addition."""
    hidden, update = normal(2, 17, 48, dtype=dtype), normal(2, 17, 48, dtype=dtype, seed=1)
    with torch.no_grad():
        tokens, counts, _ = route_tokens(torch.zeros(2, 17), -torch.inf)
        assert counts.tolist() == [17, 17]
        assert torch.equal(gather_tokens(hidden, tokens), hidden)
        assert torch.equal(combine_tokens(hidden, update, tokens), hidden + update)
        nothing = torch.full_like(tokens, -1)
        assert torch.equal(combine_tokens(hidden, update, nothing), hidden)


def test_slots_undo_what_tokens_did():
    hidden, scores = normal(3, 40, 8), normal(3, 40)
    tokens, counts, slots = route_tokens(scores, capacity=0.4)
    rows = gather_tokens(hidden, tokens)
    back = gather_tokens(rows, slots)
    assert torch.equal(back, hidden.masked_fill((slots < 0)[..., None], 0))
    assert counts.tolist() == [16, 16, 16]
    assert torch.equal(rows[:, :16], gather_tokens(hidden, tokens[:, :16]))


@every_dtype
def test_strides_are_followed_and_what_is_not_listed_is_not_read(dtype):
    hidden, update, tokens, weights = combine_tokens.make_inputs(
        2, 9, 24, 6, True, dtype=dtype, device="cpu"
    )
    with torch.no_grad():
        right = combine_tokens(hidden, update, tokens, weights)
        rows = gather_tokens(hidden, tokens)
        update[tokens < 0] = torch.nan
        far = [spread(t, 3, 2) for t in (hidden, update, weights)]
        wide = torch.full((2, 9), -7, dtype=torch.int32)
        wide[:, 2:8] = tokens
        assert torch.equal(combine_tokens(far[0], far[1], wide[:, 2:8], far[2]), right)
        assert torch.equal(gather_tokens(far[0], wide[:, 2:8]), rows)
        assert torch.equal(gather_tokens(hidden[:1].expand(2, -1, -1), tokens)[0], rows[0])
    combine_tokens.into(far[0], hidden=far[0], update=far[1], tokens=wide[:, 2:8], weights=far[2])
    assert torch.equal(far[0], right)


def test_the_number_of_threads_changes_no_bit():
    arguments = combine_tokens.make_inputs(
        2, 900, 520, 700, True, dtype=torch.bfloat16, device="cpu"
    )
    before, made = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        with torch.no_grad():
            made.append([combine_tokens(*arguments), gather_tokens(*arguments[::2])])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


# Both ops are linear in each argument, so that large steps cost no precision.
SLOPE = {"eps": 0.5, "atol": 1e-3, "rtol": 1e-3}
TOKENS = listed([[3, -1, 0], [1, 2, 4]])


@pytest.mark.filterwarnings("ignore:Input #.* requires gradient and is not a double")
def test_gradients_are_slopes():
    hidden = normal(2, 5, 6).requires_grad_()
    update, weights = normal(2, 3, 6, seed=1).requires_grad_(), normal(2, 3, seed=2)
    weights.requires_grad_()
    assert gradcheck(lambda h: gather_tokens(h, TOKENS), [hidden], **SLOPE)
    assert gradcheck(
        lambda h, u, w: combine_tokens(h, u, TOKENS, w), [hidden, update, weights], **SLOPE
    )
    assert gradcheck(lambda h, u: combine_tokens(h, u, TOKENS), [hidden, update], **SLOPE)


@given(calls())
def test_gradients_are_those_of_the_reference(call):
    hidden, update, tokens, weights = call
    operands = [hidden, update] + ([] if weights is None else [weights])
    grads = []
    for gather, combine in (
        (gather_tokens, combine_tokens),
        (gather_tokens.reference, combine_tokens.reference),
    ):
        own = [t.clone().requires_grad_() for t in operands]
        rows = gather(own[0], tokens)
        made = combine(own[0], own[1] + rows, tokens, *own[2:])
        (made.float() * normal(*made.shape, seed=9)).sum().backward()
        grads.append([t.grad for t in own])
    eps = 8 * torch.finfo(hidden.dtype).eps
    for left, right in zip(*grads, strict=True):
        assert left.dtype == right.dtype
        scale = right.float().abs().max().item() if right.numel() else 0.0
        torch.testing.assert_close(left, right, rtol=max(eps, 1e-5), atol=eps * (1 + scale))


def test_an_update_beside_nothing_gives_no_gradient():
    update = normal(2, 3, 6)
    update[0, 1] = torch.nan
    update.requires_grad_()
    weights = torch.ones(2, 3, requires_grad=True)
    combine_tokens(normal(2, 5, 6), update, TOKENS, weights).sum().backward()
    assert (update.grad[0, 1] == 0).all()
    assert weights.grad[0, 1] == 0
    assert weights.grad.isfinite().all()


def test_numpy_and_compiled():
    hidden, update, tokens, weights = combine_tokens.make_inputs(
        2, 9, 24, 6, True, dtype=torch.float32, device="cpu"
    )
    with torch.no_grad():
        rows, made = gather_tokens(hidden, tokens), combine_tokens(hidden, update, tokens, weights)
        arrays = [t.numpy() for t in (hidden, update, tokens, weights)]
        assert isinstance(combine_tokens(*arrays), np.ndarray)
        assert (combine_tokens(*arrays) == made.numpy()).all()
        assert (gather_tokens(*arrays[::2]) == rows.numpy()).all()

    def run(hidden, update):
        return combine_tokens(hidden, update + gather_tokens(hidden, tokens), tokens, weights)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    operands = [[t.clone().requires_grad_() for t in (hidden, update)] for _ in range(2)]
    for form, own in zip((run, compiled), operands, strict=True):
        form(*own).sum().backward()
    for left, right in zip(*operands, strict=True):
        torch.testing.assert_close(left.grad, right.grad)
