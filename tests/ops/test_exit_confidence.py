"""Laws of exit_confidence: what the softmax over all logits says, row by row."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from levels import DTYPES, EVERY, every_dtype, far_apart, set_for_a_test

from adaptive.ops import exit_confidence, skinny_linear

SLICE = 128  # of the vocabulary, on the CPU

level = set_for_a_test(EVERY)


def draw(rows, width, vocab, dtype, *, bias=True, scale=1.0, softcap=0.0, seed=0):
    return exit_confidence.make_inputs(
        rows, width, vocab, bias, scale, softcap, dtype=dtype, device="cpu", seed=seed
    )


def given_logits(logits):
    """Arguments whose logits are exactly these: float32, one row for each of at most 32 rows."""
    rows, vocab = logits.shape
    hidden = torch.eye(rows, max(32, -(-rows // 8) * 8))
    weight = torch.zeros(vocab, hidden.shape[1])
    weight[:, :rows] = logits.T
    return hidden, weight


def assert_right(made, hidden, weight, bias=None, scale=1.0, softcap=0.0):
    """Tokens whose logits are the highest, and the rest to what float32 sums cost."""
    tokens, top, lse, entropy = made
    logits = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    terms = F.linear(hidden.double().abs(), weight.double().abs()).amax() * abs(scale)
    logits = logits * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    bound = 16 * torch.finfo(torch.float32).eps * (1 + terms + abs(scale))
    best = logits.topk(min(2, logits.shape[1])).values
    places = tokens[:, : best.shape[1]]
    assert ((logits.gather(1, places) - best).abs() <= bound).all()
    assert ((top[:, : best.shape[1]].double() - best).abs() <= bound).all()
    assert (lse.double() - torch.logsumexp(logits, -1)).abs().max() <= bound
    true = torch.special.entr(torch.softmax(logits, -1)).sum(-1)
    # An error of the logits changes the entropy by at most their spread times itself.
    spread = (logits.amax(-1) - logits.amin(-1)).clamp(1, 20)
    assert ((entropy.double() - true).abs() <= bound * spread).all()


@every_dtype
@pytest.mark.parametrize("vocab", [1, 2, 3, 15, 17, 127, 128, 129, 255, 257, 1000])
def test_every_cut_of_the_vocabulary(vocab, dtype, level):
    for scale, softcap in ((1.0, 0.0), (-2.0, 0.0), (4.0, 3.0)):
        arguments = draw(3, 72, vocab, dtype, scale=scale, softcap=softcap)
        assert_right(exit_confidence(*arguments), *arguments)


@every_dtype
@pytest.mark.parametrize("rows", range(17))
def test_every_number_of_rows(rows, dtype, level):
    arguments = draw(rows, 328, 200, dtype, bias=rows % 2 == 0)
    made = exit_confidence(*arguments)
    assert [tuple(t.shape) for t in made] == [(rows, 2), (rows, 2), (rows,), (rows,)]
    if rows:
        assert_right(made, *arguments)


@given(
    rows=st.integers(1, 16),
    steps=st.integers(4, 20),
    vocab=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    scale=st.floats(-10, 10, width=32),
    softcap=st.sampled_from([0.0, 0.5, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_a_row_does_not_depend_on_the_others(rows, steps, vocab, dtype, scale, softcap, seed):
    arguments = draw(rows, 8 * steps, vocab, dtype, scale=scale, softcap=softcap, seed=seed)
    made = exit_confidence(*arguments)
    hidden, *others = arguments
    alone = [exit_confidence(row[None], *others) for row in hidden]
    for whole, parts in zip(made, zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


@given(
    values=st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, -0.0, 7.0])),
        min_size=1,
        max_size=4,
    ),
    vocab=st.integers(1, 2 * SLICE + 3),
    masked=st.sets(st.integers(1, 2 * SLICE + 3)),
    seed=st.integers(0, 2**16),
)
def test_laws_of_the_softmax_over_given_logits(values, vocab, masked, seed):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(values), vocab, generator=rng)
    for row, listed in zip(logits, values, strict=True):
        places = torch.randint(0, vocab, (len(listed),), generator=rng)
        row[places] = torch.tensor(listed, dtype=torch.float32)
    bias = torch.zeros(vocab)
    bias[[token for token in masked if token < vocab]] = -math.inf
    tokens, top, lse, entropy = exit_confidence(*given_logits(logits), bias)
    logits = logits + bias
    ranked = torch.sort(logits, descending=True, stable=True)
    assert torch.equal(tokens[:, :2], F.pad(ranked.indices[:, :2], (0, int(vocab == 1)), value=-1))
    assert torch.equal(tokens[:, 0], logits.argmax(-1))
    seen = tokens >= 0
    assert torch.equal(top[seen], logits.gather(1, tokens.clamp(min=0))[seen])
    assert (top[:, 0] >= top[:, 1]).all()
    slack = 1e-5 * (1 + top[:, 0].abs())
    assert (lse >= top[:, 0] - slack).all()
    assert (lse <= top[:, 0] + math.log(vocab) + slack).all()
    assert (entropy >= -1e-5).all()
    assert (entropy <= math.log(vocab) + 1e-5).all()
    torch.testing.assert_close(lse.double(), logits.double().logsumexp(-1), rtol=2e-6, atol=2e-6)
    true = torch.special.entr(torch.softmax(logits.double(), -1)).sum(-1)
    torch.testing.assert_close(entropy.double(), true, rtol=1e-5, atol=1e-5)


@given(vocab=st.integers(2, 400), shift=st.floats(-50, 50, width=32), seed=st.integers(0, 2**16))
def test_a_constant_moves_lse_and_changes_nothing_else(vocab, shift, seed):
    hidden, weight, *_ = draw(2, 64, vocab, torch.float32, bias=False, seed=seed)
    plain = exit_confidence(hidden, weight)
    moved = exit_confidence(hidden, weight, torch.full((vocab,), shift))
    close = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(moved[2], plain[2] + shift, **close)
    torch.testing.assert_close(moved[3], plain[3], **close)
    torch.testing.assert_close(moved[1], plain[1] + shift, **close)


def test_even_logits_have_the_entropy_of_their_number(level):
    for vocab in (1, 2, 128, 129, 100_000):
        weight = torch.zeros(1, 32).expand(vocab, -1)
        tokens, top, lse, entropy = exit_confidence(torch.ones(2, 32), weight)
        assert tokens.tolist() == [[0, 1 if vocab > 1 else -1]] * 2
        assert top.tolist() == [[0, 0 if vocab > 1 else -math.inf]] * 2
        for made in (lse, entropy):
            torch.testing.assert_close(made, torch.full((2,), math.log(vocab)))


@every_dtype
def test_the_number_of_threads_changes_no_bit(dtype):
    arguments = draw(5, 1032, 3001, dtype)
    before = torch.get_num_threads()
    made = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        made.append(exit_confidence(*arguments))
    torch.set_num_threads(before)
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))


@every_dtype
def test_the_logits_are_those_of_skinny_linear(dtype, level):
    """The same products in the same order; where they are float32, to the bit."""
    hidden, weight, bias, *_ = draw(7, 136, 777, dtype)
    logits = skinny_linear(hidden, weight, bias)
    tokens, top, *_ = exit_confidence(hidden, weight, bias)
    assert torch.equal(top.to(dtype), logits.gather(1, tokens))


@every_dtype
def test_strides_are_followed_and_nothing_between_rows_is_read(dtype, level):
    hidden, weight, bias, *_ = draw(5, 104, 199, dtype)
    expected = exit_confidence(hidden, weight, bias)

    made = exit_confidence(far_apart(hidden, 131), far_apart(weight, 113), bias)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


@pytest.mark.parametrize("places", [[0, 1], [5, 127, 128], [126, 130], [128, 256], [256, 299, 300]])
def test_of_equal_logits_the_lower_tokens_win(places, level):
    logits = torch.randn(3, 301, generator=torch.Generator().manual_seed(0))
    logits[:, places] = 9.0
    tokens, top, *_ = exit_confidence(*given_logits(logits))
    assert tokens.tolist() == [places[:2]] * 3
    assert (top == 9).all()


def test_a_logit_that_is_not_finite(level):
    hidden, weight, bias, *_ = draw(3, 64, 300, torch.float32)
    for values in ({7: math.nan}, {200: math.nan, 140: math.nan, 3: math.inf}, {299: math.nan}):
        broken = bias.clone()
        broken[list(values)] = torch.tensor(list(values.values()))
        tokens, top, lse, entropy = exit_confidence(hidden, weight, broken)
        first = min(k for k, v in values.items() if math.isnan(v))
        assert (tokens[:, 0] == first).all()
        assert torch.equal(tokens, exit_confidence.reference(hidden, weight, broken)[0])
        for made in (top[:, 0], lse, entropy):
            assert made.isnan().all()
    for value in (math.inf, -math.inf):
        for places in ([9, 130], list(range(128, 256)), list(range(300))):
            broken = bias.clone()
            broken[places] = value
            made = exit_confidence(hidden, weight, broken)
            right = exit_confidence.reference(hidden, weight, broken)
            assert torch.equal(made[0], right[0])
            for own, true in zip(made[1:], right[1:], strict=True):
                torch.testing.assert_close(own, true, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_row_of_nan_does_not_touch_the_others(level):
    hidden, weight, bias, *_ = draw(4, 72, 300, torch.bfloat16)
    expected = exit_confidence(hidden, weight, bias)
    hidden[1, 70] = torch.nan
    made = exit_confidence(hidden, weight, bias)
    assert made[0][1].tolist() == [0, 1]
    assert all(t[1].isnan().all() for t in made[1:])
    rest = [0, 2, 3]
    assert all(torch.equal(a[rest], b[rest]) for a, b in zip(made, expected, strict=True))


def test_logits_far_apart_neither_overflow_nor_vanish(level):
    far = torch.tensor([3e38, -3e38, 0.0, 1e38]).repeat(40)[None]
    tokens, top, lse, entropy = exit_confidence(*given_logits(far))
    assert tokens.tolist() == [[0, 4]]
    assert top.tolist() == [[far[0, 0]] * 2]
    torch.testing.assert_close(lse, far[:, 0])
    torch.testing.assert_close(entropy, torch.tensor([math.log(40)]))


def test_numpy_comes_back_as_numpy():
    hidden, weight, *_ = (t.numpy() for t in draw(2, 64, 9, torch.float32)[:2])
    tokens, top, lse, _ = exit_confidence(hidden, weight)
    assert isinstance(tokens, np.ndarray)
    logits = hidden @ weight.T
    assert (tokens[:, 0] == logits.argmax(-1)).all()
    np.testing.assert_allclose(top[:, 0], logits.max(-1), rtol=1e-5)
    np.testing.assert_allclose(lse, np.log(np.exp(logits).sum(-1)), rtol=1e-5)


def test_compiled_is_what_eager_is():
    arguments = draw(2, 64, 300, torch.float32, scale=2.0, softcap=5.0)
    with torch.no_grad():
        compiled = torch.compile(
            lambda *a: exit_confidence(*a), backend="aot_eager", fullgraph=True
        )
        for made, right in zip(compiled(*arguments), exit_confidence(*arguments), strict=True):
            assert torch.equal(made, right)
