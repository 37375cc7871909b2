"""LocalAttention on whole models: the same as a dense mask of its pattern, however it is fed."""

import pytest
import torch
from fed_models import fed, given
from models import greedy, make, padded, token_ids
from transformers import StaticCache

import adaptive
from adaptive.layers.head_split import HeadSplit
from adaptive.layers.local_store import ROLLBACK, kept_tokens
from adaptive.layers.state import STATE
from adaptive.layers.window_store import slack
from adaptive.policy import Quest, RazorAttention, TidalDecode

PROMPT = 160
CUTS = [(PROMPT,), (50, 40, 30, 1, 1, 2, 16, 17, 1, 2), (3, 2, 1, 1, 100, 1, 52), (90,) + (1,) * 70]


def seen(mask, window, sinks, heads=None):
    """What each query head sees, ``[batch, 4, tokens, tokens]``: KV heads have two each."""
    places = torch.arange(mask.shape[1])
    first = mask.int().argmax(1)[:, None, None]
    away = places[:, None] - places
    whole = (away >= 0) & mask[:, None, :]
    near = whole & ((away < window) | (places < first + sinks))
    rows = [near if heads is None or kv in heads else whole for kv in (0, 0, 1, 1)]
    return torch.stack(rows, 1)


class Dense:
    """Runs a model's attention with a dense mask for each layer."""

    def __init__(self, model, masks):
        self.hooks = [
            layer.self_attn.register_forward_pre_hook(self.put(mask), with_kwargs=True)
            for layer, mask in zip(model.model.layers, masks, strict=True)
        ]

    @staticmethod
    def put(mask):
        return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def close(ours, stock):
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["plain", "padded"])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (8, 0), (8, 3), (20, 20)])
@torch.no_grad()
def test_every_way_of_feeding_is_the_dense_mask(implementation, kind, window, sinks):
    stock, model = make("llama"), make("llama", implementation=implementation)
    ids, mask, places = given(kind, PROMPT)
    real = mask.bool()
    with Dense(stock, [seen(real, window, sinks)] * 2):
        wanted, _ = fed(stock, ids, mask, places, (PROMPT,))
    policy = adaptive.LocalAttention(window=window, sinks=sinks)
    with adaptive.patch(model, policy) as patched:
        for cuts in CUTS:
            ours, cache = fed(model, ids, mask, places, cuts)
            close(ours[real], wanted[real])
            assert isinstance(cache.layers[0].store, HeadSplit)
        assert patched.report().layers[0].stock_calls == {}


@pytest.mark.parametrize("kind", ["plain", "padded"])
@torch.no_grad()
def test_some_heads_of_some_layers(kind):
    stock, model = make("llama"), make("llama")
    ids, mask, places = given(kind, PROMPT)
    real = mask.bool()
    with Dense(stock, [seen(real, 9, 2, heads=(1,)), seen(real, 9, 2, heads=())]):
        wanted, _ = fed(stock, ids, mask, places, (PROMPT,))
    policy = adaptive.LocalAttention(window=9, sinks=2, heads=((0, 1),))
    with adaptive.patch(model, policy):
        for cuts in CUTS:
            ours, cache = fed(model, ids, mask, places, cuts)
            close(ours[real], wanted[real])
        assert cache.layers[0].store.whole.length == PROMPT
        assert not isinstance(cache.layers[1].store, HeadSplit)


