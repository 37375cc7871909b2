"""tune_heads: what heads add is measured, and routers tell it; the model stays as it is."""

import copy
import json

import pytest
import torch
from head_cases import FOUR, Masked, query_of
from models import make, token_ids

import adaptive
from adaptive.train import tune_heads


def batches(count, seed=0):
    return [token_ids(2, 24, seed + i) for i in range(count)]


@torch.no_grad()
def norms_by_hand(model, layer, batch):
    """States before attention, and how long each KV head's part of its output is."""
    attention, seen = model.model.layers[layer].self_attn, {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name, module in (("q", query_of(attention)), ("o", attention.o_proj))
    ]
    model(**batch) if isinstance(batch, dict) else model(batch)
    for handle in handles:
        handle.remove()
    parts = []
    for head in range(4):
        alone = torch.zeros_like(seen["o"])
        alone[..., head * 64 : head * 64 + 64] = seen["o"][..., head * 64 : head * 64 + 64]
        made = torch.nn.functional.linear(alone, attention.o_proj.weight)
        parts.append(made.norm(dim=-1).flatten())
    return seen["q"].flatten(0, 1), torch.stack(parts, 1)


@pytest.mark.parametrize("case", ["qwen2", "phi3"])
def test_routers_are_the_least_squares_of_what_heads_add(case):
    model, given = make(case, **FOUR), batches(12)
    before = copy.deepcopy(model.state_dict())
    found = tune_heads(model, given, steps=12, top_k=2, layers=(1,), ridge=1e-9)
    pairs = [norms_by_hand(model, 1, ids) for ids in given]
    states, norms = (torch.cat(part).double() for part in zip(*pairs, strict=True))
    assert found.importance[1] == pytest.approx(norms.mean(0).tolist(), rel=1e-4)
    ones = torch.cat([states, torch.ones(len(states), 1)], 1)
    left = norms - ones @ torch.linalg.lstsq(ones, norms).solution
    explained = 1 - left.square().sum() / (norms - norms.mean(0)).square().sum()
    assert 0.1 < found.explained[1] == pytest.approx(float(explained), abs=1e-3)
    weight, bias = found.policy.router.of(1, torch.device("cpu"))
    error = norms - (states @ weight.T.double() + bias)
    assert float(error.square().sum()) == pytest.approx(float(left.square().sum()), rel=1e-3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_policies_run_and_choose_better_than_others():
    model, given = make("llama", **FOUR), batches(10)
    for layer in model.model.layers:  # one head that matters more than others, and one that less
        layer.self_attn.o_proj.weight.data[:, 64:128] *= 3
        layer.self_attn.o_proj.weight.data[:, 192:] *= 0.1
    layerwise = tune_heads(model, given, steps=10, top_k=2, decide="layer")
    tokenwise = tune_heads(model, given, steps=10, top_k=2)
    worst = adaptive.HeadRouting(heads=((0, 0), (0, 3), (1, 0), (1, 3)))
    assert (0, 1) in layerwise.policy.heads
    assert (1, 3) not in layerwise.policy.heads
    errors = []
    for policy in (tokenwise.policy, layerwise.policy, worst):
        with adaptive.patch(model, policy) as patched, torch.no_grad():
            model(given[0])
            errors.append(patched.report().heads.error[0])
    assert errors[0] <= errors[1] + 0.02
    assert errors[1] < errors[2] - 0.1
    values = json.loads(json.dumps(tokenwise.to_dict()))
    assert adaptive.Policy.from_dict(values["policy"]) == tokenwise.policy
    assert "480 tokens" in str(tokenwise)


@torch.no_grad()
def test_heads_chosen_by_a_prompt_decode_its_cache():
    model, ids = make("llama", **FOUR), token_ids(1, 30)
    caches = [model(ids[:, :20], use_cache=True).past_key_values for _ in range(2)]
    found = tune_heads(model, [ids[:, :20]], steps=1, top_k=2, decide="layer")
    reference, stock = Masked(model, found.policy), model(ids).logits
    with adaptive.patch(model, found.policy):
        for part in ids[:, 20:].split([1, 1, 8], 1):
            made, wanted = (
                which(part, past_key_values=cache).logits
                for which, cache in zip((model, reference), caches, strict=True)
            )
            torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made, stock[:, 22:], atol=1e-2)


def test_padding_teaches_nothing():
    model, ids = make("llama", **FOUR), token_ids(2, 24)
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    alone = tune_heads(model, [ids[:, :20]], steps=1, top_k=1)
    padded = tune_heads(model, [{"input_ids": ids, "attention_mask": mask}], steps=1, top_k=1)
    assert padded.tokens == alone.tokens == 40
    for layer in (0, 1):
        assert padded.importance[layer] == pytest.approx(alone.importance[layer], rel=1e-4)


BAD = {
    "steps": ({"steps": 0}, "steps must be a whole number from 1 on, got 0"),
    "top_k": ({"top_k": 5}, "top_k must be from 1 to the 4 KV heads of layer 0, got 5"),
    "decide": ({"decide": "sequence"}, "decide must be one of token, layer, got 'sequence'"),
    "ridge": ({"ridge": 0}, "ridge must be positive, got 0"),
    "layers": ({"layers": (2,)}, "layers must be below the model's 2 layers, got 2"),
    "few": ({"steps": 3}, "batches must hold as many as steps=3, got 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_leave_the_model_as_it_was(name):
    fields, message = BAD[name]
    model = make("llama", **FOUR).train()
    with pytest.raises(ValueError, match="adaptive") as found:
        tune_heads(model, batches(2), **{"steps": 2, "top_k": 2, **fields})
    assert message in str(found.value)
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_models_it_cannot_tune():
    with pytest.raises(adaptive.UnsupportedModel, match="layer 0 has no 'q_proj' that is a plain"):
        tune_heads(make("gpt2"), batches(1), steps=1, top_k=1)
    model = make("llama", **FOUR)
    with adaptive.patch(model), pytest.raises(adaptive.PatchConflict, match="is patched"):
        tune_heads(model, batches(1), steps=1, top_k=1)
    model.model.layers[1].self_attn.v_proj.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="what heads add must be finite"):
        tune_heads(model, batches(1), steps=1, top_k=1)
