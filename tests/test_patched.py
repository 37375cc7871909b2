"""The handle: disabled(), verify(), report(), reset_stats() and unpatch()."""

import copy
import functools
import json
import types

import pytest
import torch
from models import greedy, make, padded, token_ids
from rich.console import Console
from torch import nn

import adaptive


@pytest.fixture
def model():
    return make("llama")


def ran_native(patched):
    return patched.report().layers[0].native_calls


class TestDisabled:
    def test_is_stock_bit_for_bit(self, model):
        options = {"return_dict_in_generate": True, "output_logits": True}
        stock = greedy(model, padded(), **options)
        patched = adaptive.patch(model)
        before = adaptive._native.calls()
        with patched.disabled() as inside:
            assert inside is model
            again = greedy(model, padded(), **options)
            assert type(again.past_key_values.layers[0]).__name__ == "DynamicLayer"
        assert adaptive._native.calls() == before
        assert torch.equal(again.sequences, stock.sequences)
        assert all(map(torch.equal, again.logits, stock.logits))
        assert patched.report().forward_calls == 0
        greedy(model, padded())
        assert ran_native(patched) > 0

    def test_nests_and_survives_exceptions(self, model):
        patched = adaptive.patch(model)

        def runs_native():
            patched.reset_stats()
            greedy(model, token_ids(), tokens=3)
            return ran_native(patched) > 0

        with patched.disabled():
            with patched.disabled():
                assert not runs_native()
            assert not runs_native()
            with pytest.raises(KeyError), patched.disabled():
                raise KeyError
            assert not runs_native()
        assert runs_native()

    def test_takes_over_a_cache_and_gives_it_back(self, model):
        ids = token_ids(tokens=24)
        with torch.no_grad():
            stock = model(ids).logits[:, -1]
            for first_disabled in (True, False):
                with adaptive.patch(model) as patched:
                    if first_disabled:
                        with patched.disabled():
                            cache = model(ids[:, :20]).past_key_values
                        out = model(ids[:, 20:], past_key_values=cache)
                    else:
                        cache = model(ids[:, :20]).past_key_values
                        with patched.disabled():
                            out = model(ids[:, 20:], past_key_values=cache)
                torch.testing.assert_close(out.logits[:, -1], stock, rtol=1e-4, atol=1e-5)


