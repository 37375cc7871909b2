"""Drafts by an int8 copy of the LM head: the same tokens, and a copy that follows the weights."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from models import PAD, greedy, padded, token_ids
from speculation_cases import TOKENS, drafting, model_of, plain, speculated

import adaptive
from adaptive.layers.draft_head import DraftHead
from adaptive.layers.head_copy import HeadCopy
from adaptive.ops.quantize_weight import dequantize_weight

INT8 = {"exit_layer": 2, "draft": 4, "draft_head": "int8"}
VOCAB, WIDTH = 128, 128


def head(bias=False, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(WIDTH, VOCAB, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("tokens", [None, 50])
def test_tokens_are_those_of_the_whole_head(case, tokens):
    model, policy = model_of(case), {**INT8, "draft_vocabulary": tokens}
    for inputs in (token_ids(batch=1), padded(batch=3)):
        made, log = speculated(model, inputs, policy=policy)
        assert torch.equal(made, plain(model, inputs))
        assert log.drafted > 0
        assert log.accepted > 0 or tokens  # few tokens may never be right
        assert log.draft_head_bytes == (tokens or VOCAB) * (WIDTH + 4 * WIDTH // 64)
    assert "int8 draft head of" in str(log)


def test_the_kernel_reads_the_copy_and_without_the_option_nothing_is_copied():
    model = model_of("llama")
    with adaptive.patch(model, adaptive.SelfSpeculative(**INT8)) as patched:
        greedy(model, token_ids(1), TOKENS)
        report = patched.report()
    log = report.speculation
    drafts = log.drafted + log.dropped
    assert report.native_calls["exit_confidence:cpu"] == drafts > 0
    _, log = speculated(model, token_ids(1), policy={"exit_layer": 2, "draft": 4})
    assert log.draft_head_bytes == 0
    assert log.to_dict()["draft_head_bytes"] == 0


@pytest.mark.parametrize("tokens", [None, 50])
@pytest.mark.parametrize("bias", [False, True])
def test_both_forms_of_a_draft_are_of_the_rounded_head(tokens, bias):
    own = head(bias)
    held = HeadCopy()
    made = DraftHead(own, tokens, held)
    hidden = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)) * 3
    logits = made.logits(hidden)[:, 0]
    rounded = dequantize_weight(*held.of(own.weight[:tokens]))
    right = torch.nn.functional.linear(hidden, rounded, own.bias[:tokens] if bias else None)
    torch.testing.assert_close(logits[:, :tokens], right)
    assert not torch.equal(rounded, own.weight[:tokens])
    assert (logits[:, VOCAB if tokens is None else tokens :] == -torch.inf).all()
    token, confidence = made.best(hidden)
    assert torch.equal(token[:, 0], right.argmax(-1))
    torch.testing.assert_close(confidence, right.softmax(-1).amax(-1))


def test_more_rows_than_the_kernel_takes_are_drafted_by_the_head_itself():
    own = head()
    made = DraftHead(own, None, HeadCopy())
    hidden = torch.randn(17, WIDTH)
    assert torch.equal(made.logits(hidden)[:, 0], own(hidden))
    assert torch.equal(made.best(hidden)[0][:, 0], own(hidden).argmax(-1))
    assert made.held_bytes == 0


def write(weight):
    weight.mul_(-1)


def write_past_pytorch(weight):
    weight.data.mul_(-1)


@pytest.mark.parametrize("change", [write, write_past_pytorch])
def test_the_copy_follows_the_weights(change):
    held, weight = HeadCopy(), head().weight
    before, _ = held.of(weight)
    assert held.of(weight)[0] is before
    with torch.no_grad():
        change(weight)
    assert torch.equal(held.of(weight)[0], -before)
    other = head(seed=1).weight
    assert not torch.equal(held.of(other)[0], -before)
    assert held.of(other[:40])[0].shape == (40, WIDTH)


def test_a_model_that_is_trained_between_calls_drafts_with_its_new_head():
    model = drafting("llama", factor=0.0)  # all drafts are right, but for the rounding
    with adaptive.patch(model, adaptive.SelfSpeculative(**INT8)) as patched:
        greedy(model, token_ids(1), TOKENS)
        before = patched.report().speculation.acceptance
        with torch.no_grad():
            weight = model.get_output_embeddings().weight
            weight.copy_(weight.flip(0))
        patched.reset_stats()
        made = greedy(model, token_ids(1), TOKENS)
        log = patched.report().speculation
    assert torch.equal(made, plain(model, token_ids(1)))
    assert before > 0.5
    assert log.acceptance > 0.5  # drafts of the old head would be right by chance alone


def test_unpatching_frees_the_copy_even_if_the_handle_lives_on():
    model = model_of("llama")
    patched = adaptive.patch(model, adaptive.SelfSpeculative(**INT8))
    greedy(model, token_ids(1), TOKENS)
    held = weakref.ref(patched._record.head_copy._held[0])
    patched.unpatch()
    gc.collect()
    assert held() is None
    assert patched.report().speculation.draft_head_bytes > 0


def test_copies_of_a_model_make_a_copy_of_their_own():
    model = drafting("llama")
    adaptive.patch(model, adaptive.SelfSpeculative(**INT8))
    want = greedy(model, token_ids(1))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert adaptive.patched(other)._record.head_copy.held_bytes == 0
        assert torch.equal(greedy(other, token_ids(1)), want)
        assert adaptive.patched(other)._record.head_copy.held_bytes > 0


@pytest.mark.parametrize("tokens", [None, 8])
def test_sampling_follows_the_models_distribution(tokens):
    """Chi-square of the fifth and sixth token over many rows of one prompt, 16 at a time."""
    model, rows = drafting("llama", vocab_size=16), 16
    prompt = torch.randint(3, 16, (1, 24), generator=torch.Generator().manual_seed(2))
    policy = {**INT8, "draft_vocabulary": tokens}
    counts = []
    for chosen in ([], [adaptive.SelfSpeculative(**policy)]):
        torch.manual_seed(11)
        made = []
        with adaptive.patch(model, *chosen) as patched:
            for _ in range(30):
                made.append(
                    model.generate(
                        prompt.repeat(rows, 1),
                        max_new_tokens=6,
                        do_sample=True,
                        temperature=3.0,
                        top_k=0,
                        pad_token_id=PAD,
                        eos_token_id=None,
                    )
                )
            if chosen:
                log = patched.report().speculation
                assert 0.01 < log.acceptance < 0.999
                assert log.draft_head_bytes > 0
        ends = torch.cat(made)
        counts.append(torch.bincount(ends[:, -2] * 4 // 16 * 16 + ends[:, -1], minlength=64))
    ours, theirs = (count.double() for count in counts)
    often = ours + theirs >= 10
    statistic = ((ours - theirs) ** 2 / (ours + theirs))[often].sum()
    degrees = int(often.sum()) - 1
    assert degrees > 10
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations


def test_heads_that_cannot_be_copied_are_refused_when_patching():
    model = drafting("llama", hidden_size=144, num_attention_heads=4)
    with pytest.raises(
        adaptive.UnsupportedModel, match=r"draft_head needs an LM head whose width.*got 144"
    ):
        adaptive.patch(model, adaptive.SelfSpeculative(exit_layer=2, draft_head="int8"))
    model = drafting("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(
        adaptive.UnsupportedModel, match=r"draft_head needs an LM head that is a plain nn\.Linear"
    ):
        adaptive.patch(model, adaptive.SelfSpeculative(exit_layer=2, draft_head="int8"))
