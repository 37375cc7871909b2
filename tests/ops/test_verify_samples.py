"""Laws of verify_samples: what it returns is distributed as the target model's own samples."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive.ops import verify_draft, verify_samples

CHI_SQUARE_999 = {5: 20.5, 15: 37.7, 35: 66.6}  # by degrees of freedom: exceeded once in 1000


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def sixteenths(rng, *shape):
    """Distributions over the last dimension in whole sixteenths, many of them 0."""
    made = torch.zeros(shape)
    rows = made.view(-1, shape[-1])
    for row in rows:
        row += torch.bincount(torch.randint(0, shape[-1], (16,), generator=rng) ** 2 % shape[-1],
                              minlength=shape[-1]) / 16  # fmt: skip
    return made


@st.composite
def drafts(draw):
    """Arguments of few tokens; some drafted ones have probability 0 on either side."""
    batch, nodes, vocab = draw(st.integers(1, 3)), draw(st.integers(0, 5)), draw(st.integers(1, 7))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    drafted = torch.randint(0, vocab, (batch, nodes), generator=rng)
    draft, target = sixteenths(rng, batch, nodes, vocab), sixteenths(rng, batch, nodes + 1, vocab)
    uniforms = torch.randint(0, 8, (batch, nodes + 1), generator=rng) / 8
    lengths = torch.randint(0, nodes + 1, (batch,), generator=rng) if draw(st.booleans()) else None
    return drafted, draft, target, uniforms, lengths


def by_hand(drafted, draft, target, uniforms, length):
    """Leviathan et al., algorithm 1, in fractions."""
    accepted = 0
    while accepted < length:
        p, q = (Fraction(probs[accepted][drafted[accepted]]) for probs in (target, draft))
        if not Fraction(uniforms[accepted]) * q < p:
            break
        accepted += 1
    p = [Fraction(x) for x in target[accepted]]
    left = p
    if accepted < length:
        left = [max(a - Fraction(b), 0) for a, b in zip(p, draft[accepted], strict=True)]
    left = left if sum(left) > 0 else p
    sums = [sum(left[: token + 1]) for token in range(len(left))]
    bound = Fraction(uniforms[-1]) * sums[-1]
    drawn = next(token for token, total in enumerate(sums) if total > bound)
    rest = [-1] * (len(drafted) - accepted)
    return accepted, [*drafted[:accepted], drawn, *rest]


@given(drafts())
def test_each_row_is_the_algorithm_in_exact_arithmetic(draft):
    accepted, tokens = verify_samples(*draft)
    lengths = draft[4] if draft[4] is not None else [draft[0].shape[1]] * len(tokens)
    for row, length in enumerate(lengths):
        expected = by_hand(*(t[row].tolist() for t in draft[:4]), int(length))
        assert (int(accepted[row]), tokens[row].tolist()) == expected
    assert all(
        torch.equal(a, b)
        for a, b in zip(verify_samples.reference(*draft), (accepted, tokens), strict=True)
    )


@given(drafts())
def test_a_sure_target_is_greedy_decoding(draft):
    drafted, draft_probs, target, uniforms, lengths = draft
    choices = target.argmax(2)
    sure = torch.nn.functional.one_hot(choices, target.shape[2]).float()
    accepted, tokens = verify_samples(drafted, draft_probs, sure, uniforms, lengths)
    greedy = verify_draft(drafted, choices, None, lengths)
    assert torch.equal(accepted, greedy[0])
    assert torch.equal(tokens, greedy[2])


@given(drafts())
def test_a_drafter_equal_to_the_target_is_always_right(draft):
    _, _, target, uniforms, _ = draft
    nodes = target.shape[1] - 1
    drafted = target[:, :nodes].argmax(2)
    accepted, tokens = verify_samples(drafted, target[:, :nodes].clone(), target, uniforms)
    assert (accepted == nodes).all()
    assert torch.equal(tokens[:, :nodes], drafted)


@given(drafts())
def test_no_token_is_returned_that_the_target_never_says(draft):
    accepted, tokens = verify_samples(*draft)
    said = draft[2].gather(2, tokens.clamp(min=0)[..., None])[..., 0]
    within = torch.arange(tokens.shape[1]) <= accepted[:, None]
    assert (said[within] > 0).all()
    assert (tokens[~within] == -1).all()


@given(drafts())
def test_rows_do_not_depend_on_each_other_nor_on_what_is_not_real(draft):
    drafted, draft_probs, target, uniforms, _ = draft
    nodes = drafted.shape[1]
    lengths = torch.arange(len(drafted)).clamp(max=nodes)
    made = verify_samples(drafted, draft_probs, target, uniforms, lengths)
    unreal = torch.arange(nodes) >= lengths[:, None]
    drafted = drafted.masked_fill(unreal, -9)
    draft_probs = draft_probs.masked_fill(unreal[..., None], torch.nan)
    uniforms, target = uniforms.clone(), target.clone()
    uniforms[:, :nodes][unreal] = torch.nan
    target[:, 1:][unreal] = torch.nan
    for row in range(len(drafted)):
        alone = [t[row : row + 1] for t in (drafted, draft_probs, target, uniforms, lengths)]
        for together, single in zip(made, verify_samples(*alone), strict=True):
            assert torch.equal(together[row], single[0])


def chi_square(counts, expected):
    """The statistic of counts against what was expected of them."""
    return float(((counts - expected) ** 2 / expected).sum())


P = torch.tensor([[6, 1, 3, 2, 2, 2], [1, 5, 1, 3, 5, 1]]) / 16
Q = torch.tensor([[1, 5, 3, 1, 4, 2], [4, 4, 1, 1, 3, 3]]) / 16


def sampled(draws, nodes, seed):
    """Drafts from Q at each node, verified against P, and after the last node P again."""
    rng = torch.Generator().manual_seed(seed)
    draft = Q[:nodes].expand(draws, -1, -1)
    drafted = torch.multinomial(Q[:nodes], draws, True, generator=rng).T.contiguous()
    target = P[torch.arange(nodes + 1) % 2].expand(draws, -1, -1)
    return verify_samples(drafted, draft, target, torch.rand(draws, nodes + 1, generator=rng))


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_first_token_is_distributed_as_the_target_says(nodes):
    draws = 40000
    accepted, tokens = sampled(draws, nodes, seed=1)
    assert chi_square(tokens[:, 0].bincount(minlength=6), draws * P[0]) < CHI_SQUARE_999[5]
    right = torch.minimum(P[0], Q[0]).sum()  # what share of drafts should pass
    assert abs(float((accepted > 0).double().mean()) - float(right)) < 0.01


def test_the_first_two_tokens_are_distributed_as_the_target_says():
    """Among drafts whose first token passed: that token in proportion to min(p, q), then P."""
    accepted, tokens = sampled(60000, 2, seed=2)
    pairs = tokens[accepted > 0][:, :2]
    counts = (pairs[:, 0] * 6 + pairs[:, 1]).bincount(minlength=36).double()
    passed = torch.minimum(P[0], Q[0]) / torch.minimum(P[0], Q[0]).sum()
    expected = len(pairs) * passed[:, None] * P[1]
    assert chi_square(counts, expected.flatten()) < CHI_SQUARE_999[35]


def test_a_large_vocabulary_is_searched_to_the_last_place():
    rng = torch.Generator().manual_seed(3)
    target = torch.softmax(3 * torch.randn(64, 1, 50021, generator=rng), 2)
    uniforms = torch.rand(64, 1, generator=rng)
    uniforms[:4, 0] = torch.tensor([0.0, 1.0, 1 - 2**-24, 2.0**-30])
    nothing = torch.empty(64, 0).long(), torch.empty(64, 0, 50021)
    _, tokens = verify_samples(*nothing, target, uniforms)
    sums = target[:, 0].double().cumsum(1)
    bound = uniforms.double() * sums[:, -1:]
    after = sums.gather(1, tokens)
    before = after - target[:, 0].double().gather(1, tokens)
    assert (before <= bound + 1e-13).all()
    assert (after >= bound - 1e-13).all()


def test_the_number_of_threads_changes_nothing():
    arguments = verify_samples.make_inputs(40, 3, 30011, device="cpu")
    before, made = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        made.append(verify_samples(*arguments))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_nothing_left_draws_from_the_target():
    half = torch.tensor([[[0.5, 0.5]]])
    target = torch.tensor([[[0.25, 0.5], [1.0, 0.0]]])  # nowhere above the draft
    for uniform, token in ((0.3, 0), (0.4, 1)):
        accepted, tokens = verify_samples(
            torch.tensor([[0]]), half, target, torch.tensor([[0.75, uniform]])
        )
        assert accepted.tolist() == [0]
        assert tokens.tolist() == [[token, -1]]


def test_strides_are_followed():
    drafted, draft, target, uniforms, _ = verify_samples.make_inputs(3, 4, 20, device="cpu")
    made = verify_samples(drafted, draft, target, uniforms)
    spread = torch.full((5, 3, 33), torch.nan)
    spread[..., 5:25] = target.transpose(0, 1)
    wide = torch.full((3, 11), torch.nan)
    wide[:, 2:7] = uniforms
    far = torch.full((3, 9), -5)
    far[:, 3:7] = drafted
    again = verify_samples(far[:, 3:7], draft, spread[..., 5:25].transpose(0, 1), wide[:, 2:7])
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))


def test_numpy_comes_back_as_numpy():
    arguments = verify_samples.make_inputs(2, 3, 9, device="cpu")[:4]
    made = verify_samples(*(t.numpy() for t in arguments))
    assert all(isinstance(t, np.ndarray) for t in made)


GOOD = dict(
    zip(
        ("drafted", "draft_probs", "target_probs", "uniforms"),
        verify_samples.make_inputs(2, 3, 9, device="cpu")[:4],
        strict=True,
    )
)


def having(name, place, value):
    """Arguments of which one element is another."""
    changed = GOOD[name].clone()
    changed[place] = value
    return {name: changed}


TARGET, DRAFT = GOOD["target_probs"], GOOD["draft_probs"]
BAD = {
    "drafted of rank 1": ({"drafted": GOOD["drafted"][0]}, ValueError, "drafted must have 2 dim"),
    "drafted int32": ({"drafted": GOOD["drafted"].int()}, TypeError, "drafted must be int64"),
    "a token too large": (
        having("drafted", (1, 2), 9), IndexError, r"drafted\[1, 2\] must be in 0\.\.8, got 9"),
    "a token below 0": (
        having("drafted", (0, 0), -1), IndexError, r"drafted\[0, 0\] must be in 0\.\.8, got -1"),
    "draft of rank 2": (
        {"draft_probs": DRAFT[0]}, ValueError, "draft_probs must have 3 dimensions"),
    "draft of other vocabulary": (
        {"draft_probs": DRAFT[..., :8]}, ValueError, "draft_probs must have size 9 in dimension 2"),
    "draft float64": ({"draft_probs": DRAFT.double()}, TypeError, "draft_probs must be float32"),
    "target is None": ({"target_probs": None}, TypeError, "target_probs must be .*got None"),
    "target without the last": (
        {"target_probs": TARGET[:, :3]}, ValueError, "target_probs must have size 4 in dimension"),
    "target with gaps": (
        {"target_probs": TARGET.repeat(1, 1, 2)[..., ::2]}, ValueError,
        "target_probs must be contiguous in its last dimension"),
    "no vocabulary": (
        {"target_probs": TARGET[..., :0], "draft_probs": DRAFT[..., :0]}, ValueError,
        "target_probs must have a token, got shape"),
    "too few uniforms": (
        {"uniforms": GOOD["uniforms"][:, :3]}, ValueError, "uniforms must have size 4 in dim"),
    "a uniform above 1": (
        having("uniforms", (0, 3), 1.5), ValueError, r"uniforms\[0, 3\] must be in 0\.\.1, got 1"),
    "a uniform of NaN": (
        having("uniforms", (1, 0), torch.nan), ValueError, r"uniforms\[1, 0\] must be in 0\.\.1"),
    "lengths int32": (
        {"lengths": torch.tensor([1, 2]).int()}, TypeError, "lengths must be int64"),
    "a length too large": (
        {"lengths": torch.tensor([1, 4])}, IndexError, r"lengths\[1\] must be in 0\.\.3, got 4"),
    "a negative probability": (
        having("target_probs", (1, slice(None), 0), -0.25), ValueError,
        r"target_probs\[1, \d\] must be finite and not negative, got -0.25"),
    "an infinite probability": (
        having("draft_probs", (0, slice(None), slice(None)), torch.inf), ValueError,
        r"draft_probs\[0, \d\] must be finite and not negative, got inf"),
    "probabilities of NaN": (
        having("target_probs", (0, slice(None), 8), torch.nan), ValueError,
        r"target_probs\[0, \d\] must be finite and not negative, got -?nan"),
    "nothing to draw from": (
        having("target_probs", (1, slice(None)), 0), ValueError,
        r"target_probs\[1, 0\] must not be all zeros, got a sum of 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match="adaptive::verify_samples: " + message):
        verify_samples(**{**GOOD, **changes})


def test_a_wrong_output_is_refused_by_name():
    accepted, tokens = verify_samples.outputs(**GOOD)
    with pytest.raises(ValueError, match="tokens must have size 4 in dimension 1"):
        verify_samples.into(accepted, tokens[:, :3], **GOOD)
