"""Policies under torch.compile: sets are chosen within the graph, the rest is refused by name."""

import models
import pytest
import torch
from transformers import DynamicCache

import adaptive

TIDAL = {"min_context": 8, "budget": 20, "sinks": 2, "recent": 4, "select_layers": (1, 3)}
REFUSED = {
    "layers whose heads drop keys": adaptive.StreamingLLM(window=8, sinks=2),
    "selection of pages": adaptive.Quest(
        min_context=8, budget=32, page_size=4, sinks=1, recent=4, dense_layers=(0,)
    ),
    r"TidalDecode\(compensate=True\)": adaptive.TidalDecode(
        **TIDAL, dense_layers=(0,), compensate=True
    ),
    r"TidalDecode\(correct_every=": adaptive.TidalDecode(
        **TIDAL, dense_layers=(0,), correct_every=4
    ),
}


def decode(model, step, ids, start):
    """Logits of the tokens from ``start`` on, one by one, after a dense prefill."""
    cache = DynamicCache(config=model.config)
    model(ids[:, :start], past_key_values=cache)
    steps = [step(ids[:, i : i + 1], past_key_values=cache) for i in range(start, ids.shape[1])]
    return torch.cat([out.logits for out in steps], 1)


@pytest.fixture(autouse=True)
def _fresh():
    with torch.no_grad():
        yield


def test_choosing_and_reusing_is_one_graph_with_the_same_result():
    model, ids = models.make("llama", num_hidden_layers=5), models.token_ids(2, 46)
    policy = adaptive.TidalDecode(**TIDAL, dense_layers=(0,))
    with adaptive.patch(model, policy) as patched:
        eager = decode(model, model, ids, 40)
        counted = [dict(layer.paths) for layer in patched.report().layers]
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(decode(model, compiled, ids, 40), eager)
        assert [dict(layer.paths) for layer in patched.report().layers] == counted
        with patched.disabled():
            dense = decode(model, model, ids, 40)
    assert not torch.equal(eager, dense)


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_graph_cannot_do_is_refused_by_name(what):
    model, ids = models.make("llama", num_hidden_layers=5), models.token_ids(1, 42)
    with adaptive.patch(model, REFUSED[what]):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=f"adaptive: {what}.* cannot run under torch.compile"):
            decode(model, compiled, ids, 40)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (REFUSED["layers whose heads drop keys"], "layers whose heads drop keys cannot run"),
        (adaptive.LocalAttention(window=8, sinks=2), "cache was reduced by a policy"),
    ],
    ids=["windows", "a cache that dropped keys"],
)
def test_it_is_refused_where_graphs_may_break_too(policy, words):
    """PyTorch swallows what is raised while it makes a graph, and goes on without one."""
    model, ids = models.make("llama"), models.token_ids(1, 130)
    with adaptive.patch(model, policy):
        want = decode(model, model, ids, 128)
        with pytest.raises(NotImplementedError, match=words):
            decode(model, torch.compile(model, backend="eager"), ids, 128)
        assert torch.equal(decode(model, model, ids, 128), want)
