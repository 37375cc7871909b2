"""Gemma 3n, whose last layers share keys and values: exact when patched, and nothing else."""

import pytest
import torch
from gemma3n_models import gemma3n
from models import greedy, padded, token_ids

import adaptive
from adaptive import _native


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_and_tokens_are_stocks(implementation):
    model, inputs = gemma3n(implementation=implementation), padded(tokens=24)
    stock, tokens = model(**inputs).logits, greedy(model, inputs)
    with adaptive.patch(model) as patched:
        before = _native.calls().get("decode_attention:cpu", 0)
        torch.testing.assert_close(greedy(model, inputs), tokens)
        assert _native.calls()["decode_attention:cpu"] > before
        found = patched.verify(inputs, new_tokens=16)  # beyond the window of 8
        assert found.max_logit_error < 1e-4 * found.max_logit
        with patched.disabled():
            assert torch.equal(model(**inputs).logits, stock)
    assert torch.equal(model(**inputs).logits, stock)


@torch.no_grad()
def test_the_bare_model_is_patched_too():
    model, ids = gemma3n().model, token_ids(tokens=12)[:1]
    stock = model(ids).last_hidden_state
    with adaptive.patch(model):
        torch.testing.assert_close(model(ids).last_hidden_state, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "policy",
    [
        adaptive.LocalAttention(window=8),
        adaptive.EarlyExit(layers=(2,), threshold=0.9),
        adaptive.SelfSpeculative(exit_layer=2),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_policies_that_are_not_exact_are_refused(policy):
    model = gemma3n()
    name = type(policy).__name__
    with pytest.raises(adaptive.UnsupportedModel, match=f"{name} does not fit gemma3n: its last"):
        adaptive.patch(model, policy)
    assert not adaptive.check(model, policy).ok
    assert adaptive.check(model, adaptive.Exact(stock_layers=(0,))).ok


def test_the_multimodal_model_points_to_its_language_model():
    class Multimodal(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"model_type": "gemma3n"})()

    from adaptive.adapters import family_for

    with pytest.raises(adaptive.UnknownFamily, match=r"patch its language model"):
        family_for(Multimodal())
