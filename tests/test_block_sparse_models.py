"""BlockSparsePrefill on whole models: what it equals, what it leaves alone, what it counts."""

import copy

import pytest
import torch
from models import greedy, make, padded, token_ids

import adaptive
from adaptive.errors import UnsupportedModel
from adaptive.layers import block_sparse
from adaptive.ops._local_keys import seen_keys
from adaptive.ops.block_sparse_attention import listed_blocks
from adaptive.policy import BlockSparsePrefill, Exact, Plan, Quest, RazorAttention, TidalDecode

TOKENS = 150
CASES = ["llama", "gpt_neox", "gpt2", "qwen3", "granite", "olmo2", "phi3", "smollm3", "mixtral"]
PATTERNS = {
    "selected": {"budget": 4},
    "by mass": {"mass": 0.5},
    "heads apart": {"mass": 0.5, "per_head": True},
    "vertical_slash": {"pattern": "vertical_slash", "budget": 4},
    "a_shape": {"pattern": "a_shape", "budget": 3},
}
every_pattern = pytest.mark.parametrize("fields", PATTERNS.values(), ids=PATTERNS)


def policy(**fields):
    return BlockSparsePrefill(
        **{"block": 16, "sinks": 4, "recent": 0, "dense_tail": 16, "min_context": 1, **fields}
    )


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def chunked(model, ids, size):
    """Logits of a prompt that is read in chunks of ``size`` tokens."""
    made, cache = [], None
    for start in range(0, ids.shape[1], size):
        part = ids[:, start : start + size]
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        made.append(out.logits)
    return torch.cat(made, 1)


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", ["selected", "vertical_slash", "a_shape"])
@pytest.mark.parametrize("case", CASES)
def test_all_blocks_are_the_stock_model(case, pattern):
    model, ids = make(case), token_ids(tokens=TOKENS)
    stock = model(ids).logits
    with adaptive.patch(model, policy(pattern=pattern, budget=1.0)) as patched:
        close(model(ids).logits, stock)
        close(chunked(model, ids, 70), stock)
        # the prompt as one call, and the two long ones of its three chunks
        assert all(layer.paths[pattern] == 3 for layer in patched.report().layers)
    assert torch.equal(model(ids).logits, stock)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@every_pattern
def test_padding_changes_no_row(fields, implementation, side):
    model = make("llama", implementation=implementation)
    inputs = padded(batch=3, tokens=TOKENS, side=side)
    rows = inputs["attention_mask"].bool()
    places = (rows.cumsum(1) - 1).clamp(min=0)
    with adaptive.patch(model, policy(**{**fields, "budget": 1.0, "mass": None})) as patched:
        made = model(**inputs, position_ids=places).logits
        assert all(sum(layer.paths.values()) == 2 for layer in patched.report().layers)
    for row in range(3):
        alone = model(inputs["input_ids"][row][rows[row]][None]).logits[0]
        close(made[row][rows[row]], alone)


@every_pattern
def test_skipping_is_counted_and_its_mass_measured(fields):
    model, ids = make("llama"), token_ids(tokens=TOKENS)
    stock = model(ids).logits
    with adaptive.patch(model, policy(**fields, audit=40)) as patched:
        ours = model(ids).logits
        report = patched.report()
    assert not report.exact
    assert not torch.allclose(ours, stock, atol=1e-4)
    for layer in report.layers:
        assert layer.mode == "blocks, dense"
        assert layer.paths == {fields.get("pattern", "selected"): 1, "audit": 1}
        assert layer.native_calls == 1
        assert not layer.stock_calls
        assert layer.dense_scores == 2 * TOKENS * (TOKENS + 1) // 2
        assert layer.scores < layer.dense_scores
        assert layer.mass_measured == 2 * 40
        assert 0 < layer.mass_min < layer.mass_mean < 1
        assert len(layer.mass_of_heads) == 4
        keys = 2 * 2 * TOKENS * 32 * 4  # bytes; with the values, and three times for the audit
        assert layer.kv_bytes == (2 + 3) * keys
        assert layer.dense_bytes == 0
    text = str(report)
    share = sum(x.scores for x in report.layers) / sum(x.dense_scores for x in report.layers)
    assert f"scores computed in long native calls: {share:.1%} of dense" in text
    assert "mass min" in text
    assert report.native_calls["score_tokens:cpu"] == 2 * 3  # 16 queries at a time


