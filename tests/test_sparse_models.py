"""Sparse policies on whole models: what they equal, what they count, and what they refuse."""

import copy
import gc
import weakref

import pytest
import torch
from models import PAD, greedy, make, padded, token_ids
from transformers import DynamicCache

import adaptive
from adaptive.layers import sparse_attention
from adaptive.layers.head_split import HeadSplit
from adaptive.layers.state import STATE
from adaptive.policy import Quest, RazorAttention, StreamingLLM, TidalDecode

LAYERS = 5
PROMPT = 60
TOKENS = 10
CASES = ["llama", "gpt_neox", "gpt2", "qwen3", "granite", "olmo2", "phi3", "smollm3"]
DEPTH = {"gpt2": "n_layer"}


def deep(case="llama", **fields):
    return make(case, **{DEPTH.get(case, "num_hidden_layers"): LAYERS}, **fields)


def tidal(**fields):
    given = {"budget": 24, "sinks": 2, "recent": 4, "min_context": 1, "select_layers": (1, 3)}
    return TidalDecode(**{**given, "dense_layers": (0,), **fields})


def quest(**fields):
    given = {"budget": 24, "page_size": 4, "sinks": 2, "recent": 4, "min_context": 1}
    return Quest(**{**given, "dense_layers": (0,), **fields})


def razor(**fields):
    given = {"heads": ((2, 0), (4, 1)), "window": 12, "dense_layers": (0,), "sinks": 2}
    return RazorAttention(**{**given, **fields})


SPARSE = {
    "tidal": [tidal()],
    "compensated": [tidal(compensate=True)],
    "mass": [tidal(mass=0.8, group="max")],
    "shared": [tidal(shared=True)],
    "quest": [quest()],
    "streaming": [StreamingLLM(sinks=2, window=12)],
    "razor": [razor()],
    "tidal x razor": [tidal(), razor()],
}
NOTHING_SKIPPED = {
    "tidal": [tidal(budget=200)],
    "tidal by share": [tidal(budget=1.0)],
    "short": [tidal(min_context=200)],
    "quest": [quest(budget=200)],
    "streaming": [StreamingLLM(sinks=2, window=200)],
    "razor": [razor(window=200)],
    "tidal x razor": [tidal(budget=200), razor(window=200)],
}
sparse = pytest.mark.parametrize("policies", SPARSE.values(), ids=SPARSE)