@torch.no_grad()
def test_memory_is_given_back_and_bytes_are_counted():
    model, window, sinks, steps = make("llama"), 40, 4, 300
    ids, mask, places = given("plain", tokens=700)
    token_bytes = 2 * 2 * 2 * 32 * 4  # rows, keys and values, heads, width, float32
    policy = adaptive.LocalAttention(window=window, sinks=sinks, layers=(0,))
    with adaptive.patch(model, policy) as patched:
        _, cache = fed(model, ids[:, :400], mask, places, (400,))
        layer = cache.layers[0]
        assert layer.used_bytes() == (sinks + kept_tokens(window)) * token_bytes
        report = patched.report()
        local, whole = report.layers
        assert local.dropped_bytes == 400 * token_bytes - layer.used_bytes()
        assert (local.used_bytes, whole.used_bytes) == (layer.used_bytes(), 400 * token_bytes)
        near = sum(min(i + 1, window) + min(sinks, max(0, i + 1 - window)) for i in range(400))
        assert local.scores == 2 * near
        assert local.dense_scores == 2 * 400 * 401 // 2
        assert local.dense_bytes == 400 * token_bytes
        patched.reset_stats()
        most = 0
        for step in range(400, 400 + steps):
            one = slice(step, step + 1)
            model(ids[:, one], past_key_values=cache, position_ids=places[:, one])
            most = max(most, layer.used_bytes())
        local, whole = patched.report().layers
        assert most <= (sinks + kept_tokens(window) + slack(window)) * token_bytes
        assert local.kv_bytes == steps * (window + sinks) * token_bytes
        assert whole.kv_bytes == sum(range(401, 401 + steps)) * token_bytes
        assert cache.get_seq_length() == 700
        assert "local" in str(patched.report())


@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt_neox", "qwen3", "phi3"])
def test_generation_beams_and_undoing(case):
    model = make(case)
    ids = token_ids(tokens=100)
    stock = greedy(model, ids, 4)
    wide = adaptive.LocalAttention(window=110)
    with adaptive.patch(model, wide) as patched:
        assert torch.equal(greedy(model, ids, 4), stock)  # nothing is out of sight
    with adaptive.patch(model, adaptive.LocalAttention(window=16, sinks=4)) as patched:
        tokens = greedy(model, padded(tokens=100), 12)
        assert torch.equal(greedy(model, padded(tokens=100), 12), tokens)
        assert greedy(model, padded(tokens=100), 12, num_beams=3).shape == tokens.shape
        found = patched.verify(padded(tokens=100), new_tokens=4)
        assert 0 < found.max_logit_error < float("inf")
        assert patched.report().exact is False
    assert torch.equal(greedy(model, ids, 4), stock)


@torch.no_grad()
def test_beside_other_policies():
    model = make("llama", num_hidden_layers=4)
    ids = token_ids(tokens=100)
    local = adaptive.LocalAttention(window=12, sinks=2, heads=((2, 0), (3, 0), (3, 1)))
    numbers = {"budget": 24, "sinks": 2, "recent": 4, "min_context": 1, "dense_layers": (0,)}
    razor = RazorAttention(heads=((1, 0), (2, 0), (2, 1)), window=12, dense_layers=(0,), sinks=2)
    for others, path in (
        ([TidalDecode(**numbers, select_layers=(1,))], "reuse"),
        ([Quest(**numbers, page_size=4)], "pages"),
        ([], "dense"),
    ):
        with adaptive.patch(model, *others, local) as patched:
            greedy(model, ids, 6)
            paths = patched.report().layers[2].paths
            assert paths[path] == paths["local"] - 1 == 5
    with adaptive.patch(model, local, razor) as patched:
        greedy(model, ids, 6)
        first, *_, last = patched.report().layers[1:]
    assert first.paths["razor"] == 5
    assert last.paths == {"local": 6}


FFNS = {
    "widths": (
        adaptive.TokenRouting(widths=0.5, audit_every=None),
        adaptive.TokenRouting(widths=1.0),
    ),
    "experts": (
        adaptive.FeedForwardExperts(experts=6, top_k=2, audit_every=None),
        adaptive.FeedForwardExperts(experts=6, top_k=6, split="cut"),
    ),
}
"""Policies of FFNs that leave out much of them, and nothing."""


