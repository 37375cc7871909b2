"""Cache correction: sparse tokens are run again densely, and nothing is lost when that fails."""

import copy

import pytest
import torch
from models import make, padded, token_ids
from transformers import StaticCache

import adaptive
from adaptive.layers.correction import NAME, correct
from adaptive.policy import TidalDecode

PROMPT = 60
EVERY = 6


@pytest.fixture
def model():
    return make("llama", num_hidden_layers=5)


def policy(**fields):
    given = {"budget": 12, "sinks": 2, "recent": 4, "min_context": 1, "select_layers": (1,)}
    return TidalDecode(**{**given, "dense_layers": (0,), "correct_every": EVERY, **fields})


def steps(model, ids, cache, start, stop, mask=None):
    for i in range(start, stop):
        seen = None if mask is None else mask[:, : i + 1]
        model(ids[:, i : i + 1], attention_mask=seen, past_key_values=cache)


def prefill(model, ids, mask=None):
    return model(ids[:, :PROMPT], attention_mask=mask, use_cache=True).past_key_values


def differences(cache, other):
    return [
        float((a.keys - b.keys).abs().max())
        for a, b in zip(cache.layers, other.layers, strict=True)
    ]


@pytest.mark.parametrize("batch", [1, 2])
def test_corrected_tokens_are_those_of_a_dense_model(model, batch):
    ids = token_ids(batch=batch, tokens=PROMPT + EVERY + 1)
    with torch.no_grad():
        with adaptive.patch(model):
            dense = prefill(model, ids)
            steps(model, ids, dense, PROMPT, PROMPT + EVERY)
        with adaptive.patch(model, policy()) as patched:
            cache = prefill(model, ids)
            steps(model, ids, cache, PROMPT, PROMPT + EVERY)
            assert max(differences(cache, dense)) > 0.01
            steps(model, ids, cache, PROMPT + EVERY, PROMPT + EVERY + 1)
            assert patched.report().notes == {f"corrected {EVERY} tokens": 1}
            assert cache.get_seq_length() == PROMPT + EVERY + 1
            cache.crop(-1)
    assert max(differences(cache, dense)) < 1e-4


def test_padding_is_left_out_of_the_correction(model):
    inputs = padded(tokens=PROMPT)
    more = token_ids(tokens=EVERY + 1, seed=5)
    ids = torch.cat([inputs["input_ids"], more], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    with torch.no_grad(), adaptive.patch(model):
        dense = prefill(model, ids, mask[:, :PROMPT])
        steps(model, ids, dense, PROMPT, PROMPT + EVERY, mask)
    with torch.no_grad(), adaptive.patch(model, policy()) as patched:
        cache = prefill(model, ids, mask[:, :PROMPT])
        steps(model, ids, cache, PROMPT, PROMPT + EVERY + 1, mask)
        assert patched.report().notes == {f"corrected {EVERY} tokens": 1}
        cache.crop(-1)
    for ours, theirs in zip(cache.layers, dense.layers, strict=True):
        seen = mask[:, None, : PROMPT + EVERY, None].bool()
        torch.testing.assert_close(ours.keys * seen, theirs.keys * seen, rtol=0, atol=1e-4)


def test_a_failing_correction_loses_nothing(model):
    ids = token_ids(batch=1, tokens=PROMPT + EVERY + 1)
    with torch.no_grad(), adaptive.patch(model, policy()):
        cache = prefill(model, ids)
        steps(model, ids, cache, PROMPT, PROMPT + EVERY)
        before = copy.deepcopy(cache)
        layer = model.model.layers[3]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(layer.mlp), "forward", Breaking(after=2))
            with pytest.raises(RuntimeError, match="out of something"):
                steps(model, ids, cache, PROMPT + EVERY, PROMPT + EVERY + 1)
        assert cache.get_seq_length() == PROMPT + EVERY
        assert [layer.get_seq_length() for layer in cache.layers] == [PROMPT + EVERY] * 5
        for layer, old in zip(cache.layers, before.layers, strict=True):
            assert torch.equal(layer.keys[:, :, :PROMPT], old.keys[:, :, :PROMPT])
        steps(model, ids, cache, PROMPT + EVERY, PROMPT + EVERY + 1)


class Breaking:
    """An MLP that fails after some calls."""

    def __init__(self, after):
        self.left = after

    def __call__(self, x):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of something")
        return x


