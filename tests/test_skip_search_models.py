"""A search for skip sets changes no token and no bit of the cache, and finds what can be left out.

Time for candidates is without limit here, so that every step scores one.
"""

import copy
import itertools

import pytest
import torch
from models import CONFIGS, greedy, make, padded, token_ids
from speculation_cases import TOKENS, check_sampling, model_of, plain, speculated
from transformers import DynamicCache

import adaptive
from adaptive.layers import draft_length, hf_search_steps, hf_sliding, hf_steps, skip_search
from adaptive.layers.hf_passes import Passes

SEARCH = {"skip": "search", "draft": 4}


@pytest.fixture(autouse=True)
def a_candidate_at_every_step(monkeypatch):
    monkeypatch.setattr(skip_search, "TIME_SHARE", float("inf"))
    monkeypatch.setattr(skip_search, "GAIN", 0.0)  # so that it never gives up


@pytest.mark.parametrize("case", CONFIGS)
def test_every_family_makes_the_same_tokens_while_it_searches(case):
    model = model_of(case)
    for inputs in (token_ids(batch=1), padded(batch=3)):
        made, log = speculated(model, inputs, policy=SEARCH)
        assert torch.equal(made, plain(model, inputs))
        assert log.tokens == TOKENS * len(made)
        assert log.drafted > 0
        assert log.candidates > 1
        assert log.search.skip is not None


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}], ids=str)
def test_lengths_left_open_and_processors_make_the_same_tokens(batch, options):
    model, inputs = model_of("llama"), padded(batch=batch)
    made, log = speculated(model, inputs, 40, policy={"skip": "search"}, **options)
    assert torch.equal(made, plain(model, inputs, 40, **options))
    assert log.candidates > 5


@pytest.mark.parametrize("case", ["llama", "gpt2", "mistral_window", "gemma3"])
@pytest.mark.parametrize("batch", [1, 3])
def test_scoring_leaves_every_bit_of_the_cache(case, batch, monkeypatch):
    """With gaps between rows, and windows that are full."""
    again, seen = Passes.again, []

    def compared(self, ids):
        before = [(copy.copy(layer.store), layer.get_seq_length()) for layer in self.cache.layers]
        before = [(store.keys.clone(), store.values.clone(), n) for store, n in before]
        logits = again(self, ids)
        for layer, (keys, values, length) in zip(self.cache.layers, before, strict=True):
            held = layer.store.length  # a window may have dropped what it needs no more
            assert layer.get_seq_length() == length
            assert torch.equal(layer.store.keys, keys[:, :, -held:])
            assert torch.equal(layer.store.values, values[:, :, -held:])
        seen.append(ids.shape[1])
        return logits

    monkeypatch.setattr(Passes, "again", compared)
    speculated(model_of(case), padded(batch=batch), 40, policy=SEARCH)
    assert max(seen) == hf_search_steps.WINDOW


@pytest.mark.parametrize("case", ["llama", "mistral_window", "gemma3"])
def test_what_skips_nothing_makes_every_token_again(case, monkeypatch):
    """So positions, masks, windows and the tokens compared are those of decoding."""
    monkeypatch.setattr(hf_sliding, "slack", lambda _: 1)  # windows hold no more than they must
    monkeypatch.setattr(skip_search, "ENOUGH", 2.0)  # or the search would soon be over
    monkeypatch.setattr(skip_search.SkipSearch, "sets", lambda *_: (frozenset(), frozenset()))
    scores, score = [], skip_search.SkipSearch.score

    def note(self, chosen, right, seen, rate):
        scores.append((right, seen))
        score(self, chosen, right, seen, rate)

    monkeypatch.setattr(skip_search.SkipSearch, "score", note)
    speculated(model_of(case), padded(batch=3), 40, policy=SEARCH)
    assert len(scores) > 3
    assert all(right == seen > 0 for right, seen in scores)


