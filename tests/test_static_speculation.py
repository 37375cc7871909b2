"""Static steps of self-speculation make the tokens of plain decoding, whenever a row ends."""

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGS, greedy, make, padded, token_ids
from speculation_cases import LAYERS, TOKENS, drafting, fields, model_of, plain, speculated
from transformers import LogitsProcessorList, TopKLogitsWarper

import adaptive
from adaptive import _native

REFUSED = {"gemma2", "gemma3", "mistral_window", "mixtral", "qwen3_moe"}
STATIC = {"exit_layer": 2, "draft": 4, "static": True}


@pytest.mark.parametrize("case", sorted(set(CONFIGS) - REFUSED))
def test_every_family_makes_the_same_tokens(case):
    model, inputs = model_of(case), padded(batch=3)
    made, log = speculated(model, inputs, policy=STATIC)
    assert torch.equal(made, plain(model, inputs))
    assert log.tokens == 3 * TOKENS
    made_by_checks = log.drafted // 4 + log.accepted  # a row's last check may bring too many
    assert 3 * (TOKENS - 1) <= made_by_checks <= 3 * (TOKENS - 1 + 4)


@settings(max_examples=20)
@given(
    exit_layer=st.integers(1, LAYERS - 1),
    draft=st.integers(1, 15),
    batch=st.integers(1, 4),
    tokens=st.integers(1, 18),
    case=st.sampled_from(["llama", "gpt2"]),
    stop=st.none() | st.tuples(st.integers(0, 3), st.integers(0, 17)),
)
def test_any_exit_length_batch_and_end_makes_the_same_tokens(
    exit_layer, draft, batch, tokens, case, stop
):
    model, inputs, options = model_of(case), padded(batch=batch), {}
    if stop is not None:  # tokens that some row makes, one of them inside a draft
        free = plain(model, inputs, 18)[:, 20:]
        row, place = stop
        options["eos_token_id"] = [int(free[row % batch, place]), int(free[0, -1])]
    policy = {"exit_layer": exit_layer, "draft": draft, "static": True}
    made, _ = speculated(model, inputs, tokens, policy=policy, **options)
    assert torch.equal(made, plain(model, inputs, tokens, **options))


def test_all_drafts_are_right_if_the_other_layers_do_nothing():
    """And then checks are as few as can be: one for five tokens of every row."""
    model = drafting("llama", factor=0.0)
    _, log = speculated(model, token_ids(2), 1 + 5 * 4, policy=STATIC)
    assert log.acceptance == 1.0
    assert log.steps == 4
    assert "4 checks" in str(log)
    assert "static cache of" in str(log)


def test_no_layer_runs_twice_for_a_token():
    model, rows = drafting("llama"), {0: 0, LAYERS - 1: 0}
    for index in rows:

        def count(module, args, index=index):
            rows[index] += args[0].shape[1]

        model.model.layers[index].self_attn.q_proj.register_forward_pre_hook(count)
    _, log = speculated(model, token_ids(1), policy=STATIC)
    assert rows[0] == rows[LAYERS - 1] == 20 + log.drafted + log.steps


def test_drafts_may_reach_behind_the_last_position_of_a_table():
    """The rest of a draft that has no room any more is made, and must not ask for a position."""
    model = make("gpt2", **fields("gpt2"), n_positions=26)
    policy = {"exit_layer": 2, "draft": 15, "static": True}
    made, _ = speculated(model, token_ids(2), 6, policy=policy)
    assert torch.equal(made, plain(model, token_ids(2), 6))


def test_calls_after_each_other_share_a_step_and_nothing_else():
    model = model_of("llama")
    with adaptive.patch(model, adaptive.SelfSpeculative(**STATIC)):
        made = [greedy(model, padded(batch=2), n) for n in (12, 5, 12)]
        made += [greedy(model, token_ids(2, 30, seed=5), 9)]
        (held,) = model.__dict__["generate"]._steps._held
    for n, ours in zip((12, 5, 12), made, strict=False):
        assert torch.equal(ours, plain(model, padded(batch=2), n))
    assert torch.equal(made[3], plain(model, token_ids(2, 30, seed=5), 9))
    assert held.step.capacity == 256


