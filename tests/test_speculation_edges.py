"""Self-speculation at its edges: caches that callers hold, odd logits, draws, foreign forwards."""

import pytest
import torch
from models import greedy, padded, token_ids
from speculation_cases import FORMS, drafting, model_of, plain, speculated
from transformers import DynamicCache, StoppingCriteria

import adaptive
from adaptive.layers.draft_length import DraftLength


class StopsAt(StoppingCriteria):
    """Raises once there are so many tokens."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == self.tokens:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("policy", [None, *FORMS], ids=str)
def test_a_cache_holds_no_token_that_the_caller_did_not_get(policy):
    """An interrupt between the tokens that one check accepted leaves what plain decoding does."""
    model = drafting("llama", factor=0.0)  # nearly all drafts are right
    chosen = [] if policy is None else [adaptive.SelfSpeculative(**policy)]
    with adaptive.patch(model, *chosen):
        for tokens in range(21, 30):
            cache = DynamicCache(config=model.config)
            options = {"past_key_values": cache, "stopping_criteria": [StopsAt(tokens)]}
            with pytest.raises(KeyboardInterrupt):
                greedy(model, token_ids(1), 20, **options)
            assert {layer.get_seq_length() for layer in cache.layers} == {tokens - 1}


def test_an_interrupt_leaves_windows_that_are_trimmed():
    model = model_of("mistral_window")
    for chosen in (
        adaptive.SelfSpeculative(exit_layer=2, draft=3),
        adaptive.SelfSpeculative(exit_layer=2, draft=3, tree=True),
        adaptive.EarlyExit(layers=(2,), threshold=0.5),
    ):
        for tokens in (21, 25):
            cache = DynamicCache(config=model.config)
            options = {"past_key_values": cache, "stopping_criteria": [StopsAt(tokens)]}
            with adaptive.patch(model, chosen), pytest.raises(KeyboardInterrupt):
                greedy(model, token_ids(1), **options)
            assert not any(layer.record_past or layer.reach for layer in cache.layers)
            assert {layer.get_seq_length() for layer in cache.layers} == {tokens - 1}


@pytest.mark.parametrize("policy", FORMS, ids=str)
@pytest.mark.parametrize("stop", [False, True])
def test_a_batch_goes_on_from_the_cache(policy, stop):
    """Rows accept different numbers of drafts, and the caller's cache has no gaps of that."""
    model, prompt = model_of("llama"), padded(batch=3)
    free = plain(model, prompt)[:, 20:]
    options = {"eos_token_id": free[:, 5].tolist()} if stop else {}
    made = []
    for chosen in ([], [adaptive.SelfSpeculative(**policy)]):
        cache = DynamicCache(config=model.config)
        with adaptive.patch(model, *chosen):
            first = greedy(model, prompt, 12, past_key_values=cache, **options)
            assert cache.get_seq_length() == first.shape[1] - 1
            turn = torch.cat([first, token_ids(3, 5, seed=9)], 1)
            seen = torch.cat([prompt["attention_mask"], (turn[:, 20:] != 0).long()], 1)
            inputs = {"input_ids": turn, "attention_mask": seen}
            made.append(greedy(model, inputs, 8, past_key_values=cache))
    assert torch.equal(*made)


