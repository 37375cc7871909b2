"""The benchmark of routed heads: which are kept, which tokens are judged, and its rows."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import make, token_ids

from bench import depths_quality, head_quality, record
from bench.lab import depths


def test_heads_of_which_nothing_is_lost_cost_nothing():
    model, batches = make("llama"), [token_ids(4, 40)]
    model.model.layers[1].self_attn.o_proj.weight.data[:, :64] = 0  # of both queries of head 0
    whole = depths_quality.nats(model, batches)
    for kept, same in ({1: 1}, True), ({1: 0}, False):
        found = head_quality.cost(model, head_quality.fixed(kept), batches)
        assert (abs(found - whole) < 1e-5) == same


def test_heads_and_layers_that_cost_least_come_first(monkeypatch):
    costs = {((0, 0),): 3.0, ((0, 1),): 2.0, ((1, 0),): 1.0, ((1, 1),): 4.0}
    monkeypatch.setattr(head_quality, "cost", lambda model, policy, _: costs[policy.heads])
    assert list(head_quality.tried(make("llama"), []).items()) == [(1, 0), (0, 1)]


@torch.no_grad()
def test_tokens_behind_prompts_are_judged(monkeypatch):
    monkeypatch.setattr(head_quality, "PROMPT", 7)
    model, ids, seen = make("llama"), token_ids(3, 20), []
    found = head_quality.after_prompts(model, lambda prompt: seen.append(prompt), [ids])
    logits = model(ids[:, :-1]).logits[:, 7:]
    assert found == pytest.approx(
        float(F.cross_entropy(logits.flatten(0, 1), ids[:, 8:].flatten()))
    )
    assert torch.equal(torch.cat(seen), ids[:, :7])
    heads = head_quality.fixed({0: 0})
    assert head_quality.after_prompts(model, lambda _: heads, [ids]) != pytest.approx(found)


def test_rows_are_whole(tmp_path, monkeypatch):
    tokens = np.random.default_rng(0).integers(3, 100, 2000).astype(np.uint16)
    monkeypatch.setattr(depths, "corpus", lambda split, work: (tokens, 5000))
    for module, name, value in (
        (depths_quality, "WINDOW", 16),
        (depths_quality, "WINDOWS", 4),
        (head_quality, "PROMPT", 8),
        (head_quality, "TRIED", 4),
        (head_quality, "SHARES", {0.75: 1, 0.5: 2}),
        (head_quality, "load", lambda _: (make("llama"), None)),
    ):
        monkeypatch.setattr(module, name, value)
    path = tmp_path / "result.json"
    head_quality.run(record.Recorder("head_quality", path, {}), tmp_path, 2)
    document = record.load(path)
    rows = document["rows"]
    assert [row["share"] for row in rows] == [1.0] + [0.75] * 6 + [0.5] * 6
    assert {len(row["layers"]) for row in rows if row["share"] == 0.75} == {1}
    dense = rows[0]["bits_per_byte"]
    for row in rows[1:]:
        if row["what"] == "sequence, longest":
            assert row["bits_per_byte"] is None
        else:
            assert row["more_bits"] == pytest.approx(row["bits_per_byte"] - dense, abs=2e-4)
    assert document["tuning"]["tokens"] == 2 * 8 * 16
