"""What `generate_many` refuses, and what it leaves behind when something goes wrong."""

import copy
import gc
import weakref

import pytest
import torch
from early_exit_cases import SOME, model_of
from models import greedy, make
from refill_cases import same
from speculation_cases import drafting
from transformers import DynamicCache, LogitsProcessor

import adaptive
from adaptive.layers import hf_refill
from adaptive.layers.hf_cache import AdaptiveCacheLayer

PROMPTS = [torch.arange(2, 2 + n) for n in (9, 3, 14)]
MODEL = model_of("llama")
LEAVING = adaptive.EarlyExit(**SOME, rows="alone", audit=None)
DRAFTING = adaptive.SelfSpeculative(exit_layer=2, draft=2)


@pytest.mark.parametrize(
    ("prompts", "options", "error", "words"),
    [
        (PROMPTS[0], {}, TypeError, "prompts must be a list"),
        (
            [PROMPTS[0], PROMPTS[1][None]],
            {},
            ValueError,
            r"prompts\[1\] must be token ids .* \[1, 3\]",
        ),
        ([torch.zeros(0, dtype=torch.long)], {}, ValueError, "at least one, got"),
        (
            [PROMPTS[0], [2, 128]],
            {},
            IndexError,
            r"prompts\[1\] must hold token ids from 0 to 127, got 128",
        ),
        ([[2, -1]], {}, IndexError, r"prompts\[0\] must hold token ids from 0 to 127, got -1"),
        (None, {}, TypeError, "prompts must be a list of token ids .* got NoneType"),
        (["ab"], {}, TypeError, r"prompts\[0\] must be token ids \[tokens\]: .*'str'"),
        ([torch.ones(3)], {}, TypeError, r"prompts\[0\] must be int32 or int64, got torch.float32"),
        (PROMPTS, {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        (PROMPTS, {"batch_size": -1}, ValueError, "batch_size must be at least 1, got -1"),
        (PROMPTS, {"batch_size": 2.0}, TypeError, "batch_size must be an int, got float"),
        (PROMPTS, {"max_new_tokens": 0}, ValueError, "whole numbers from 1 on, got 0"),
        (PROMPTS, {"max_new_tokens": [2, 3]}, ValueError, "one each for 3, got 2"),
        (PROMPTS, {"max_new_tokens": [2, -3, 2]}, ValueError, "whole numbers from 1 on, got -3"),
        ([], {"max_new_tokens": 0}, ValueError, "whole numbers from 1 on, got 0"),
        (PROMPTS, {"max_new_tokens": 2.5}, TypeError, "a list of them or None, got float"),
        (PROMPTS, {"max_new_tokens": [2, True, 2]}, TypeError, "or None, got bool"),
        (PROMPTS, {"max_new_tokens": "abc"}, TypeError, "a list of them or None, got str"),
        (PROMPTS, {"on_result": 3}, TypeError, "on_result must be callable or None, got int"),
        ([], {"on_result": 3}, TypeError, "on_result must be callable or None, got int"),
        (PROMPTS, {"generation_config": 3}, TypeError, "must be a GenerationConfig, got int"),
        (PROMPTS, {"logits_processor": [3]}, TypeError, r"list of callables, got \[3\]"),
        (PROMPTS, {"stopping_criteria": len}, TypeError, "stopping_criteria must be a list"),
        (PROMPTS, {"attention_mask": PROMPTS[0]}, NotImplementedError, "attention_mask is not"),
        (PROMPTS, {"past_key_values": DynamicCache()}, NotImplementedError, "past_key_values is"),
        (PROMPTS, {"num_beams": 2}, NotImplementedError, "num_beams=2 is not supported"),
        (PROMPTS, {"num_return_sequences": 2}, NotImplementedError, "num_return_sequences=2"),
        (PROMPTS, {"cache_implementation": "static"}, NotImplementedError, "StaticLayer"),
        (PROMPTS, {"cache_implementation": "offloaded"}, NotImplementedError, "offloaded"),
        (PROMPTS, {"no_such_option": 2}, ValueError, "no_such_option"),
    ],
)
def test_what_has_no_meaning_is_refused_before_anything_runs(prompts, options, error, words):
    with adaptive.patch(MODEL) as patched:
        with pytest.raises(error, match=words):
            patched.generate_many(prompts, **{"max_new_tokens": 4, **options})
        assert patched.report().forward_calls == 0


@pytest.mark.parametrize(
    "policy",
    [
        adaptive.SelfSpeculative(skip="search"),
        adaptive.Quest(budget=128),
        adaptive.StreamingLLM(sinks=2, window=8),
        adaptive.MixtureOfDepths(layers=(1,), decide="sequence"),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_policies_that_tie_a_cache_to_its_rows_are_named(policy):
    words, patched = f"{type(policy).__name__} does not go along", adaptive.patch(MODEL, policy)
    with patched, pytest.raises(NotImplementedError, match=words):
        patched.generate_many(PROMPTS, max_new_tokens=2)


def test_a_model_that_does_not_generate_is_refused():
    for model in (make("llama").model, torch.nn.MultiheadAttention(64, 2).eval()):
        words, patched = rf"must be a decoder .* got {type(model).__name__}", adaptive.patch(model)
        with patched, pytest.raises(NotImplementedError, match=words):
            patched.generate_many(PROMPTS)


def test_angles_that_depend_on_other_rows_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = make("llama", rope_scaling=rope, max_position_embeddings=16)
    with adaptive.patch(model) as patched:
        with pytest.raises(NotImplementedError, match="must stay within 16 tokens"):
            patched.generate_many(PROMPTS, max_new_tokens=4)
        assert len(patched.generate_many(PROMPTS, max_new_tokens=2)) == 3


def test_a_patch_that_is_not_at_work_is_refused():
    patched = adaptive.patch(MODEL)
    with patched.disabled(), pytest.raises(adaptive.PatchConflict, match="outside disabled"):
        patched.generate_many(PROMPTS)
    patched.unpatch()
    with pytest.raises(adaptive.PatchConflict, match="cannot generate_many"):
        patched.generate_many(PROMPTS)


def test_unpatching_in_between_is_refused():
    patched = adaptive.patch(MODEL)
    with pytest.raises(adaptive.PatchConflict, match="cannot go on"):
        patched.generate_many(
            PROMPTS, batch_size=2, max_new_tokens=3, on_result=lambda *_: patched.unpatch()
        )
    assert not patched.active


class Interrupt(LogitsProcessor):
    """Raises after some calls."""

    def __init__(self, left):
        self.left = left

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return scores


@pytest.mark.parametrize(
    "policies", [(), (LEAVING,), (DRAFTING,)], ids=["exact", "leaving", "drafting"]
)
@pytest.mark.parametrize("at", [0, 1, 6])
def test_an_interrupt_leaves_nothing(policies, at, monkeypatch):
    caches, opened = [], hf_refill.Refill._put

    def watched(self, *given):
        caches.append(weakref.ref(self.passes.cache))
        opened(self, *given)

    monkeypatch.setattr(hf_refill.Refill, "_put", watched)
    model = drafting("llama")
    with adaptive.patch(model, *policies) as patched:
        wanted = patched.generate_many(PROMPTS, batch_size=2, max_new_tokens=5)
        with pytest.raises(KeyboardInterrupt):
            patched.generate_many(
                PROMPTS, batch_size=2, max_new_tokens=5, logits_processor=[Interrupt(at)]
            )
        gc.collect()
        assert len(caches) >= 2
        assert not any(cache() for cache in caches)
        again = patched.generate_many(PROMPTS, batch_size=2, max_new_tokens=5)
        same(again, wanted)
        one = greedy(model, PROMPTS[0][None], 5)[0]
        assert torch.equal(one, wanted[0])


def test_an_error_of_who_gets_a_result_comes_out():
    def fail(*_):
        raise OSError("disk full")

    with adaptive.patch(MODEL) as patched:
        with pytest.raises(OSError, match="disk full"):
            patched.generate_many(PROMPTS, max_new_tokens=2, on_result=fail)
        assert len(patched.generate_many(PROMPTS, max_new_tokens=2)) == 3


def test_a_copy_of_a_patched_model_fills_its_own_rows():
    model = drafting("llama")
    patched = adaptive.patch(model, LEAVING)
    wanted = patched.generate_many(PROMPTS, batch_size=2, max_new_tokens=5)
    twin = adaptive.patched(copy.deepcopy(model))
    made = twin.generate_many(PROMPTS, batch_size=2, max_new_tokens=5)
    same(made, wanted)
    assert patched.report().refill.calls == 1
    assert twin.report().refill.calls == 2  # copied with its counters
    stock = greedy(drafting("llama"), PROMPTS[0][None], 5)
    assert torch.equal(greedy(patched.unpatch(), PROMPTS[0][None], 5), stock)
    assert twin.active


def test_counters_begin_anew_and_verify_leaves_them():
    with adaptive.patch(MODEL) as patched:
        patched.generate_many(PROMPTS, batch_size=2, max_new_tokens=3)
        patched.verify(PROMPTS[0][None], new_tokens=2)
        assert patched.report().refill.prompts == 3
        patched.reset_stats()
        assert patched.report().refill is None


def test_inference_mode_and_gradients_stay_as_they_were():
    with adaptive.patch(MODEL) as patched:
        wanted = patched.generate_many(PROMPTS, batch_size=2, max_new_tokens=4)
        assert torch.is_grad_enabled()
        with torch.inference_mode():
            made = patched.generate_many(PROMPTS, batch_size=2, max_new_tokens=4)
    same(made, wanted)


@pytest.mark.parametrize("tokens", [3, 0, -2])
def test_a_shift_moves_what_a_layer_holds(tokens):
    layer = AdaptiveCacheLayer()
    keys, values = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 8)
    with torch.no_grad():
        layer.update(keys, values)
        layer.shift(tokens)
    for held, before in ((layer.keys, keys), (layer.values, values)):
        assert held.shape[2] == 5 + tokens
        assert (held[:, :, : max(tokens, 0)] == 0).all()
        assert torch.equal(held[:, :, max(tokens, 0) :], before[:, :, max(-tokens, 0) :])


def test_a_row_is_overwritten_alone():
    layer, other = AdaptiveCacheLayer(), AdaptiveCacheLayer()
    old, new = torch.randn(3, 2, 5, 4), torch.randn(2, 2, 3, 4)
    with torch.no_grad():
        layer.update(old, old)
        other.update(new, new)
        layer.put(1, other, 1)
    assert torch.equal(layer.keys[::2], old[::2])
    assert torch.equal(layer.values[1, :, 2:], new[1])
    assert torch.equal(layer.keys[1, :, :2], old[1, :, :2])