class TestVerify:
    def test_restores_the_counters(self, model):
        patched = adaptive.patch(model)
        greedy(model, padded())
        before = patched.report().to_dict()
        result = patched.verify(padded(), new_tokens=4)
        assert patched.report().to_dict() == before
        assert result.token_agreement == 1
        assert result.tokens == 8
        assert result.first_disagreement is None
        assert 0 < result.max_logit_error < 1e-4 < result.max_logit
        assert "100.0% of 8 greedy tokens agree" in str(result)
        greedy(model, padded())
        assert ran_native(patched) == 2 * before["layers"][0]["native_calls"]

    def test_takes_token_ids_alone_and_keeps_the_mode(self, model):
        patched = adaptive.patch(model)
        model.train()
        assert patched.verify(token_ids(), new_tokens=2).token_agreement == 1
        assert model.training

    def test_sees_a_wrong_kernel(self, model, monkeypatch):
        from adaptive.layers import hf_call

        right = hf_call.decode_attention

        class Wrong:
            native = right.native

            def __call__(self, query, key, value, **options):
                out, lse = right(query, key, value, **options)
                return -5 * out, lse

        monkeypatch.setattr(hf_call, "decode_attention", Wrong())
        result = adaptive.patch(model).verify(token_ids(), new_tokens=6)
        assert result.token_agreement < 1
        assert result.first_disagreement is not None
        assert result.first_disagreement >= 1  # the prefill is stock
        assert result.max_logit_error > 0.01
        assert "first at step" in str(result)

    def test_compares_with_the_kernel_also_inside_disabled(self, model):
        patched = adaptive.patch(model)
        outside = patched.verify(padded(), new_tokens=4)
        with patched.disabled():
            assert patched.verify(padded(), new_tokens=4) == outside
            greedy(model, padded())
        assert outside.max_logit_error > 0
        assert ran_native(patched) == 0

    def test_compares_hidden_states_without_a_head(self, model):
        patched = adaptive.patch(model.model)
        result = patched.verify({**padded(), "position_ids": None}, new_tokens=4)
        assert result.tokens == 0
        assert 0 < result.max_logit_error < 1e-4 < result.max_logit  # other than 0: the kernel ran
        assert str(result).startswith("max logit error")

    def test_refuses_nonsense(self, model):
        patched = adaptive.patch(model)
        with pytest.raises(ValueError, match="new_tokens must be at least 1, got 0"):
            patched.verify(token_ids(), new_tokens=0)
        with pytest.raises(ValueError, match="inputs must not have 'use_cache'"):
            patched.verify({"input_ids": token_ids(), "use_cache": True})
        for ids in (token_ids().float(), token_ids()[0], token_ids()[:, :0]):
            with pytest.raises(ValueError, match=r"input_ids must be whole numbers \[batch, tok"):
                patched.verify(ids)
        for wrong in ([[1, 2]], "text", {"input_ids": [[1, 2]]}):
            with pytest.raises(TypeError, match=r"must be a Tensor.*got (list|str)"):
                patched.verify(wrong)
        patched.unpatch()
        with pytest.raises(adaptive.PatchConflict, match="not patched any more"):
            patched.verify(token_ids())

    def test_of_a_plain_module_takes_its_keyword_arguments(self):
        patched = adaptive.patch(nn.MultiheadAttention(64, 2).eval())
        query = torch.randn(1, 2, 64)
        with pytest.raises(TypeError, match=r"must be a dict of .*\(query, key, .*got a Tensor"):
            patched.verify(query)
        with pytest.raises(TypeError, match=r"MultiheadAttention.forward \(query.*got 'queries'"):
            patched.verify({"queries": query, "key": query, "value": query})
        assert patched.verify({"query": query, "key": query, "value": query}).max_logit > 0


class TestReport:
    def test_groups_equal_layers_in_100_columns(self):
        model = make("llama", num_hidden_layers=6)
        patched = adaptive.patch(model, adaptive.Exact(stock_layers=(2,)))
        greedy(model, padded())
        text = str(patched.report())
        rows = [line.split()[0] for line in text.splitlines() if line.strip()[:1].isdigit()]
        assert rows[:3] == ["0-1", "2", "3-5"]
        assert "8 plan" in text
        assert "local_attention:cpu x5" in text
        assert "decode_attention:cpu x35" in text
        assert "exact: Exact(stock_layers=(2,))" in text
        assert max(map(len, text.splitlines())) <= 100
        console = Console(width=100, record=True)
        with console.capture() as captured:
            console.print(patched.report())
        assert "0-1" in captured.get()

    def test_is_json_and_adds_up(self, model):
        patched = adaptive.patch(model)
        greedy(model, padded(tokens=20))
        values = json.loads(json.dumps(patched.report().to_dict()))
        assert values["exact"] is True
        assert values["family"] == "llama"
        assert values["forward_calls"] == 8
        layer = values["layers"][0]
        assert layer["name"] == "model.layers.0.self_attn"
        assert layer["cache"] == "AdaptiveCacheLayer"
        assert layer["used_bytes"] == 2 * 2 * 2 * 27 * 32 * 4  # K and V, batch, KV heads, tokens
        assert layer["held_bytes"] >= layer["used_bytes"]
        assert 0 < layer["seconds"] < values["forward_seconds"]

    def test_resets_and_outlives_the_patch(self, model):
        patched = adaptive.patch(model)
        greedy(model, padded())
        patched.reset_stats()
        report = patched.report()
        assert report.forward_calls == report.layers[0].native_calls == 0
        assert not any(report.native_calls.values())
        greedy(model, padded())
        calls = ran_native(patched)
        patched.unpatch()
        assert ran_native(patched) == calls > 0