def logits(model, ids, steps=TOKENS, cache=None, chunk=1):
    """Logits of ``steps`` forced tokens after the prompt, decoded ``chunk`` at a time."""
    found = []
    with torch.no_grad():
        out = model(ids[:, :-steps], past_key_values=cache, use_cache=True)
        for start in range(ids.shape[1] - steps, ids.shape[1], chunk):
            part = ids[:, start : start + chunk]
            out = model(part, past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return torch.cat(found, 1), out.past_key_values


@pytest.mark.parametrize("policies", NOTHING_SKIPPED.values(), ids=NOTHING_SKIPPED)
@pytest.mark.parametrize("case", CASES)
def test_skipping_nothing_is_bit_identical_to_no_policy(case, policies):
    model, ids = deep(case), token_ids(tokens=PROMPT)
    with adaptive.patch(model):
        dense, _ = logits(model, ids)
    with adaptive.patch(model, *policies):
        ours, _ = logits(model, ids)
    assert torch.equal(ours, dense)


@sparse
@pytest.mark.parametrize("case", ["llama", "gpt_neox"])
def test_every_policy_skips_keys_and_says_how_many(case, policies):
    model, ids = deep(case), token_ids(tokens=PROMPT)
    with adaptive.patch(model) as patched:
        dense, _ = logits(model, ids)
        dense_bytes = [layer.kv_bytes for layer in patched.report().layers]
    with adaptive.patch(model, *policies) as patched:
        ours, _ = logits(model, ids)
        report = patched.report()
    assert not report.exact
    assert not torch.equal(ours, dense)
    for layer, all_bytes in zip(report.layers, dense_bytes, strict=True):
        if layer.mode not in ("dense", "select"):
            assert layer.dense_bytes == all_bytes
            assert 0 < layer.kv_bytes < all_bytes
            assert 0 < layer.mass_min <= layer.mass_mean <= 1
            heads = [head for head in layer.mass_of_heads if head is not None]
            assert min(least for least, _ in heads) == layer.mass_min
        elif layer.mode == "select":
            assert all_bytes < layer.kv_bytes < 2 * all_bytes  # the certificate reads the set
            assert layer.mass_measured == 2 * TOKENS
    assert "of dense" in str(report)


def test_the_bytes_reported_are_those_of_the_keys_read(monkeypatch):
    read = []
    real = sparse_attention.gather_attention

    def counted(query, key, value, indices, counts, **options):
        read.append(int(counts.sum()) * 2 * key.shape[3] * key.element_size())
        return real(query, key, value, indices, counts, **options)

    model, ids = deep(), token_ids(tokens=PROMPT)
    with adaptive.patch(model, tidal(audit_every=None, select_layers=(1,))) as patched:
        monkeypatch.setattr(sparse_attention, "gather_attention", counted)
        logits(model, ids, steps=1)
        layers = patched.report().layers
    certified, *reused = read
    assert layers[1].kv_bytes == layers[1].dense_bytes + certified
    assert [layer.kv_bytes for layer in layers[2:]] == reused
    assert layers[2].kv_tokens == 2 * 24


@sparse
def test_several_tokens_at_once_equal_one_by_one(policies):
    """Up to what one query more in a call changes: the keys that are chosen for all of them."""
    model, ids = deep(), token_ids(tokens=PROMPT)
    whole = [p for p in policies if isinstance(p, RazorAttention | StreamingLLM)]
    if len(whole) < len(policies):
        return
    with adaptive.patch(model, *policies):
        one, _ = logits(model, ids, steps=9)
        many, _ = logits(model, ids, steps=9, chunk=4)
    torch.testing.assert_close(many, one, rtol=1e-3, atol=1e-3)


def test_a_long_chunk_on_a_reduced_cache_is_read_in_pieces():
    model, ids = deep(), token_ids(tokens=PROMPT + 40)
    with adaptive.patch(model, razor()), torch.no_grad():
        first = model(ids[:, :PROMPT], use_cache=True)
        first = model(ids[:, PROMPT : PROMPT + 1], past_key_values=first.past_key_values)
        again = copy.deepcopy(first.past_key_values)
        one = [
            model(ids[:, i : i + 1], past_key_values=first.past_key_values).logits
            for i in range(PROMPT + 1, PROMPT + 40)
        ]
        many = model(ids[:, PROMPT + 1 :], past_key_values=again).logits
    torch.testing.assert_close(many, torch.cat(one, 1), rtol=1e-3, atol=1e-3)


@sparse
def test_a_padded_batch_equals_its_rows_alone(policies):
    """Where a choice depends on the row alone: all but compensation of chosen keys, left out."""
    model, inputs = deep(), padded(tokens=PROMPT)
    if any(isinstance(p, Quest) or getattr(p, "compensate", False) for p in policies):
        policies = [p for p in policies if isinstance(p, RazorAttention)] or [tidal()]
    with adaptive.patch(model, *policies):
        both = greedy(model, inputs, TOKENS)
        for row in range(2):
            keep = inputs["attention_mask"][row].bool()
            alone = greedy(model, inputs["input_ids"][row : row + 1, keep], TOKENS)
            assert torch.equal(both[row, -TOKENS:], alone[0, -TOKENS:])


@sparse
def test_beam_search_and_sampling_run(policies):
    model, inputs = deep(), padded(tokens=PROMPT)
    with adaptive.patch(model, *policies) as patched:
        beams = greedy(model, inputs, TOKENS, num_beams=3)
        assert beams.shape == (2, PROMPT + TOKENS)
        model.generate(**inputs, max_new_tokens=3, do_sample=True, pad_token_id=PAD)
        last = patched.report().layers[-1]
        assert last.stock_calls == {}
        assert last.paths["local"] == 2  # the padded prompts


@sparse
def test_copies_and_pickles_are_patched_alike(policies):
    model, ids = deep(), token_ids(tokens=PROMPT)
    with adaptive.patch(model, *policies):
        expected, _ = logits(model, ids)
        again, _ = logits(copy.deepcopy(model), ids)
    assert torch.equal(again, expected)


@sparse
def test_unpatching_gives_the_stock_model_back(policies):
    model, ids = deep(), token_ids(tokens=PROMPT)
    stock = greedy(model, ids)
    patched = adaptive.patch(model, *policies)
    greedy(model, ids)
    with patched.disabled():
        assert torch.equal(greedy(model, ids), stock)
    patched.unpatch()
    assert torch.equal(greedy(model, ids), stock)
    assert all(STATE not in module.__dict__ for module in model.modules())


def test_memory_is_given_back_and_stays_so():
    model = deep(max_position_embeddings=2048)
    ids = token_ids(batch=1, tokens=1100)
    with adaptive.patch(model, StreamingLLM(sinks=2, window=20)) as patched, torch.no_grad():
        out = model(ids[:, :1000], use_cache=True)
        cache = out.past_key_values
        store = cache.layers[1].store
        full_bytes = store.used_bytes
        old = weakref.ref(store)
        del store
        held = []
        for token in range(1000, 1100):
            model(ids[:, token : token + 1], past_key_values=cache)
            held.append(cache.layers[1].store.used_bytes)
        gc.collect()
        assert old() is None
        layer = patched.report().layers[1]
    each = full_bytes // 1000
    assert max(held) <= (2 + 20 + 64 + 1) * each < full_bytes / 2
    assert layer.dropped_bytes >= (1000 - 22) * each
    assert layer.held_bytes < full_bytes
    assert cache.get_seq_length() == 1100


def test_a_reduced_cache_is_refused_where_it_would_be_misread():
    model, ids = deep(), token_ids(tokens=PROMPT)
    patched = adaptive.patch(model, razor())
    _, cache = logits(model, ids)
    assert isinstance(cache.layers[1].store, HeadSplit)
    with patched.disabled(), torch.no_grad():
        with pytest.raises(NotImplementedError, match="this cache was reduced by a policy"):
            model(ids[:, :1], past_key_values=cache)
        assert cache.get_seq_length() == PROMPT
    with pytest.raises(NotImplementedError, match="without gradients"):
        model(ids[:, :1], past_key_values=cache)
    with torch.no_grad():
        with pytest.raises(NotImplementedError, match="output_attentions"):
            model(ids[:, :1], past_key_values=copy.deepcopy(cache), output_attentions=True)
        with pytest.raises(ValueError, match="recent tokens that are still held"):
            copy.deepcopy(cache).crop(-50)
        model(ids[:, :1], past_key_values=cache)
    patched.unpatch()
    with torch.no_grad(), pytest.raises(NotImplementedError, match="read by the patched model"):
        model(ids[:, :1], past_key_values=cache)


def test_too_little_mass_falls_back_to_every_key_aloud():
    model, ids = deep(), token_ids(tokens=PROMPT)
    with adaptive.patch(model) as patched:
        dense, _ = logits(model, ids)
    with adaptive.patch(model, tidal(budget=8, min_mass=0.9999)) as patched:
        ours, _ = logits(model, ids)
        report = patched.report()
    assert torch.equal(ours, dense)
    assert report.layers[2].paths == {"dense: min_mass": TOKENS}
    assert "min_mass" in str(report)


def test_all_heads_retrieval_equals_tidal_alone():
    model, ids = deep(), token_ids(tokens=PROMPT)
    everyone = tuple((layer, head) for layer in range(LAYERS) for head in range(2))
    with adaptive.patch(model, tidal()):
        alone, _ = logits(model, ids)
    with adaptive.patch(model, tidal(), razor(heads=everyone)):
        composed, _ = logits(model, ids)
    assert torch.equal(composed, alone)


def test_foreign_caches_and_plain_modules_are_told_apart():
    model, ids = deep(), token_ids(tokens=PROMPT)
    with adaptive.patch(model, StreamingLLM(sinks=2, window=12)) as patched, torch.no_grad():
        with patched.disabled():
            cache = model(ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache)
        assert any("nothing dropped" in note for note in patched.report().notes)
    attention = torch.nn.MultiheadAttention(64, 2)
    support = adaptive.check(attention, tidal(select_layers=(0,), dense_layers=()))
    assert not support.ok
    with pytest.raises(adaptive.UnsupportedModel, match="skip"):
        adaptive.patch(attention, tidal(select_layers=(0,), dense_layers=()))
