"""Self-speculation makes the tokens of plain decoding, whatever is drafted and whenever it ends."""

import copy
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGS, PAD, greedy, padded, token_ids
from speculation_cases import LAYERS, drafting
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LogitsProcessor,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
)

import adaptive

TOKENS = 20
LAB = Path(__file__).parents[1] / "bench" / "lab" / "model"
MODELS = {}
FORMS = [{"exit_layer": 2, "draft": 4}, {"skip": ((2, 3), (1, 3)), "draft": 4}, {"tree": True}]


def model_of(case):
    """A model of the case, made once."""
    if case not in MODELS:
        MODELS[case] = drafting(case)
    return MODELS[case]


def plain(model, inputs, tokens=TOKENS, **options):
    """What the patched model makes without speculation."""
    with adaptive.patch(model):
        return greedy(model, inputs, tokens, **options)


def speculated(model, inputs, tokens=TOKENS, *, policy, **options):
    """What it makes with it, and the log."""
    with adaptive.patch(model, adaptive.SelfSpeculative(**policy)) as patched:
        made = greedy(model, inputs, tokens, **options)
        return made, patched.report().speculation


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("policy", FORMS, ids=str)
def test_every_family_makes_the_same_tokens(case, policy):
    model = model_of(case)
    if "skip" in policy and len(set(_windows(case))) > 1:
        policy = {"skip": ((), (1, 3)), "draft": 4}
    if "tree" in policy and any(getattr(model.config, f, None) for f in ("sliding_window",)):
        with pytest.raises(ValueError, match=r"SelfSpeculative\.tree must be False"):
            adaptive.patch(model, adaptive.SelfSpeculative(**policy))
        return
    for inputs in (token_ids(batch=1), padded(batch=3)):
        made, log = speculated(model, inputs, policy=policy)
        assert torch.equal(made, plain(model, inputs))
        assert log.tokens == TOKENS * len(made)
        assert log.drafted > 0


def _windows(case):
    return getattr(model_of(case).config, "layer_types", None) or ["all"]


def test_right_drafts_are_what_saves_passes():
    _, log = speculated(model_of("llama"), token_ids(1), policy={"exit_layer": 2, "draft": 4})
    assert 0.3 < log.acceptance < 1
    assert log.steps + log.plain_steps == TOKENS - 1 - log.accepted


@settings(max_examples=40)
@given(
    exit_layer=st.integers(1, LAYERS - 1),
    draft=st.none() | st.integers(1, 15),
    batch=st.integers(1, 4),
    tokens=st.integers(1, 18),
    case=st.sampled_from(["llama", "gpt2", "mistral_window", "gemma3"]),
)
def test_any_exit_length_and_batch_makes_the_same_tokens(exit_layer, draft, batch, tokens, case):
    inputs = padded(batch=batch)
    policy = {"exit_layer": exit_layer, "draft": draft}
    made, _ = speculated(model_of(case), inputs, tokens, policy=policy)
    assert torch.equal(made, plain(model_of(case), inputs, tokens))


@settings(max_examples=25)
@given(
    batch=st.integers(1, 4),
    tokens=st.integers(1, 40),
    case=st.sampled_from(["llama", "gpt2", "gpt_neox"]),
    repeats=st.booleans(),
)
def test_trees_make_the_same_tokens(batch, tokens, case, repeats):
    inputs = padded(batch=batch)
    if repeats:  # so that the table knows something
        inputs = {name: value.repeat(1, 2) for name, value in inputs.items()}
    made, _ = speculated(model_of(case), inputs, tokens, policy={"tree": True})
    assert torch.equal(made, plain(model_of(case), inputs, tokens))


def test_a_tree_saves_passes_where_text_repeats():
    """Greedy decoding of a random model runs into a loop, which the table knows after one turn."""
    model = model_of("llama")
    made, log = speculated(model, token_ids(1), 100, policy={"tree": True})
    assert torch.equal(made, plain(model, token_ids(1), 100))
    assert log.accepted > log.steps > 0
    assert log.tokens == 100


@settings(max_examples=25)
@given(
    attention=st.sets(st.integers(1, LAYERS - 1)).map(sorted),
    mlp=st.sets(st.integers(0, LAYERS - 1), min_size=1).map(sorted),
    draft=st.none() | st.integers(1, 15),
    batch=st.integers(1, 3),
    case=st.sampled_from(["llama", "gpt2", "gpt_neox", "mistral_window"]),
)
def test_any_skipped_modules_make_the_same_tokens(attention, mlp, draft, batch, case):
    policy = {"skip": (attention, mlp), "draft": draft}
    made, _ = speculated(model_of(case), padded(batch=batch), 12, policy=policy)
    assert torch.equal(made, plain(model_of(case), padded(batch=batch), 12))


