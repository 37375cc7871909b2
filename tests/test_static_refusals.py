"""What static steps cannot do is refused by name, when patching or when generating."""

import pytest
import torch
from models import greedy, padded, token_ids
from speculation_cases import drafting, model_of, plain, speculated
from transformers import DynamicCache, TextStreamer
from transformers.generation import MaxTimeCriteria

import adaptive
from adaptive.layers.hf_static_cache import StaticCacheLayer
from adaptive.policy import ModelShape, Plan, Policy

STATIC = {"exit_layer": 2, "draft": 3, "static": True}


class Tokens:
    """Stands in for a tokenizer."""

    def decode(self, ids, **_):
        return ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"do_sample": True}, "do_sample=True"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor"),
        ({"min_new_tokens": 5, "eos_token_id": 3}, "MinNewTokensLengthLogitsProcessor"),
        ({"stopping_criteria": [MaxTimeCriteria(9.0)]}, "MaxTimeCriteria"),
        ({"streamer": TextStreamer(Tokens())}, "streamer"),
        ({"past_key_values": DynamicCache()}, "past_key_values cannot be given"),
        ({"cache_implementation": "static"}, "StaticLayer"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True"),
        ({"use_cache": False}, "use_cache=True"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_calls_are_refused_by_name(options, words):
    model = model_of("llama")
    want = plain(model, token_ids(1), 8)
    with adaptive.patch(model, adaptive.SelfSpeculative(**STATIC)) as patched:
        with pytest.raises(NotImplementedError, match=words):
            model.generate(token_ids(1), **{"max_new_tokens": 8, "pad_token_id": 0, **options})
        with patched.disabled():
            greedy(model, token_ids(1), 2)
        assert torch.equal(greedy(model, token_ids(1)), want)


def test_dropout_and_autocast_are_refused():
    model = drafting("llama", attention_dropout=0.1)
    with adaptive.patch(model, adaptive.SelfSpeculative(**STATIC)):
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(NotImplementedError, match="autocast"),
        ):
            greedy(model, token_ids(1))
        with pytest.raises(NotImplementedError, match="native kernel computes, got dropout"):
            greedy(model.train(), token_ids(1))
        greedy(model.eval(), token_ids(1))


@pytest.mark.parametrize(
    ("case", "options", "words"),
    [
        ("mixtral", {}, "experts"),
        ("qwen3_moe", {}, "experts"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type='dynamic'",
        ),
    ],
    ids=str,
)
def test_models_whose_steps_ask_the_host_are_refused(case, options, words):
    model = drafting(case, **options)
    with pytest.raises(adaptive.UnsupportedModel, match=words):
        adaptive.patch(model, adaptive.SelfSpeculative(**STATIC))
    with adaptive.patch(model, adaptive.SelfSpeculative(exit_layer=2, draft=3)):
        greedy(model, token_ids(1), 4)


@pytest.mark.parametrize(
    "fields",
    [
        {"exit_layer": 2},
        {"skip": ((2,), (2,)), "draft": 3},
        {"skip": "search", "draft": 3},
        {"tree": True},
        {"exit_layer": 2, "draft": 3, "tree": True},
        {"exit_layer": 2, "draft": 3, "draft_vocabulary": 9},
        {"exit_layer": 2, "draft": 3, "draft_head": "int8"},
    ],
    ids=str,
)
def test_forms_without_one_fixed_step_are_refused(fields):
    adaptive.SelfSpeculative(**fields)
    with pytest.raises(ValueError, match=r"SelfSpeculative\.static must be False with"):
        adaptive.SelfSpeculative(**fields, static=True)


def test_the_field_is_a_flag_and_makes_the_round_trip():
    with pytest.raises(ValueError, match="static must be True or False, got 1"):
        adaptive.SelfSpeculative(exit_layer=2, draft=3, static=1)
    policy = adaptive.SelfSpeculative(**STATIC)
    assert Policy.from_dict(policy.to_dict()) == policy
    assert policy != adaptive.SelfSpeculative(exit_layer=2, draft=3)


@pytest.mark.parametrize(
    ("before", "windows", "words"),
    [
        ([], (8, None, 8, None), "windows"),
        ([adaptive.Exact(stock_layers=(1,))], (None,) * 4, "stock_layers"),
        ([adaptive.Quest(budget=128)], (None,) * 4, "cannot be combined"),
    ],
    ids=["windows", "stock layers", "Quest"],
)
def test_plans_that_need_more_than_lengths_are_refused(before, windows, words):
    shape = ModelShape(
        model_type="llama", heads=(4,) * 4, kv_heads=(2,) * 4, head_dim=(32,) * 4, windows=windows
    )
    for static in (True, False):
        chosen = [*before, adaptive.SelfSpeculative(exit_layer=2, draft=3, static=static)]
        if static or words == "cannot be combined":
            with pytest.raises(ValueError, match=words):
                Plan.make(shape, chosen)
        else:
            Plan.make(shape, chosen)


def test_keys_that_a_model_changes_on_their_way_are_refused(monkeypatch):
    """Lengths of rows travel with the keys; without them, all of the memory would be read."""
    kind = type(model_of("llama").model.layers[0].self_attn)
    name = "adaptive.layers.hf_static_cache.StaticCacheLayer.update"
    update = StaticCacheLayer.update
    monkeypatch.setattr(name, lambda *args: tuple(t * 1.0 for t in update(*args)))
    with pytest.raises(NotImplementedError, match=f"as the cache gave them, {kind.__name__}"):
        speculated(model_of("llama"), padded(batch=2), policy=STATIC)
