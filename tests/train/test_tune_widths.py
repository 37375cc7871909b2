"""tune_widths: routers that learn where FFNs are needed, and a model left as it was."""

import pytest
import torch
from models import make, token_ids
from width_cases import always

import adaptive
from adaptive import TokenRouting
from adaptive.layers.feed_forward import ffn_at
from adaptive.train import tune_widths
from adaptive.train.tune_widths import _Choices, _MaskedForward

FIELDS = {"widths": (0, 0.5, 1), "steps": 3, "progress": False}


def batches(count, **sizes):
    return [token_ids(**sizes, seed=seed) for seed in range(count)]


def _tensors(router):
    return torch.tensor(router.weight), torch.tensor(router.bias)


def test_the_model_while_learning_is_the_patched_one():
    """The masked forward of learning and the rows and slices of the policy: the same logits."""
    model, ids = make("llama", mlp_bias=True), token_ids(tokens=18)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("gate_proj", "up_proj", "down_proj"):
                getattr(layer.mlp, name).bias.normal_()
    found = tune_widths(model, batches(1), **{**FIELDS, "steps": 1}).policy
    with torch.no_grad():
        with adaptive.patch(model, found) as patched:
            expected = model(ids).logits
            share = patched.report().widths.used_share
        choices = _Choices(found.layers, found.choices, *_tensors(found.router))
        for index, layer in enumerate(model.model.layers):
            ffn = ffn_at(model, f"model.layers.{index}.mlp", index)
            layer.mlp.forward = _MaskedForward(ffn, index, choices)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert float(torch.stack(choices.shares).mean()) == pytest.approx(share)


def test_shares_move_to_the_target_and_nothing_else_changes():
    model = make("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for target in (0.1, 0.95):
        found = tune_widths(
            model, batches(40), **{**FIELDS, "steps": 40}, target=target, strength=100.0
        )
        away = [abs(share - target) for share in found.shares]
        assert away[-1] < 0.5 * away[0]
        assert len(found.losses) == found.steps == 40
        assert isinstance(found.policy, TokenRouting)
        assert found.policy.choices == (0, 0.5, 1)
        assert found.to_dict()["policy"]["kind"] == "TokenRouting"
        assert "40 steps" in str(found)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_routers_learn_which_tokens_need_a_wide_ffn():
    """Neurons of the second half serve half of the tokens: those get them, and the others not."""
    torch.manual_seed(0)
    width, kind = 16, torch.tensor([1.0, -1.0]).repeat(32)
    x = torch.randn(1, 64, width)
    x[0, :, 0] = kind * 2
    weight = torch.zeros(1, 2, width, requires_grad=True)
    bias = torch.zeros(1, 2, requires_grad=True)
    choices = _Choices((0,), (0.5, 1.0), weight, bias)
    optimizer = torch.optim.Adam([weight, bias], lr=0.05)
    wanted = (kind > 0).float()
    for _ in range(60):
        choices.shares.clear()
        used, _ = choices.of(0, x, 64)
        loss = (used[0, :, -1] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(used[0, :, -1].round(), wanted)


def test_padding_counts_nothing():
    weight = torch.tensor(always(2, choices=3, width=4).weight)
    weight[:, 2, 0] = 1.0
    choices = _Choices((0, 1), (0, 0.5, 1), weight, torch.zeros(2, 3))
    x = torch.tensor([[[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]])
    used, some = choices.of(0, x, 64)
    assert used.sum(-1).tolist() == [[64, 0]]
    assert some.flatten().tolist() == [1, 0]
    choices.mask = torch.tensor([[0, 1]])
    choices.of(0, x, 64)
    assert [float(share) for share in choices.shares] == [0.5, 0.0]


BAD = {
    "steps": ({"steps": 0}, "steps must be a whole number from 1 on, got 0"),
    "target": ({"target": 1.5}, r"target must be in \[0, 1\], got 1.5"),
    "strength": ({"strength": -1}, "strength must be 0 or more"),
    "rate": ({"learning_rate": 0}, "learning_rate must be positive, or None"),
    "widths": ({"widths": (1, 0.5)}, "TokenRouting.widths must be ascending shares"),
    "one width": ({"widths": (1,)}, "TokenRouting.widths must be ascending shares"),
    "layers": ({"layers": (1, 2)}, "layers must be below the model's 2 layers, got 2"),
    "descending": ({"layers": (1, 0)}, "layers must be ascending layer numbers"),
    "batches": ({"steps": 4}, "batches must hold as many as steps=4, got 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused(name):
    fields, message = BAD[name]
    model = make("llama")
    with pytest.raises(ValueError, match=message):
        tune_widths(model, batches(3), **{**FIELDS, **fields})
    assert all("forward" not in vars(module) for module in model.modules())


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(adaptive.UnsupportedModel, match="layer 0 has an FFN, Phi3MLP, that is no"):
        tune_widths(make("phi3"), batches(3), **FIELDS)
    model = make("llama")
    with adaptive.patch(model), pytest.raises(adaptive.PatchConflict):
        tune_widths(model, batches(3), **FIELDS)
