"""What early exit leaves in the KV cache: of later layers, at the end of a call, after Ctrl-C."""

import pytest
import torch
from early_exit_cases import FILLS, SOME, TOKENS, cache_after, exited, model_of, never
from models import greedy, token_ids
from transformers import DynamicCache, LogitsProcessor

import adaptive


@pytest.mark.parametrize("kv", FILLS)
def test_above_one_the_cache_is_the_models_bit_by_bit(kv):
    model, caches = model_of("llama"), []
    for chosen in ([], [adaptive.EarlyExit(**never(kv))]):
        cache = DynamicCache(config=model.config)
        with adaptive.patch(model, *chosen):
            greedy(model, token_ids(1), TOKENS, past_key_values=cache)
        caches.append(cache)
    for left, right in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(left.keys, right.keys)
        assert torch.equal(left.values, right.values)


@pytest.mark.parametrize("case", ["llama", "gpt2", "mistral_window", "gemma3", "mixtral"])
@pytest.mark.parametrize(("tokens", "audit"), [(3, None), (16, None), (40, None), (40, 3)])
def test_the_deferred_cache_is_that_of_the_whole_model(case, tokens, audit):
    """On the tokens that were made, which are not those it would have made itself."""
    model = model_of(case)
    cache, made, log = cache_after(model, token_ids(1), tokens, {**SOME, "audit": audit})
    assert log.exit_steps > 0
    with adaptive.patch(model):
        want = DynamicCache(config=model.config)
        with torch.no_grad():
            for part in (made[:, :20], *made[:, 20:].split(1, 1)):
                model(part, past_key_values=want)
    for ours, theirs in zip(cache.layers, want.layers, strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length() == 20 + tokens - 1
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-5)


def test_copied_keys_are_those_of_the_last_layer_that_ran():
    policy = {"layers": (2,), "threshold": 0.0, "kv": "copy", "audit": 5}
    cache, _, _ = cache_after(model_of("llama"), token_ids(2), TOKENS, policy)
    source = cache.layers[1]
    for layer in cache.layers[2:]:
        assert torch.equal(layer.keys[:, :, 20:], source.keys[:, :, 20:])
        assert torch.equal(layer.values[:, :, 20:], source.values[:, :, 20:])
        assert not torch.equal(layer.keys[:, :, :20], source.keys[:, :, :20])


@torch.no_grad()
def test_projected_keys_are_each_layers_own_of_the_exits_state():
    model, states = model_of("llama"), []
    hook = model.model.layers[1].register_forward_hook(lambda *a: states.append(a[2]))
    policy = {"layers": (2,), "threshold": 0.0, "kv": "project", "audit": None}
    cache, _, _ = cache_after(model, token_ids(1), TOKENS, policy)
    hook.remove()
    exits = torch.cat([state for state in states if state.shape[1] == 1][::2], 1)
    for number, layer in enumerate(model.model.layers[2:], 2):
        values = layer.self_attn.v_proj(layer.input_layernorm(exits))
        held = cache.layers[number].values[:, :, 20:].transpose(1, 2).flatten(2)
        torch.testing.assert_close(held, values, rtol=1e-4, atol=1e-5)


def test_what_waits_runs_sixteen_at_a_time():
    policy = {"layers": (2,), "threshold": 0.0, "audit": None}
    _, log = exited(model_of("llama"), token_ids(1), 1 + 50, policy=policy)
    assert log.layer_passes == 50 * 2 + 3 * 2  # the last 2 are never needed
    assert log.catch_ups == 3


@pytest.mark.parametrize("kv", FILLS)
@pytest.mark.parametrize("at", [2, 5, 17])
def test_an_interrupt_leaves_the_cache_whole(kv, at):
    class Interrupt(LogitsProcessor):
        left = at

        def __call__(self, input_ids, scores):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return scores

    for case in ("llama", "mistral_window"):
        model, cache = model_of(case), DynamicCache(config=model_of(case).config)
        want = exited(model, token_ids(1), policy={**SOME, "kv": kv})[0]
        with adaptive.patch(model, adaptive.EarlyExit(**SOME, kv=kv)) as patched:
            options = {"past_key_values": cache, "logits_processor": [Interrupt()]}
            with pytest.raises(KeyboardInterrupt):
                greedy(model, token_ids(1), TOKENS, **options)
            lengths = {layer.get_seq_length() for layer in cache.layers}
            assert len(lengths) == 1
            held = lengths.pop()
            assert 20 <= held < 20 + at
            again = greedy(model, want[:, : held + 1], 3, past_key_values=cache)
            assert again.shape[1] == held + 4
            assert not patched.model.model.layers[0].forward.depth.active


def test_a_conversation_goes_on_from_the_cache():
    model, made = model_of("llama"), []
    policy = {"layers": (2,), "threshold": 0.0}
    for keep in (True, False):
        cache = DynamicCache(config=model.config) if keep else None
        with adaptive.patch(model, adaptive.EarlyExit(**policy)):
            first = greedy(model, token_ids(1), 8, past_key_values=cache)
            turn = torch.cat([first, token_ids(1, 5, seed=9)], 1)
            made.append(greedy(model, turn, 8, past_key_values=cache))
    assert torch.equal(*made)
