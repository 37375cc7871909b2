"""The small Mixture-of-Depths model of the lab: it trains as the policy runs it."""

import json

import torch
import torch.nn.functional as F

import adaptive
from bench.depths_quality import nats
from bench.lab import data, depths


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


def shipped():
    from tokenizers import Tokenizer

    text = data.heldout_texts()[0][:20000]
    ids = Tokenizer.from_file(str(depths.HERE / "model" / "tokenizer.json")).encode(text).ids
    return torch.tensor(ids[1 : 4 * 129 + 1]).reshape(4, 129)


def test_the_shipped_model_decodes_causally():
    """By threshold and by predictor it loses little against the best of each sequence."""
    model, router = depths.load("routed")
    ids = shipped()
    common = {"router": router, "weighted": True, "audit_every": None}
    ways = {
        "ahead": (adaptive.MixtureOfDepths(capacity=0.25, **common), 0),
        "threshold": (adaptive.MixtureOfDepths(threshold=0.5, **common), 0),
        "predictor": (adaptive.MixtureOfDepths.mod(router, capacity=0.25), 1),
    }
    lost, shares = {}, {}
    for name, (policy, first) in ways.items():
        with adaptive.patch(model, policy) as patched:
            lost[name] = nats(model, [ids], first)
            shares[name] = patched.report().routing.share
    assert lost["ahead"] < 5.5  # of 6.9 that a guess would lose
    assert max(lost.values()) < min(lost.values()) + 0.3
    assert all(0.1 < share < 0.45 for share in shares.values())
    dense = nats(depths.load("dense")[0], [ids])
    assert abs(dense - lost["ahead"]) < 0.5


def test_the_shipped_model_generates_as_it_reads():
    model, router = depths.load("routed")
    ids = shipped()[:2, :24]
    policy = adaptive.MixtureOfDepths(router=router, threshold=0.5, weighted=True)
    with adaptive.patch(model, policy), torch.no_grad():
        wanted = model(ids).logits
        cache, steps = None, []
        for column in ids.split(1, 1):
            out = model(column, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, 1), wanted, atol=1e-3)


def test_the_weights_stay_small():
    files = [path for path in depths.MODELS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4_000_000