def test_a_chunked_prompt_and_processors_that_keep_the_best_are_taken():
    model = model_of("llama")
    options = {"logits_processor": LogitsProcessorList([TopKLogitsWarper(5)])}
    made, _ = speculated(model, token_ids(2), policy=STATIC, prefill_chunk_size=6, **options)
    assert torch.equal(made, plain(model, token_ids(2)))


def test_the_dict_has_sequences_and_no_cache():
    model = model_of("llama")
    with adaptive.patch(model, adaptive.SelfSpeculative(**STATIC)):
        made = greedy(model, token_ids(1), return_dict_in_generate=True)
    assert torch.equal(made.sequences, plain(model, token_ids(1), 8))
    assert made.past_key_values is None


@pytest.mark.parametrize("at", [2, 9, 12, 17])
def test_an_interrupt_in_a_layer_leaves_the_model_whole(at):
    """In the prompt, in a draft, in the last pass before a check, and in a check."""
    model = drafting("llama")
    want, stock, calls = plain(model, token_ids(1)), model(token_ids(1)).logits, []

    def interrupt(module, args):
        calls.append(0)
        if len(calls) == at:
            raise KeyboardInterrupt

    with adaptive.patch(model, adaptive.SelfSpeculative(**STATIC)) as patched:
        greedy(model, token_ids(1))
        hooks = [x.mlp.register_forward_pre_hook(interrupt) for x in model.model.layers]
        with pytest.raises(KeyboardInterrupt):
            greedy(model, token_ids(1))
        for hook in hooks:
            hook.remove()
        assert torch.equal(greedy(model, token_ids(1), TOKENS), want)
        with patched.disabled():
            assert torch.equal(model(token_ids(1)).logits, stock)
    assert torch.equal(model(token_ids(1)).logits, stock)
    assert "generate" not in model.__dict__


def test_a_copy_has_steps_and_weights_of_its_own():
    model = drafting("llama")
    adaptive.patch(model, adaptive.SelfSpeculative(**STATIC))
    want = greedy(model, token_ids(1))
    copied = copy.deepcopy(model)
    assert copied.__dict__["generate"]._steps._held == []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(greedy(copied, token_ids(1)), want)
    assert not torch.equal(greedy(model, token_ids(1)), want)


def test_steps_go_with_the_patch_and_keep_no_model_alive():
    model = drafting("llama")
    patched = adaptive.patch(model, adaptive.SelfSpeculative(**STATIC))
    greedy(model, token_ids(1))
    gc.collect()
    gc.disable()
    try:
        step = weakref.ref(model.__dict__["generate"]._steps._held[0].step)
        patched.unpatch()
        assert step() is None
        adaptive.patch(model, adaptive.SelfSpeculative(**STATIC))
        greedy(model, token_ids(1))
        gone = weakref.ref(model.model.layers[0])
        del model, patched
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.skipif(
    not (torch.cuda.is_available() and _native.cuda), reason="needs a GPU and its kernels"
)
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_a_captured_step_makes_the_same_tokens(case):
    model = drafting(case).cuda()
    inputs = {name: value.cuda() for name, value in padded(batch=3).items()}
    with adaptive.patch(model, adaptive.SelfSpeculative(**STATIC)):
        made = [greedy(model, inputs, n) for n in (TOKENS, 7)]
    for n, ours in zip((TOKENS, 7), made, strict=True):
        assert torch.equal(ours, plain(model, inputs, n))


def test_a_call_may_follow_one_in_inference_mode():
    model, inputs = model_of("llama"), padded(batch=2)
    wanted = plain(model, inputs)
    with adaptive.patch(model, adaptive.SelfSpeculative(**STATIC)):
        with torch.inference_mode():
            first = greedy(model, inputs, TOKENS)
        assert torch.equal(greedy(model, inputs, TOKENS), wanted)
    assert torch.equal(first, wanted)