@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma3", "olmo2", "gpt_neox"])
def test_all_drafts_are_right_if_the_other_layers_do_nothing(case):
    model = drafting(case, factor=0.0)
    _, log = speculated(model, token_ids(1), policy={"exit_layer": 2, "draft": 3})
    assert log.acceptance == 1.0


@pytest.mark.parametrize(
    ("case", "policy"),
    [
        *(("llama", policy) for policy in FORMS),
        ("mistral_window", {"exit_layer": 2, "draft": 5}),
        ("mistral_window", {"skip": ((2,), (2, 3)), "draft": 5}),
    ],
    ids=str,
)
def test_the_cache_is_that_of_plain_decoding(case, policy):
    model = model_of(case)
    caches = []
    for chosen in ([], [adaptive.SelfSpeculative(**policy)]):
        cache = DynamicCache(config=model.config)
        with adaptive.patch(model, *chosen):
            greedy(model, token_ids(1), TOKENS, past_key_values=cache)
        caches.append(cache)
    for left, right in zip(caches[0].layers, caches[1].layers, strict=True):
        assert left.get_seq_length() == right.get_seq_length() == 20 + TOKENS - 1
        torch.testing.assert_close(left.keys, right.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(left.values, right.values, rtol=1e-4, atol=1e-5)


def test_a_conversation_goes_on_from_the_cache():
    model = model_of("llama")
    made = []
    for chosen in ([], [adaptive.SelfSpeculative(exit_layer=2, draft=4)]):
        cache = DynamicCache(config=model.config)
        with adaptive.patch(model, *chosen):
            first = greedy(model, token_ids(1), 8, past_key_values=cache)
            turn = torch.cat([first, token_ids(1, 5, seed=9)], 1)
            made.append(greedy(model, turn, 8, past_key_values=cache))
    assert torch.equal(*made)


class OneDraft(LogitsProcessor):
    """Forbids the last token, so that greedy search depends on the processor."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"logits_processor": [OneDraft()]},
        {"min_new_tokens": 7, "eos_token_id": list(range(2, 60))},
        {"prefill_chunk_size": 6},
    ],
    ids=lambda options: next(iter(options)),
)
def test_logits_processors_see_every_draft(batch, options):
    model, inputs = model_of("llama"), padded(batch=batch)
    want = plain(model, inputs, **options)
    for policy in FORMS:
        made, _ = speculated(model, inputs, policy=policy, **options)
        assert torch.equal(made, want)


@pytest.mark.parametrize("draft", [1, 4, 15])
def test_a_stop_token_inside_a_draft_ends_the_row(draft):
    model, inputs = model_of("llama"), padded(batch=4)
    free = plain(model, inputs)[:, 20:]
    for at in (0, 1, 3, 6):
        stop = int(free[1, at])
        want = plain(model, inputs, eos_token_id=stop)
        policy = {"exit_layer": 2, "draft": draft}
        made, _ = speculated(model, inputs, policy=policy, eos_token_id=stop)
        assert torch.equal(made, want)


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


@pytest.mark.parametrize("policy", FORMS, ids=str)
def test_sampling_follows_the_models_distribution(policy):
    """Chi-square of the second and third token over many rows of one prompt."""
    model, rows = drafting("llama", vocab_size=16), 2000
    prompt = torch.randint(3, 16, (1, 24), generator=torch.Generator().manual_seed(2))
    counts = []
    for chosen in ([], [adaptive.SelfSpeculative(**policy)]):
        torch.manual_seed(11)
        with adaptive.patch(model, *chosen) as patched:
            made = model.generate(
                prompt.repeat(rows, 1),
                max_new_tokens=3,
                do_sample=True,
                temperature=3.0,
                top_k=0,
                pad_token_id=PAD,
                eos_token_id=None,
            )
            if chosen:
                assert 0.05 < patched.report().speculation.acceptance < 0.999
        pairs = made[:, 25] * 16 + made[:, 26]
        counts.append(torch.bincount(pairs, minlength=256).double())
    ours, theirs = counts
    often = ours + theirs >= 10
    statistic = ((ours - theirs) ** 2 / (ours + theirs))[often].sum()
    degrees = int(often.sum()) - 1
    assert degrees > 20
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations


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
