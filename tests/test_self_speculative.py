"""Self-speculation makes the tokens of plain decoding, whatever is drafted and whenever it ends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGS, greedy, padded, token_ids
from speculation_cases import (
    FORMS,
    LAYERS,
    SIBLINGS,
    TOKENS,
    check_sampling,
    drafting,
    model_of,
    plain,
    speculated,
)
from transformers import DynamicCache, LogitsProcessor

import adaptive


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("policy", FORMS, ids=str)
def test_every_family_makes_the_same_tokens(case, policy):
    model = model_of(case)
    if "skip" in policy and len(set(_windows(case))) > 1:
        policy = {"skip": ((), (1, 3)), "draft": 4}
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
    case=st.sampled_from(["llama", "gpt2", "gpt_neox", "mistral_window", "gemma2"]),
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
    with adaptive.patch(model, adaptive.SelfSpeculative(tree=True)) as patched:
        made = greedy(model, token_ids(1), 100)
        report = patched.report()
    log = report.speculation
    assert torch.equal(made, plain(model, token_ids(1), 100))
    assert log.accepted > 0.5 * log.steps > 0  # when it gives up for a while depends on the clock
    assert log.tokens == 100
    assert report.layers[0].paths == {"tree": log.steps}
    assert report.native_calls["tree_attention:cpu"] == 4 * log.steps


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
        *(("llama", policy) for policy in (*FORMS, SIBLINGS[1])),
        ("mistral_window", {"exit_layer": 2, "draft": 5}),
        ("mistral_window", {"skip": ((2,), (2, 3)), "draft": 5}),
        *(("mistral_window", policy) for policy in (*SIBLINGS, {"tree": True})),
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
    # Chunks of a padded prompt get other positions from transformers 4.57 itself; ours do not.
    want = plain(model, inputs, **({} if "prefill_chunk_size" in options else options))
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


@pytest.mark.parametrize("policy", [*FORMS[:2], SIBLINGS[0]], ids=str)
def test_sampling_follows_the_models_distribution(policy):
    log = check_sampling(policy, tokens=6)
    assert 0.01 < log.acceptance < 0.999


@settings(max_examples=12)
@given(
    drafts=st.integers(1, LAYERS - 1).map(lambda layer: {"exit_layer": layer})
    | st.just({"skip": ((2,), (1, 3))}),
    draft=st.none() | st.integers(1, 15),
    batch=st.integers(1, 4),
    tokens=st.integers(1, 18),
    case=st.sampled_from(["llama", "gpt2", "gpt_neox", "mistral_window", "gemma3"]),
)
def test_drafts_with_siblings_make_the_same_tokens(drafts, draft, batch, tokens, case):
    inputs = padded(batch=batch)
    policy = {**drafts, "draft": draft, "tree": True}
    made, _ = speculated(model_of(case), inputs, tokens, policy=policy)
    assert torch.equal(made, plain(model_of(case), inputs, tokens))


@pytest.mark.parametrize("policy", SIBLINGS, ids=str)
def test_right_siblings_save_passes_and_no_layer_runs_twice(policy):
    """With an early exit; modules that drafts skip have the check run all layers anew."""
    model, rows = drafting("llama", factor=0.5), {0: 0, LAYERS - 1: 0}
    for index in rows:

        def count(module, args, index=index):
            rows[index] += args[0].shape[1]

        model.model.layers[index].self_attn.q_proj.register_forward_pre_hook(count)
    made, log = speculated(model, token_ids(1), 40, policy=policy)
    if "exit_layer" in policy:
        assert rows[0] == rows[LAYERS - 1] == 20 + log.drafted + log.steps + log.plain_steps
    assert log.steps + log.plain_steps == 39 - log.accepted
    assert 0 < log.siblings_right < log.siblings < log.drafted
    assert f"{log.siblings_right} of {log.siblings} siblings right" in str(log)
    assert torch.equal(made, plain(model, token_ids(1), 40))


@pytest.mark.parametrize("head", [{"draft_vocabulary": 20}, {"draft_head": "int8"}], ids=str)
def test_siblings_come_from_a_lighter_head_too(head):
    model = drafting("llama", factor=0.5)
    made, log = speculated(model, padded(batch=2), policy={**SIBLINGS[0], **head})
    assert torch.equal(made, plain(model, padded(batch=2)))
    assert log.siblings > 0
    assert (log.draft_head_bytes > 0) == ("draft_head" in head)
