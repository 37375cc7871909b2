"""Self-speculation in use: streaming, stopping, interrupts, copies, and what it refuses."""

import copy
import threading

import pytest
import torch
from models import greedy, token_ids
from speculation_cases import FORMS, LAB, TOKENS, drafting, model_of, plain, speculated
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
)

import adaptive


class After(StoppingCriteria):
    """Stops a row at a length of its own."""

    def __call__(self, input_ids, scores, **kwargs):
        done = input_ids.shape[1] >= 25 + int(input_ids[0, 19]) % 5
        return torch.full((len(input_ids),), done)


def test_stopping_criteria_are_asked_after_every_token():
    model = model_of("llama")
    want = plain(model, token_ids(1), stopping_criteria=[After()])
    policy = {"exit_layer": 2, "draft": 6}
    made, _ = speculated(model, token_ids(1), policy=policy, stopping_criteria=[After()])
    assert torch.equal(made, want)
    assert made.shape[1] < 20 + TOKENS


class Tokens:
    """Stands in for a tokenizer."""

    def decode(self, ids, **_):
        return "".join(f"{int(i)} " for i in ids)


def test_streaming_gives_every_token_once_and_in_order():
    model = model_of("llama")
    streamer = TextIteratorStreamer(Tokens(), skip_prompt=True, timeout=60)
    with adaptive.patch(model, adaptive.SelfSpeculative(exit_layer=2, draft=4)):
        options = {"streamer": streamer}
        run = threading.Thread(target=greedy, args=(model, token_ids(1), TOKENS), kwargs=options)
        run.start()
        text = "".join(streamer)
        run.join()
    want = plain(model, token_ids(1))[0, 20:].tolist()
    assert [int(word) for word in text.split()] == want


def test_stop_strings_end_a_row_inside_a_draft():
    tokenizer = AutoTokenizer.from_pretrained(LAB)
    model = AutoModelForCausalLM.from_pretrained(LAB).eval()
    ids = tokenizer("def first(items):\n    return items[0]\n\ndef ", return_tensors="pt").input_ids
    options = {"stop_strings": ["\n"], "tokenizer": tokenizer}
    want = plain(model, ids, 40, **options)
    made, _ = speculated(model, ids, 40, policy={"exit_layer": 4, "draft": 6}, **options)
    assert torch.equal(made, want)
    assert want.shape[1] < ids.shape[1] + 40


class Interrupt(LogitsProcessor):
    """Raises at a call."""

    def __init__(self, at):
        self.left = at

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return scores


@pytest.mark.parametrize("at", range(2, 9))
@pytest.mark.parametrize("policy", FORMS, ids=str)
def test_an_interrupt_leaves_cache_and_model_whole(at, policy):
    model, cache = model_of("llama"), DynamicCache()
    want = plain(model, token_ids(1))
    with adaptive.patch(model, adaptive.SelfSpeculative(**policy)) as patched:
        with pytest.raises(KeyboardInterrupt):
            greedy(model, token_ids(1), past_key_values=cache, logits_processor=[Interrupt(at)])
        lengths = {layer.get_seq_length() for layer in cache.layers}
        assert len(lengths) == 1  # no layer is ahead of another
        assert lengths.pop() >= 20
        assert torch.equal(greedy(model, token_ids(1), TOKENS), want)
        assert patched.report().speculation.calls == 2
    assert "generate" not in model.__dict__


def test_off_is_the_stock_model_and_unpatching_leaves_nothing():
    model = model_of("llama")
    stock = model(token_ids()).logits
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    patched = adaptive.patch(model, adaptive.SelfSpeculative(exit_layer=2))
    with patched.disabled():
        assert torch.equal(model(token_ids()).logits, stock)
        assert torch.equal(greedy(model, token_ids()), greedy(model, token_ids()))
        assert patched.report().speculation.calls == 0
    patched.unpatch()
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    assert torch.equal(model(token_ids()).logits, stock)


def test_a_copy_speculates_with_its_own_weights():
    model = drafting("llama")
    adaptive.patch(model, adaptive.SelfSpeculative(exit_layer=2, draft=3))
    want = greedy(model, token_ids(1))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(greedy(copied, token_ids(1)), want)
    assert adaptive.patched(copied).report().speculation.calls == 2
    assert adaptive.patched(model).report().speculation.calls == 1
    adaptive.patched(copied).unpatch()