@pytest.mark.parametrize("kind", FFNS)
def test_all_layers_beside_ffns_in_part(kind):
    part, whole = FFNS[kind]
    model, ids = make("llama"), token_ids(tokens=40)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def tokens(*policies):
        with adaptive.patch(model, *policies):
            return greedy(model, ids, 8)

    stock = greedy(model, ids, 8)
    wide, near = (adaptive.LocalAttention(window=w, sinks=2) for w in (64, 6))
    named = adaptive.LocalAttention(window=6, sinks=2, layers=(0, 1))
    results = {
        "part": ([part], [(part, wide), (wide, part)]),
        "near": ([near], [(whole, near), (near, whole)]),
        "both": ([part, named], [(part, near), (near, part)]),
    }
    found = [stock]
    for alone, pairs in results.values():
        found.append(tokens(*alone))
        for pair in pairs:
            assert torch.equal(tokens(*pair), found[-1])
            assert all("forward" not in vars(module) for module in model.modules())
    assert len({tuple(each.flatten().tolist()) for each in found}) == len(found)
    assert torch.equal(greedy(model, ids, 8), stock)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_a_rollback_is_exact_or_refused():
    model = make("llama")
    ids, mask, places = given("plain", PROMPT)
    with adaptive.patch(model, adaptive.LocalAttention(window=16, sinks=2)):
        wanted, _ = fed(model, ids, mask, places, (PROMPT,))
        _, cache = fed(model, ids[:, :130], mask, places, (129, 1))
        cache.crop(-20)
        out = model(ids[:, 110:], past_key_values=cache, position_ids=places[:, 110:])
        close(out.logits, wanted[:, 110:])
        with pytest.raises(ValueError, match="crop must remove at most"):
            cache.crop(-ROLLBACK - 2 * slack(16))
        lookup = greedy(model, ids[:1], 12, prompt_lookup_num_tokens=4, eos_token_id=1)
        assert torch.equal(lookup, greedy(model, ids[:1], 12, eos_token_id=1))


def test_what_stock_has_to_do_sees_the_same_keys():
    stock, model = make("llama", implementation="eager"), make("llama", implementation="eager")
    ids, mask, places = given("padded", tokens=40)
    real = mask.bool()
    bias = torch.where(seen(real, 8, 2), 0.0, torch.finfo(torch.float32).min)
    with Dense(stock, [bias] * 2):
        wanted = stock(ids, attention_mask=mask, position_ids=places, output_attentions=True)
        wanted.logits[real].sum().backward()
    with adaptive.patch(model, adaptive.LocalAttention(window=8, sinks=2)) as patched:
        ours = model(ids, attention_mask=mask, position_ids=places)
        ours.logits[real].sum().backward()
        close(ours.logits[real], wanted.logits[real])
        for a, b in zip(model.parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            shown = model(ids, attention_mask=mask, position_ids=places, output_attentions=True)
            close(
                shown.attentions[1][real[:, None].expand(-1, 4, -1)],
                wanted.attentions[1][real[:, None].expand(-1, 4, -1)],
            )
        assert patched.report().layers[0].stock_calls == {"gradient": 1, "output_attentions": 1}


@torch.no_grad()
def test_other_caches_are_read_locally_and_keep_everything():
    model = make("llama")
    ids = token_ids(tokens=60)
    with adaptive.patch(model, adaptive.LocalAttention(window=8, sinks=2)) as patched:
        wanted = greedy(model, ids, 8)
        cache = StaticCache(config=model.config, max_cache_len=80)
        assert torch.equal(greedy(model, ids, 8, past_key_values=cache), wanted)
        assert patched.report().layers[0].cache == "StaticLayer"
        with patched.disabled():  # a cache that stock has filled is left as it is
            filled = model(ids, use_cache=True).past_key_values
        patched.reset_stats()
        step = token_ids(tokens=1, seed=3)
        model(step, past_key_values=filled)
        report = patched.report()
        assert report.notes == {"nothing dropped: the cache is not one that patch() took over": 2}
        assert report.layers[0].paths == {"local": 1}
        assert filled.layers[0].keys.shape[2] == 61


@torch.no_grad()
def test_masks_that_no_pattern_says():
    model, ids = make("llama"), token_ids(tokens=60)
    holes = torch.ones_like(ids)
    holes[0, 10] = 0
    with adaptive.patch(model, adaptive.LocalAttention(window=8, sinks=2)) as patched:
        model(ids, attention_mask=holes, use_cache=False)
        assert patched.report().layers[0].stock_calls == {"mask": 1}
        cache = model(ids, use_cache=True).past_key_values
        longer = torch.cat([holes, torch.ones(2, 1, dtype=torch.int64)], 1)
        with pytest.raises(NotImplementedError, match=r"reduced by a policy.*\(mask\)"):
            model(ids[:, :1], attention_mask=longer, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        with patched.disabled(), pytest.raises(NotImplementedError, match="reduced by a policy"):
            model(ids[:, :1], past_key_values=cache)
    assert STATE not in model.model.layers[0].self_attn.__dict__
