"""Audits of FFNs of a part of their neurons: what the report says beside what was computed."""

import pytest
import torch
from models import make, token_ids
from width_cases import always, policy

import adaptive
from adaptive import TokenRouting
from adaptive.layers.token_audit import TokenAudit, sampled


@torch.no_grad()
def test_audits_measure_the_error_of_the_ffn():
    model, ids = make("llama"), token_ids(tokens=30)
    mlp, taken = model.model.layers[1].mlp, []
    handle = mlp.register_forward_hook(lambda *call: taken.append((call[1][0], call[-1])))
    with adaptive.patch(model, policy(audit_every=2)) as patched:
        for _ in range(3):
            model(ids)
        audit = patched.report().widths.layers[1].audit
        handle.remove()
        assert audit.audits == 2
        x, made = (t.flatten(0, 1) for t in taken[0])
        with patched.disabled():
            dense = mlp(x)
        errors = (made - dense).norm(dim=1)
        assert audit.worst == pytest.approx(float((errors / dense.norm(dim=1)).max()), rel=1e-4)
        assert audit.error == pytest.approx(float(errors.norm() / dense.norm()), rel=1e-4)
        assert audit.tokens == 120
        assert "calls audited, 240 tokens: FFN outputs off by" in str(patched.report())
        values = patched.report().to_dict()["widths"]
        assert values["layers"]["1"]["audit"]["error"] == audit.error
        assert set(values["layers"]["0"]["tokens"]) == {"0", "32", "48", "96"}
        patched.reset_stats()
        model(token_ids(1, 200))
        assert patched.report().widths.audit.tokens == 2 * 64
    with adaptive.patch(model, policy()) as patched:
        model(ids)
        assert patched.report().widths.audit.error is None
        assert "none audited" in str(patched.report())


@torch.no_grad()
def test_audits_of_fixed_widths_and_of_what_is_exact():
    model, ids = make("llama"), token_ids(tokens=30)
    with adaptive.patch(model, TokenRouting(widths=0.5)) as patched:
        model(ids)
        half = patched.report().widths.audit.error
        assert 0.1 < half < 1.5
        assert patched.report().widths.used_share == 0.5
    with adaptive.patch(model, TokenRouting(widths=(0.5, 0.84))) as patched:
        model(ids)
        log = patched.report().widths
        assert log.layers[1].audit.error < log.layers[0].audit.error
    with adaptive.patch(model, policy(router=always(3), audit_every=1)) as patched:
        model(ids)
        assert patched.report().widths.audit.error < 1e-5
    with adaptive.patch(model, policy(router=always(0), audit_every=1)) as patched:
        model(ids)
        assert patched.report().widths.audit.error == 1
        assert patched.report().widths.audit.worst == 1
        model.model.layers[0].mlp.down_proj.weight[0, 90] = torch.nan
        model(ids)
        assert str(patched.report().widths.audit.worst) == "nan"


def test_samples_are_spread_and_audits_add_up():
    assert sampled(torch.arange(10)).tolist() == list(range(10))
    chosen = sampled(torch.arange(500, 1500))
    assert len(chosen.unique()) == 64
    assert (int(chosen[0]), int(chosen[-1])) == (500, 1499)
    assert int(chosen.diff().max()) - int(chosen.diff().min()) <= 1
    audit = TokenAudit()
    assert audit.error is None
    dense = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    audit.compare(dense, dense)
    assert (audit.error, audit.worst) == (0, 0)
    audit.compare(torch.tensor([[3.0, 3.0], [0.0, 0.0]]), dense)
    assert audit.worst == pytest.approx(0.2)
    assert audit.error == pytest.approx((1 / 50) ** 0.5)
    audit.compare(torch.ones(1, 2), torch.zeros(1, 2))
    assert audit.to_dict()["worst"] == float("inf")
    silent = TokenAudit()
    silent.compare(torch.zeros(1, 2), torch.zeros(1, 2))
    assert silent.error == 0
    silent.compare(torch.ones(1, 2), torch.zeros(1, 2))
    assert silent.error == float("inf")
