"""MixtureOfDepths under torch.autocast: scores are float32, and what runs fits what does not."""

import pytest
import torch
from models import PAD, token_ids
from routed_models import deep, forward, router

import adaptive
from adaptive import MixtureOfDepths

POLICIES = {
    "block": {"unit": "block"},
    "attention": {"unit": "attention"},
    "kept": {"unit": "attention", "kv": "kept"},
    "mlp": {"unit": "mlp"},
    "capacity": {"capacity": 0.5},
    "sequence": {"unit": "attention", "decide": "sequence"},
    "sequence block": {"decide": "sequence"},
    "weighted": {"weighted": True},
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_routed_pass_is_near_that_of_float32(name):
    model, ids = deep("llama"), token_ids(3, 16)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    given = {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
    policy = MixtureOfDepths(router=router(model), audit_every=None, **POLICIES[name])
    seen = []
    with adaptive.patch(model, policy) as patched:
        wanted = forward(model, given)[mask.bool()]
        ran = patched.report().routing.layers
        route = patched._root.__dict__["_adaptive_record"].routes
        numbers = route._numbers
        route._numbers = lambda index, logits: seen.append(logits.dtype) or numbers(index, logits)
        patched.reset_stats()
        with torch.autocast("cpu", torch.bfloat16):
            made = forward(model, given)[mask.bool()]
            assert {str(dtype) for dtype in seen} == {"torch.float32"}
            assert any(0 < layer.ran < layer.offered for layer in ran.values())
            error = (made.float() - wanted).norm() / wanted.norm()
            assert 1e-5 < error < 0.1
            out = model.generate(**given, max_new_tokens=3, do_sample=False, pad_token_id=PAD)
            assert out.shape == (3, 19)
