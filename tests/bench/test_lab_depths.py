"""The small Mixture-of-Depths model of the lab: it trains as the policy runs it."""

import json

import torch
import torch.nn.functional as F

import adaptive
from bench.lab import depths


def tiny():
    recipe = json.loads(depths.RECIPE.read_text())
    recipe["routed"] = {**recipe["routed"], "layers": 4, "routed": [1, 3]}
    return recipe, *depths.build(recipe, "routed")


def test_training_computes_what_the_policy_does():
    recipe, model, routers = tiny()
    capacity = recipe["routed"]["capacity"]
    ids = torch.randint(3, 1000, (3, 40), generator=torch.Generator().manual_seed(0))
    policy = adaptive.MixtureOfDepths.mod(routers.export(), capacity=capacity)
    assert policy.decode == "predictor"
    with torch.no_grad():
        x, side, right = depths.hidden_states(model, routers, ids, capacity)
        norm = model.model.norm
        wanted = F.linear(F.rms_norm(x, (x.shape[-1],), norm.weight, 1e-5), model.lm_head.weight)
        dense = model.eval()(ids).logits
        with adaptive.patch(model, policy) as patched:
            ours = model(ids).logits
            assert patched.report().routing.share == capacity
    assert torch.allclose(ours, wanted, atol=1e-5)
    assert not torch.allclose(dense, wanted, atol=1e-2)
    assert float(side) > 0
    assert 0 <= float(right) <= 1


def test_predictors_and_side_losses_teach_the_model_nothing():
    recipe, model, routers = tiny()
    ids = torch.randint(3, 1000, (2, 16), generator=torch.Generator().manual_seed(0))
    _, side, _ = depths.hidden_states(model, routers, ids, recipe["routed"]["capacity"])
    side.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(bool(parameter.grad.any()) for parameter in routers.parameters())


def test_both_kinds_cost_the_same():
    """Layers that all tokens run, and those of the routed that a share of them does."""
    recipe = json.loads(depths.RECIPE.read_text())
    routed, dense = recipe["routed"], recipe["dense"]["layers"]
    kept = len(routed["routed"])
    assert routed["layers"] - kept + kept * routed["capacity"] == dense
