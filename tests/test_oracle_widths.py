"""oracle_widths: per token the best of all patterns at a budget, and a model left as it was."""

import itertools

import pytest
import torch
from models import make, token_ids
from torch.nn import functional
from width_cases import always, masked

import adaptive
from adaptive import TokenRouting
from adaptive.oracle_widths import _pick

WIDTHS = (0, 0.5, 1)
FIELDS = {"widths": WIDTHS, "budget": 0.5, "progress": False}


def losses(model, ids):
    logits = model(ids).logits[:, :-1]
    return functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


@torch.no_grad()
def test_it_tries_every_pattern_and_keeps_the_budget():
    model, ids = make("llama"), token_ids(tokens=16)
    stock = model(ids).logits
    found = adaptive.oracle_widths(model, ids, **FIELDS)
    assert torch.equal(model(ids).logits, stock)
    assert found.patterns == 9
    assert found.share <= 0.5
    assert found.dense_loss == pytest.approx(float(losses(model, ids).mean()), rel=1e-4)
    table = {}
    for pattern in itertools.product(range(3), repeat=2):
        other = model
        for layer, choice in enumerate(pattern):
            routers = always(choice, choices=3, layers=(layer,))
            part = masked("llama", routers, WIDTHS)
            other = part if other is model else _both(other, part, layer)
        table[pattern] = losses(other, ids)
    affordable = {p: float(t.mean()) for p, t in table.items() if sum(p) <= 2}
    assert found.fixed == min(affordable, key=affordable.get)
    assert found.fixed_loss == pytest.approx(min(affordable.values()), rel=1e-4)
    own = [found.choices[:, row, at].tolist() for row in range(2) for at in range(15)]
    foreseen = [table[tuple(p)].flatten()[i] for i, p in enumerate(own)]
    assert found.foreseen == pytest.approx(float(sum(foreseen) / 30), rel=1e-4)
    assert found.foreseen < found.fixed_loss
    assert found.share == pytest.approx(sum(map(sum, own)) / (30 * 2 * 2))
    assert f"loss {found.loss:.3f}" in str(found)
    assert found.to_dict()["fixed"] == list(found.fixed)


def _both(first, second, layer):
    """The first model with a layer of the second."""
    first.model.layers[layer] = second.model.layers[layer]
    return first


@torch.no_grad()
def test_the_mixed_loss_is_that_of_the_mixed_model():
    model, ids = make("llama"), token_ids(tokens=12)
    found = adaptive.oracle_widths(model, ids, **FIELDS)
    other = masked("llama", always(0, choices=3), WIDTHS)
    for at, layer in enumerate(other.model.layers):
        own = found.choices[at]
        layer.mlp.act_fn.register_forward_hook(
            lambda module, args, out, own=own: (
                out * (torch.arange(96) < torch.tensor([0, 48, 96])[own][..., None])
            )
        )
        del layer.mlp.forward
    assert found.loss == pytest.approx(float(losses(other, ids).mean()), rel=1e-4)


@torch.no_grad()
def test_more_patterns_than_can_be_tried():
    model, ids = make("llama", num_hidden_layers=6), token_ids(tokens=8)
    found = adaptive.oracle_widths(model, ids, **FIELDS, patterns=20, seed=3)
    again = adaptive.oracle_widths(model, ids, **FIELDS, patterns=20, seed=3)
    assert found == again
    assert torch.equal(found.choices, again.choices)
    assert 3 < found.patterns <= 20
    assert found.share <= 0.5
    some = adaptive.oracle_widths(model, ids, **FIELDS, layers=(1, 4))
    assert some.patterns == 9
    assert some.layers == (1, 4)


def test_nothing_drops_out():
    model, ids = make("llama", attention_dropout=0.5), token_ids(tokens=12)
    found = adaptive.oracle_widths(model, ids, **FIELDS)
    model.train()
    assert adaptive.oracle_widths(model, ids, **FIELDS) == found
    assert all(module.training for module in model.modules())


def test_prices_meet_the_budget():
    rng = torch.Generator().manual_seed(0)
    losses, costs = torch.rand(7, 3, 50, generator=rng), torch.linspace(0, 1, 7).double()
    means = []
    for budget in (0, 0.1, 0.3, 0.45, 1):
        picked = _pick(losses, costs, budget)
        share = float(costs[picked].mean())
        assert share <= budget
        assert budget > 0.4 or share > budget - 0.02
        means.append(float(losses.gather(0, picked[None]).mean()))
    assert means == sorted(means, reverse=True)
    assert torch.equal(_pick(losses, costs, 1.0), losses.argmin(0))
    with pytest.raises(ValueError, match=r"the narrowest pattern, 0\.1667, got 0\.1"):
        _pick(losses[1:], costs[1:], 0.1)


BAD = {
    "budget": ({"budget": 1.5}, ValueError, "budget must be a share from 0 to 1, got 1.5"),
    "patterns": ({"patterns": 0}, ValueError, "patterns must be a whole number from 1 on, got 0"),
    "widths": ({"widths": (0.5,)}, ValueError, "TokenRouting.widths must be ascending shares"),
    "layers": ({"layers": (1, 2)}, ValueError, "layers must be below the model's 2 layers"),
    "twice": ({"layers": (1, 1)}, ValueError, "layers must be ascending layer numbers"),
    "descending": ({"layers": (1, 0)}, ValueError, "layers must be ascending layer numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    fields, error, message = BAD[name]
    model = make("llama")
    with pytest.raises(error, match=message):
        adaptive.oracle_widths(model, token_ids(tokens=5), **{**FIELDS, **fields})


def test_bad_tokens_and_patched_models_are_refused():
    model = make("llama")
    with pytest.raises(TypeError, match="ids must be a tensor of whole numbers, got list"):
        adaptive.oracle_widths(model, [1, 2], **FIELDS)
    with pytest.raises(ValueError, match=r"2 tokens or more, got \[1, 1\]"):
        adaptive.oracle_widths(model, token_ids(1, 1), **FIELDS)
    with adaptive.patch(model, TokenRouting(widths=0.5)), pytest.raises(adaptive.PatchConflict):
        adaptive.oracle_widths(model, token_ids(), **FIELDS)