@every_pattern
def test_the_scores_reported_are_those_of_blocks_that_are_seen(fields, monkeypatch):
    """By hand: of all pairs, those whose key is in a listed block, or within the window."""
    counted = []
    real, real_local = block_sparse.block_sparse_attention, block_sparse.local_attention

    def seen(query, key, offsets, window=None, sinks=0):
        keys = torch.arange(key.shape[2])
        places = keys[len(keys) - query.shape[2] :]
        made = seen_keys(places, keys, len(keys), window, sinks, offsets, True)
        return made.expand(len(query), -1, -1, -1)

    def lists(query, key, value, indices, counts, block, offsets, *rest):
        listed = listed_blocks(indices, counts, -(-key.shape[2] // block))
        rows, keys = torch.arange(query.shape[2]) // block, torch.arange(key.shape[2]) // block
        pairs = seen(query, key, offsets) & listed[:, :, rows][..., keys]
        counted.append(int(pairs.sum()) // listed.shape[1])
        return real(query, key, value, indices, counts, block, offsets, *rest)

    def window(query, key, value, **options):
        near = options["window"], options["sinks"]
        counted.append(int(seen(query, key, options["offsets"], *near).sum()))
        return real_local(query, key, value, **options)

    for name, double in (("block_sparse_attention", lists), ("local_attention", window)):
        monkeypatch.setattr(block_sparse, name, double)
    monkeypatch.setattr(double, "native", ("cpu",), raising=False)
    lists.native = ("cpu",)
    model = make("llama")
    with adaptive.patch(model, policy(**fields)) as patched:
        model(**padded(batch=3, tokens=TOKENS))
        chunked(model, token_ids(tokens=TOKENS), 66)
        found = sum(layer.scores for layer in patched.report().layers)
    assert counted
    assert abs(found - sum(counted)) <= len(counted)  # lists of some heads may differ by one


def test_short_prompts_and_short_chunks_are_as_without_it():
    model = make("llama")
    for given, ids in (
        ({"min_context": TOKENS + 1}, token_ids(tokens=TOKENS)),
        ({"dense_tail": TOKENS}, token_ids(tokens=TOKENS)),
    ):
        with adaptive.patch(model):
            right = model(ids).logits
        with adaptive.patch(model, policy(**given)) as patched:
            assert torch.equal(model(ids).logits, right)
            assert not any("selected" in layer.paths for layer in patched.report().layers)


def test_a_mask_with_holes_is_left_to_stock_and_said():
    model, ids = make("llama"), token_ids(tokens=TOKENS)
    mask = torch.ones_like(ids)
    mask[0, 40:50] = 0
    stock = model(ids, attention_mask=mask).logits
    with adaptive.patch(model, policy(budget=4)) as patched:
        assert torch.equal(model(ids, attention_mask=mask).logits, stock)
        assert all(layer.stock_calls == {"mask": 1} for layer in patched.report().layers)


def test_only_the_layers_named_choose():
    model, ids = make("llama", num_hidden_layers=3), token_ids(tokens=TOKENS)
    with adaptive.patch(model, Exact(stock_layers=(0,)), policy(layers=(2,))) as patched:
        model(ids)
        chosen = ["selected" in layer.paths for layer in patched.report().layers]
        assert chosen == [False, False, True]
        assert sum(patched.report().layers[0].stock_calls.values()) == 1


def test_layers_with_a_window_of_the_model_are_left_to_it():
    model, ids = make("gemma2", implementation="eager"), token_ids(tokens=TOKENS)
    with adaptive.patch(model) as patched:
        right = model(ids).logits
    with adaptive.patch(model, policy(budget=1.0)) as patched:
        close(model(ids).logits, right)
        windows = [window is not None for window in patched.plan.shape.windows]
        chosen = ["selected" in layer.paths for layer in patched.report().layers]
    assert sorted(windows) == [False, True]
    assert chosen == [not window for window in windows]


OTHERS = {
    "tidal": [
        TidalDecode(
            budget=40, sinks=2, recent=4, min_context=1, select_layers=(1,), dense_layers=(0,)
        )
    ],
    "quest": [Quest(budget=40, sinks=2, recent=4, min_context=1, dense_layers=(0,))],
    "razor": [RazorAttention(heads=((2, 0),), window=30, dense_layers=(0,), sinks=2)],
}


@pytest.mark.parametrize("others", OTHERS.values(), ids=OTHERS)
def test_decoding_follows_the_other_policies(others):
    model, ids = make("llama", num_hidden_layers=4), token_ids(tokens=TOKENS)
    with adaptive.patch(model, *others) as patched:
        right = greedy(model, ids)
        alone = patched.report()
    for given, same in (({"budget": 1.0}, True), ({"budget": 4}, False)):
        with adaptive.patch(model, *others, policy(**given)) as patched:
            made = greedy(model, ids)
            both = patched.report()
        assert not same or torch.equal(made, right)
        for one, two in zip(alone.layers, both.layers, strict=True):
            paths = {name: n for name, n in two.paths.items() if name != "selected"}
            assert two.paths["selected"] == 1
            assert paths.pop("audit") == 1 + one.paths.get("audit", 0)
            without = {name: n for name, n in one.paths.items() if name != "audit"}
            assert without.pop("local") == 1  # the prompt
            assert paths == without


def test_a_plan_from_a_file_does_the_same(tmp_path):
    model, ids = make("llama"), token_ids(tokens=TOKENS)
    with adaptive.patch(model, policy(mass=0.5)) as patched:
        right = model(ids).logits
        patched.plan.save(tmp_path / "plan.json")
    with adaptive.patch(model, Plan.load(tmp_path / "plan.json")):
        assert torch.equal(model(ids).logits, right)
        assert torch.equal(copy.deepcopy(model)(ids).logits, right)


def test_disabled_is_the_stock_model():
    model, ids = make("llama"), token_ids(tokens=TOKENS)
    stock = model(ids).logits
    with adaptive.patch(model, policy(budget=4)) as patched, patched.disabled():
        assert torch.equal(model(ids).logits, stock)


def test_gradients_and_weights_go_to_stock():
    model, ids = make("llama", implementation="eager"), token_ids(tokens=TOKENS)
    with adaptive.patch(model, policy(budget=4)) as patched:
        assert model(ids, output_attentions=True).attentions[0].shape[-1] == TOKENS
        with torch.enable_grad():
            model(ids).logits.sum().backward()
        reasons = {reason for layer in patched.report().layers for reason in layer.stock_calls}
    assert "output_attentions" in reasons
    assert len(reasons) == 2


def test_compiling_a_long_prompt_is_refused():
    model, ids = make("llama"), token_ids(tokens=TOKENS)
    refused = pytest.raises(Exception, match=r"BlockSparsePrefill cannot run under torch\.compile")
    with adaptive.patch(model, policy(budget=4)), refused:
        torch.compile(model, backend="eager", fullgraph=True)(ids)


def test_plain_pytorch_is_refused_by_name():
    with pytest.raises(UnsupportedModel, match=r"modes that skip keys \(blocks\) need a decoder"):
        adaptive.patch(torch.nn.MultiheadAttention(64, 2).eval(), policy())