class TestUnpatch:
    def test_twice_does_nothing(self, model):
        patched = adaptive.patch(model)
        assert patched.unpatch() is model
        assert patched.unpatch() is model
        again = adaptive.patch(model)
        assert patched.unpatch() is model  # the first handle has no part in the second patch
        assert again.active
        assert not patched.active

    def test_happens_at_the_end_of_the_block_also_after_an_exception(self, model):
        with pytest.raises(KeyError), adaptive.patch(model):
            raise KeyError
        adaptive.patch(model).unpatch()

    @pytest.mark.parametrize("how", ["forward", "module", "config", "state", "hook", "copy"])
    def test_refuses_when_someone_came_between(self, model, how):
        patched = adaptive.patch(model)
        layer = model.model.layers[1]
        attention = layer.self_attn
        undo = None
        if how == "forward":
            attention.forward = functools.partial(attention.forward)
            undo = functools.partial(attention.__dict__.pop, "forward")
        elif how == "module":
            layer.self_attn = nn.Sequential(attention)
            undo = functools.partial(setattr, layer, "self_attn", attention)
        elif how == "config":
            ours = attention.config
            attention.config = copy.copy(ours)
            undo = functools.partial(setattr, attention, "config", ours)
        elif how == "state":
            state = attention.__dict__.pop("_adaptive")
            undo = functools.partial(attention.__dict__.update, _adaptive=state)
        elif how == "copy":
            layer.self_attn_twin = copy.deepcopy(attention)
            undo = functools.partial(delattr, layer, "self_attn_twin")
        else:
            hooks = dict(model.model._forward_pre_hooks)
            model.model._forward_pre_hooks.clear()
            undo = functools.partial(model.model._forward_pre_hooks.update, hooks)
        with pytest.raises(adaptive.PatchConflict) as caught:
            patched.unpatch()
        assert ("model.layers.1.self_attn" in str(caught.value)) or how == "hook"
        assert "'model'" in str(caught.value) or how != "hook"
        assert patched.active  # nothing was undone
        undo()
        stock = make("llama")
        assert patched.unpatch() is model
        assert torch.equal(greedy(model, padded()), greedy(stock, padded()))

    def test_keeps_what_the_user_set_meanwhile(self, model):
        config = model.config
        with adaptive.patch(model):
            assert model.config is not config
            model.config.use_cache = False
            model.config.my_note = "mine"
            model.model.register_forward_hook(lambda *args: None)
        assert model.config is config
        assert config.use_cache is False
        assert config.my_note == "mine"
        assert config._attn_implementation == "sdpa"
        assert len(model.model._forward_hooks) == 1

    def test_keeps_an_implementation_that_the_user_chose_meanwhile(self, model):
        with adaptive.patch(model) as patched:
            model.set_attn_implementation("eager")
            greedy(model, token_ids())
            assert ran_native(patched) == 0
        assert model.config._attn_implementation == "eager"

    def test_a_handle_can_be_copied_with_its_model(self, model):
        patched = adaptive.patch(model)
        twin = copy.deepcopy(patched)
        assert twin.model is not model
        twin.unpatch()
        assert patched.active
        assert twin.model.config._attn_implementation == "sdpa"

    def test_the_handle_says_what_it_is(self, model):
        patched = adaptive.patch(model)
        assert repr(patched) == "<patched LlamaForCausalLM, 2 layers>"
        patched.unpatch()
        assert repr(patched) == "<unpatched LlamaForCausalLM, 2 layers>"


def test_a_patched_model_can_still_be_given_methods(model):
    # accelerate and others set instance attributes; those that patch() does not touch are free.
    with adaptive.patch(model):
        model.mine = types.MethodType(lambda self: 3, model)
    assert model.mine() == 3