@pytest.mark.parametrize("change", ["crop", "beams"])
def test_what_awaits_correction_follows_the_cache(model, change):
    ids = token_ids(tokens=PROMPT + 2 * EVERY)
    with torch.no_grad(), adaptive.patch(model, policy()):
        cache = prefill(model, ids)
        steps(model, ids, cache, PROMPT, PROMPT + 4)
        pending = cache.layers[0].store.derived[NAME]
        held = pending.inputs()["input_ids"]
        if change == "crop":
            cache.crop(-3)
            assert torch.equal(pending.inputs()["input_ids"], held[:, :1])
            cache.crop(-3)
            assert pending.tokens == 0
        else:
            cache.reorder_cache(torch.tensor([1, 1]))
            assert torch.equal(pending.inputs()["input_ids"], held[[1, 1]])


def test_generation_corrects_and_says_so(model):
    ids = token_ids(tokens=PROMPT)
    for options in ({}, {"num_beams": 2}):
        with adaptive.patch(model, policy()) as patched:
            model.generate(
                ids, max_new_tokens=2 * EVERY + 3, do_sample=False, pad_token_id=0, **options
            )
            assert patched.report().notes == {f"corrected {EVERY} tokens": 2}


def test_masks_of_another_kind_are_not_corrected_and_it_says_so(model):
    ids = token_ids(batch=1, tokens=PROMPT + EVERY + 2)
    with torch.no_grad(), adaptive.patch(model, policy()) as patched:
        cache = prefill(model, ids)
        steps(model, ids, cache, PROMPT, PROMPT + EVERY)
        mask = torch.ones(1, 1, 1, PROMPT + EVERY + 1, dtype=torch.bool)
        model(ids[:, -2:-1], attention_mask=mask, past_key_values=cache)
        notes = patched.report().notes
    assert notes == {"not corrected: the attention mask is not one of padding": 1}


def test_tokens_that_another_path_wrote_between_are_not_overwritten(model):
    ids = token_ids(batch=1, tokens=PROMPT + EVERY + 4)
    with torch.no_grad(), adaptive.patch(model, policy()) as patched:
        cache = prefill(model, ids)
        steps(model, ids, cache, PROMPT, PROMPT + EVERY)
        with patched.disabled():
            steps(model, ids, cache, PROMPT + EVERY, PROMPT + EVERY + 2)
        before = [layer.keys.clone() for layer in cache.layers]
        steps(model, ids, cache, PROMPT + EVERY + 2, PROMPT + EVERY + 3)
        notes = patched.report().notes
    for layer, old in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, : old.shape[2]], old)
    assert notes == {"not corrected: a pass without the policy wrote tokens between": 1}


def test_tokens_between_are_noticed_before_a_correction_is_due(model):
    ids = token_ids(batch=1, tokens=PROMPT + 2 * EVERY)
    with torch.no_grad(), adaptive.patch(model, policy()) as patched:
        cache = prefill(model, ids)
        steps(model, ids, cache, PROMPT, PROMPT + 2)
        with patched.disabled():
            steps(model, ids, cache, PROMPT + 2, PROMPT + 3)
        steps(model, ids, cache, PROMPT + 3, PROMPT + 5)
        pending = cache.layers[0].store.derived[NAME]
        assert torch.equal(pending.inputs()["input_ids"], ids[:, PROMPT + 3 : PROMPT + 5])
        assert patched.report().notes == {
            "not corrected: a pass without the policy wrote tokens between": 1
        }


def test_a_row_that_becomes_several_is_corrected_in_each(model):
    ids = token_ids(batch=1, tokens=PROMPT + EVERY + 1)
    with torch.no_grad(), adaptive.patch(model, policy()) as patched:
        cache = prefill(model, ids)
        steps(model, ids, cache, PROMPT, PROMPT + 2)
        cache.batch_repeat_interleave(3)
        steps(model, ids.expand(3, -1), cache, PROMPT + 2, PROMPT + EVERY + 1)
        assert patched.report().notes == {f"corrected {EVERY} tokens": 1}


def test_a_mapping_of_masks_is_not_taken_for_no_mask(model):
    ids = token_ids(batch=1, tokens=PROMPT + EVERY + 2)
    with torch.no_grad(), adaptive.patch(model, policy()) as patched:
        cache = prefill(model, ids)
        steps(model, ids, cache, PROMPT, PROMPT + EVERY)
        kwargs = {"attention_mask": {"full_attention": None}}
        correct(model.model, patched._record, kwargs, cache, EVERY)
        assert patched.report().notes == {
            "not corrected: the attention mask is not one of padding": 1
        }


def test_a_cache_that_cannot_be_corrected_is_told(model):
    ids = token_ids(batch=1, tokens=PROMPT + EVERY)
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + EVERY)
    with torch.no_grad(), adaptive.patch(model, policy()) as patched:
        model(ids[:, :PROMPT], past_key_values=cache, use_cache=True)
        steps(model, ids, cache, PROMPT, PROMPT + EVERY)
        assert patched.report().notes == {
            "not corrected: the cache is not one that patch() took over": EVERY
        }