def test_the_cache_is_that_of_plain_decoding():
    for case in ("llama", "mistral_window"):
        caches = []
        for chosen in ([], [adaptive.SelfSpeculative(**SEARCH)]):
            caches.append(DynamicCache(config=model_of(case).config))
            with adaptive.patch(model_of(case), *chosen):
                greedy(model_of(case), token_ids(1), TOKENS, past_key_values=caches[-1])
        for left, right in zip(caches[0].layers, caches[1].layers, strict=True):
            assert left.get_seq_length() == right.get_seq_length() == 20 + TOKENS - 1
            torch.testing.assert_close(left.keys, right.keys, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(left.values, right.values, rtol=1e-4, atol=1e-5)


def test_an_interrupt_while_a_candidate_is_scored_leaves_the_cache_whole(monkeypatch):
    model, cache = model_of("llama"), DynamicCache()
    call, want = Passes._call, plain(model, token_ids(1), 8)

    def interrupted(self, ids, *args, **kwargs):
        logits = call(self, ids, *args, **kwargs)
        if self.depth.skips[0] | self.depth.skips[1] and ids.shape[1] > 1:
            raise KeyboardInterrupt
        return logits

    with adaptive.patch(model, adaptive.SelfSpeculative(**SEARCH)):
        with monkeypatch.context() as patch:
            patch.setattr(Passes, "_call", interrupted)
            with pytest.raises(KeyboardInterrupt):
                greedy(model, token_ids(1), TOKENS, past_key_values=cache)
        assert len({layer.get_seq_length() for layer in cache.layers}) == 1
        assert cache.get_seq_length() >= 20
        assert torch.equal(greedy(model, token_ids(1)), want)


@pytest.mark.parametrize("at", [0, 2])
def test_an_interrupt_while_the_cache_is_cropped_for_a_candidate_leaves_it_whole(at, monkeypatch):
    """The first layers have given up their last tokens by then."""
    model, cache = model_of("llama"), DynamicCache()
    again, seen = Passes.again, []

    def interrupted(self, ids):
        layer, drop = self.cache.layers[at], self.cache.layers[at].drop_last
        before = [(each.keys.clone(), each.values.clone()) for each in self.cache.layers]

        def stop(tokens):
            layer.drop_last = drop
            raise KeyboardInterrupt

        layer.drop_last = stop
        try:
            return again(self, ids)
        finally:
            for each, (keys, values) in zip(self.cache.layers, before, strict=True):
                assert torch.equal(each.keys, keys)
                assert torch.equal(each.values, values)
            seen.append(ids.shape[1])

    monkeypatch.setattr(Passes, "again", interrupted)
    patched = adaptive.patch(model, adaptive.SelfSpeculative(**SEARCH))
    with patched, pytest.raises(KeyboardInterrupt):
        greedy(model, token_ids(1), TOKENS, past_key_values=cache)
    assert len(seen) == 1


def test_sampling_follows_the_models_distribution(monkeypatch):
    monkeypatch.setattr(hf_search_steps, "LEAST", 2)
    log = check_sampling(SEARCH, tokens=6)
    assert 0.01 < log.acceptance < 0.999
    assert log.candidates > 0


def planted(attention, mlp, layers=8):
    """A model in which only those modules do nothing."""
    model = make("llama", num_hidden_layers=layers)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight.mul_(0.0 if index in attention else 3.0)
            layer.mlp.down_proj.weight.mul_(0.0 if index in mlp else 3.0)
    return model


def set_clock(monkeypatch):
    """A clock that goes on by a millisecond with each look at it."""
    ticks = itertools.count()
    monkeypatch.setattr(hf_steps, "clock_for", lambda _: lambda: next(ticks) * 1e-3)


def test_modules_that_do_nothing_are_found(monkeypatch):
    set_clock(monkeypatch)
    monkeypatch.setattr(skip_search, "ENOUGH", 0.99)
    model = planted((2, 5), (3, 4))
    policy = adaptive.SelfSpeculative(skip="search", skip_ratio=1 / 3, draft=4)
    with adaptive.patch(model, policy) as patched:
        for seed in range(8):
            greedy(model, token_ids(1, seed=seed), 100)
        log = patched.report().speculation
    assert log.search.skip == ((2, 5), (3, 4))
    assert log.search.finished == skip_search.GOOD
    made, found = speculated(model, token_ids(1), policy={"skip": log.search.skip, "draft": 4})
    assert found.acceptance == 1.0
    assert torch.equal(made, plain(model, token_ids(1)))


def test_a_search_goes_on_where_the_last_call_left_it():
    model = model_of("llama")
    with adaptive.patch(model, adaptive.SelfSpeculative(**SEARCH)) as patched:
        greedy(model, token_ids(1), 30)
        first = patched.report().speculation
        patched.reset_stats()
        greedy(model, token_ids(1, seed=3), 7)
        second = patched.report().speculation
    assert first.candidates > 0
    assert second.candidates == 0
    assert second.search.skip == first.search.skip
    assert second.drafted > 0


def test_it_gives_up_where_no_set_pays_and_says_so(monkeypatch):
    monkeypatch.setattr(skip_search, "GAIN", draft_length.GAIN)
    monkeypatch.setattr(skip_search, "PATIENCE", 6)
    model = planted((), (), layers=4)
    with torch.no_grad():
        for layer in model.model.layers[1:3]:
            layer.self_attn.o_proj.weight.mul_(10.0)
            layer.mlp.down_proj.weight.mul_(10.0)
    with adaptive.patch(model, adaptive.SelfSpeculative(skip="search")) as patched:
        made = greedy(model, token_ids(1), 150)
        log = patched.report().speculation
        patched.reset_stats()
        greedy(model, token_ids(1), 20)
        after = patched.report().speculation
    assert torch.equal(made, plain(model, token_ids(1), 150))
    assert log.search.finished == skip_search.NONE_PAYS
    assert skip_search.NONE_PAYS in str(log)
    assert after.steps == after.candidates == 0


def test_the_same_clock_gives_the_same_search(monkeypatch):
    logs = []
    for _ in range(2):
        set_clock(monkeypatch)
        _, log = speculated(model_of("llama"), token_ids(1), 60, policy={"skip": "search"})
        logs.append(log)
    assert logs[0] == logs[1]
    assert logs[0].candidates > 5


def test_a_model_of_two_layers_has_nothing_to_leave_out():
    model = make("llama", num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"skip must be given for a model of 2 layers"):
        adaptive.patch(model, adaptive.SelfSpeculative(skip="search"))