def test_no_drafts_where_they_do_not_pay():
    """Where drafts are never right they are given up; the report says so."""
    model = drafting("llama", factor=30.0)
    made, log = speculated(model, token_ids(1), 60, policy={"exit_layer": 1})
    assert torch.equal(made, plain(model, token_ids(1), 60))
    assert log.turned_off > 0
    assert log.plain_steps > log.steps
    assert f"given up {log.turned_off} times" in str(log)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True"),
        ({"prompt_lookup_num_tokens": 3}, "prompt lookup drafts already"),
        ({"cache_implementation": "static"}, "StaticLayer"),
        ({"use_cache": False}, "use_cache=True"),
        ({"position_ids": torch.arange(3, 23)[None]}, "position_ids must count the tokens"),
        ({"token_type_ids": torch.zeros(1, 20, dtype=torch.long)}, "token_type_ids"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_done_is_refused_by_name(options, words):
    model = model_of("llama")
    with adaptive.patch(model, adaptive.SelfSpeculative(exit_layer=2)) as patched:
        with pytest.raises((NotImplementedError, ValueError), match=words):
            greedy(model, token_ids(1), **options)
        with patched.disabled():
            greedy(model, token_ids(1), 2)


@pytest.mark.parametrize("field", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_a_configuration_is_looked_at_however_it_is_given(field):
    model = model_of("llama")
    config = GenerationConfig(max_new_tokens=4, pad_token_id=0, **field)
    adaptive.patch(model, adaptive.SelfSpeculative(exit_layer=2))
    with adaptive.patched(model):
        for args, given in (((config,), {}), ((), {"generation_config": config})):
            with pytest.raises(NotImplementedError, match=next(iter(field))):
                model.generate(token_ids(1), *args, **given)


def test_arguments_by_position_are_heeded():
    model = model_of("llama")
    config = GenerationConfig(max_new_tokens=30, do_sample=False, pad_token_id=0)
    want = plain(model, token_ids(1), 30, stopping_criteria=[After()])
    adaptive.patch(model, adaptive.SelfSpeculative(exit_layer=2, draft=6))
    with adaptive.patched(model):
        made = model.generate(token_ids(1), config, None, [After()])
        with pytest.raises(TypeError, match="multiple values"):
            model.generate(token_ids(1), config, generation_config=config)
    assert torch.equal(made, want)


def test_a_static_cache_given_by_hand_is_refused():
    model = model_of("llama")
    cache = StaticCache(config=model.config, max_cache_len=64)
    adaptive.patch(model, adaptive.SelfSpeculative(exit_layer=2))
    with adaptive.patched(model), pytest.raises(NotImplementedError, match="StaticLayer"):
        greedy(model, token_ids(1), past_key_values=cache)


def test_return_dict_has_sequences_and_the_cache():
    model = model_of("llama")
    with adaptive.patch(model, adaptive.SelfSpeculative(exit_layer=2, draft=3)):
        made = greedy(model, token_ids(1), return_dict_in_generate=True)
    assert torch.equal(made.sequences, plain(model, token_ids(1), 8))
    assert made.past_key_values.get_seq_length() == 20 + 8 - 1


def test_what_drafts_cost_is_known_in_the_next_call():
    model = model_of("llama")
    with adaptive.patch(model, adaptive.SelfSpeculative(exit_layer=2)) as patched:
        first = greedy(model, token_ids(1), TOKENS)
        record = patched._record
        length = record.draft_sizes[1]
        measured, checked = length.plain.weight, length._checked
        assert measured >= 1  # the first call had to make a token without drafts
        length._right, length.hits = length._checked, list(length.trials)  # all drafts were right
        length.plain.value, length.plain.weight, length.off = 1e3, 9.0, 0  # plain steps are slow
        patched.reset_stats()
        assert torch.equal(greedy(model, token_ids(1), TOKENS), first)
        assert record.speculation.plain_steps <= 1  # the last token may have no room for a draft
        assert record.draft_sizes[1] is length
        assert length._checked > checked
        greedy(model, token_ids(2), TOKENS)
        assert sorted(record.draft_sizes) == [1, 2]  # of other batches it knows nothing yet


def test_giving_up_is_counted_once_whatever_the_number_of_calls():
    model = model_of("llama")
    with adaptive.patch(model, adaptive.SelfSpeculative(exit_layer=2)) as patched:
        greedy(model, token_ids(1), TOKENS)
        patched._record.draft_sizes[1].turned_off = 7
        patched.reset_stats()
        patched._record.draft_sizes[1].plain.value = 1e3  # nothing is given up now
        greedy(model, token_ids(1), TOKENS)
        assert patched._record.speculation.turned_off == 0