@pytest.mark.parametrize("policy", [*FORMS, {"exit_layer": 2}], ids=str)
def test_logits_of_nan_choose_what_plain_decoding_chooses(policy):
    model = drafting("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    made, _ = speculated(model, token_ids(1), policy=policy)
    assert torch.equal(made, plain(model, token_ids(1)))


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_draft_vocabulary_of_forbidden_tokens_drafts_nothing_right(do_sample):
    model = model_of("llama")
    policy = adaptive.SelfSpeculative(exit_layer=2, draft=3, draft_vocabulary=4)
    with adaptive.patch(model, policy) as patched:
        made = model.generate(
            token_ids(1),
            max_new_tokens=8,
            do_sample=do_sample,
            pad_token_id=0,
            suppress_tokens=[0, 1, 2, 3],
        )
        assert made.shape == (1, 28)
        assert (made[:, 20:] > 3).all()
        assert patched.report().speculation.drafted > 0


def test_a_drawn_draft_is_never_dropped_for_being_unlikely(monkeypatch):
    """Dropping drawn tokens by their chance would take from those what others then get."""
    monkeypatch.setattr(DraftLength, "keeps", lambda *_: False)
    monkeypatch.setattr(DraftLength, "wants", lambda self, made, *_: made < 3)
    model, dropped = model_of("llama"), {}
    for do_sample in (False, True):
        with adaptive.patch(model, adaptive.SelfSpeculative(exit_layer=2)) as patched:
            model.generate(token_ids(1), max_new_tokens=9, do_sample=do_sample, pad_token_id=0)
            dropped[do_sample] = patched.report().speculation.dropped
    assert dropped[False] > 0
    assert dropped[True] == 0


@pytest.mark.parametrize("module", ["model.layers.3", "model.layers.2.mlp"])
def test_a_forward_that_someone_else_set_is_not_dropped(module):
    model = drafting("llama")
    wrapped = model.get_submodule(module)
    stock = wrapped.forward
    wrapped.forward = lambda *args, **kwargs: stock(*args, **kwargs)
    policies = (
        adaptive.SelfSpeculative(exit_layer=2),
        adaptive.SelfSpeculative(skip=((), (2,))),
        adaptive.EarlyExit(layers=(2,), threshold=0.5),
    )
    for policy in policies:
        with pytest.raises(adaptive.UnsupportedModel, match="forward of its own"):
            adaptive.patch(model, policy)


def stretched(case):
    """A model whose angles depend on the last position of a pass, beyond 24 tokens."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    options = {"max_position_embeddings": 24}
    if case == "phi3":
        rope = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
        options = {"max_position_embeddings": 96, "original_max_position_embeddings": 24}
    return drafting(case, rope_scaling=rope, **options)


@pytest.mark.parametrize("case", ["llama", "phi3"])
@pytest.mark.parametrize(
    "policy",
    [
        *(adaptive.SelfSpeculative(**form) for form in FORMS),
        adaptive.EarlyExit(layers=(2,), threshold=1.01),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_angles_that_depend_on_the_pass_are_refused_where_they_change(case, policy):
    model, inputs = stretched(case), padded(batch=2)
    short, long = plain(model, inputs, 4), token_ids(1, 30)
    adaptive.patch(model, policy)
    with adaptive.patched(model) as patched:
        assert torch.equal(greedy(model, inputs, 4), short)
        with pytest.raises(NotImplementedError, match="must stay within 24 tokens, got up to 25"):
            greedy(model, inputs, 5)
        with patched.disabled():
            assert greedy(model, inputs, 5).shape == (2, 25)
        if case == "phi3":  # all tokens are turned by the angles for many
            assert greedy(model, long, 6).shape == (1, 36)


class ByRow(StoppingCriteria):
    """Stops each row of a batch at a length of its own."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= 24 + 3 * torch.arange(len(input_ids))


class Columns:
    """A streamer that takes batches."""

    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(value.tolist())

    def end(self):
        self.seen.append("end")


@pytest.mark.parametrize("policy", FORMS, ids=str)
def test_criteria_and_streamers_see_the_batch_as_in_plain_decoding(policy):
    model, inputs, seen = model_of("llama"), padded(batch=3), []
    for chosen in ([], [adaptive.SelfSpeculative(**policy)]):
        streamer = Columns()
        with adaptive.patch(model, *chosen):
            options = {"stopping_criteria": [ByRow()], "streamer": streamer}
            options["eos_token_id"] = 1  # never made; without one stock goes on with ended rows
            made = greedy(model, inputs, 16, **options)
        seen.append((made.tolist(), streamer.seen))
    assert seen[0] == seen[1]
    assert len(seen[0][1]) > 2
