"""Rows of a batch leave alone: each makes what it makes by itself, wherever others leave."""

import functools

import pytest
import torch
from early_exit_cases import FILLS, SOME, TOKENS, exited, model_of, never, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGS, PAD, greedy, padded, token_ids
from speculation_cases import LAYERS
from transformers import DynamicCache, LogitsProcessor

import adaptive
from adaptive.layers import hf_attention, hf_exit_steps
from adaptive.layers.kv_store import KVStore

ALONE = {**SOME, "rows": "alone", "audit": None}


def picked(inputs, rows):
    """Some rows of the inputs."""
    return {name: tensor[rows] for name, tensor in inputs.items()}


def cut(inputs, row):
    """One row without its padding."""
    held = inputs["attention_mask"][row].bool()
    return inputs["input_ids"][row][held][None]


@functools.cache
def alone(case, kv, row):
    """What a row of ``padded(batch=4)`` makes by itself, and where it leaves."""
    policy = {**ALONE, "kv": kv}
    made, log = exited(model_of(case), cut(padded(batch=4), row), policy=policy)
    return made[0, -TOKENS:], log.row_exits[0]


@pytest.mark.parametrize("case", ["llama", "gpt2", "mistral_window", "gemma3", "mixtral"])
@pytest.mark.parametrize("kv", FILLS)
def test_each_row_makes_what_it_makes_by_itself(case, kv):
    made, log = exited(model_of(case), padded(batch=4), policy={**ALONE, "kv": kv})
    for row in range(4):
        want, exits = alone(case, kv, row)
        assert torch.equal(made[row, -TOKENS:], want)
        assert log.row_exits[row] == exits
    total = {ran: sum(each.get(ran, 0) for each in log.row_exits) for ran in log.exits}
    assert total == log.exits
    assert case != "llama" or len({tuple(sorted(each.items())) for each in log.row_exits}) > 1


@settings(max_examples=12)
@given(st.permutations(range(4)), st.sampled_from(FILLS))
def test_the_order_of_the_rows_changes_nothing(order, kv):
    policy = {**ALONE, "kv": kv}
    made, log = exited(model_of("llama"), padded(batch=4), policy=policy)
    other, moved = exited(model_of("llama"), picked(padded(batch=4), order), policy=policy)
    assert torch.equal(other, made[order])
    assert moved.row_exits == [log.row_exits[row] for row in order]


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("rows", ["together", "alone"])
def test_every_family_leaves_in_batches(case, rows):
    for kv in FILLS:
        policy = {**ALONE, "layers": (2, 3), "rows": rows, "kv": kv}
        made, log = exited(model_of(case), padded(batch=3), policy=policy)
        assert made.shape == (3, 20 + TOKENS)
        assert sum(log.exits.values()) == 3 * (TOKENS - 1)
        assert rows == "alone" or all(each == log.row_exits[0] for each in log.row_exits)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
@pytest.mark.parametrize("kv", FILLS)
@pytest.mark.parametrize("audit", [None, 3])
def test_the_report_says_which_rows_ran(case, kv, audit):
    model, seen = model_of(case), []
    layers = model.transformer.h if case == "gpt2" else model.model.layers
    hooks = [
        layer.mlp.register_forward_hook(lambda _, args, __, i=i: seen.append((i, args[0].shape)))
        for i, layer in enumerate(layers)
    ]
    _, log = exited(model, padded(batch=4), policy={**ALONE, "kv": kv, "audit": audit})
    for hook in hooks:
        hook.remove()
    seen = [(layer, shape[0] * shape[1]) for layer, shape in seen[LAYERS:]]
    assert len(seen) == log.layer_passes
    assert sum(tokens for _, tokens in seen) == log.layer_tokens
    assert (log.audited > 0) == (audit is not None)
    if kv != "deferred" and audit is None:
        for layer in range(LAYERS):
            went_on = sum(n for ran, n in log.exits.items() if ran > layer)
            assert sum(tokens for index, tokens in seen if index == layer) == went_on


@pytest.mark.parametrize("kv", FILLS)
def test_audits_change_no_token_of_a_batch(kv):
    made = [
        exited(model_of("llama"), padded(batch=4), policy={**ALONE, "kv": kv, "audit": audit})[0]
        for audit in (None, 1, 3)
    ]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize("kv", FILLS)
def test_a_finished_row_goes_no_deeper(kv):
    model, policy = model_of("llama"), {**ALONE, "kv": kv}
    free, _ = exited(model, padded(batch=4), policy=policy)
    stop = int(free[1, 24])
    made, log = exited(model, padded(batch=4), policy=policy, eos_token_id=stop)
    for row in range(4):
        end = (free[row, 20:] == stop).nonzero()
        length = 20 + TOKENS if not len(end) else 20 + int(end[0]) + 1
        assert torch.equal(made[row, :length], free[row, :length][: made.shape[1]])
        assert (made[row, length:] == PAD).all()
        assert sum(log.row_exits[row].values()) == length - 21


@pytest.mark.parametrize("kv", FILLS)
def test_where_no_row_leaves_the_bits_are_the_models(kv):
    model, stop = model_of("llama"), int(plain(model_of("llama"), padded(batch=3))[1, 25])
    want = plain(model, padded(batch=3), eos_token_id=stop)
    policy = never(kv, rows="alone")
    got, log = exited(model, padded(batch=3), policy=policy, eos_token_id=stop)
    assert torch.equal(got, want)
    assert log.layer_tokens == LAYERS * 3 * log.steps


@pytest.mark.parametrize("case", ["llama", "gpt2", "mistral_window", "gemma3"])
@pytest.mark.parametrize("tokens", [3, 40])
def test_the_deferred_cache_of_each_row_is_that_of_the_whole_model(case, tokens):
    model = model_of(case)
    cache = DynamicCache(config=model.config)
    inputs = {**padded(batch=3), "past_key_values": cache}
    made, log = exited(model, inputs, tokens, policy={**ALONE, "kv": "deferred"})
    assert log.exit_steps > 0
    want = DynamicCache(config=model.config)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, tokens, dtype=torch.long)], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with adaptive.patch(model), torch.no_grad():
        for end in range(20, 20 + tokens):
            start = 0 if end == 20 else end - 1
            given = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end]}
            model(made[:, start:end], past_key_values=want, **given)
    for ours, theirs in zip(cache.layers, want.layers, strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length() == 20 + tokens - 1
        length = min(ours.keys.shape[2], theirs.keys.shape[2], tokens)  # beyond the padding
        for mine, whole in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(
                mine[:, :, -length:], whole[:, :, -length:], rtol=1e-4, atol=1e-5
            )


def test_each_row_keeps_copies_of_its_own_last_layer(monkeypatch):
    """Rows 0 and 2 leave after one layer, row 1 after three, row 3 not at all."""

    class Judge(hf_exit_steps.Judge):
        def __init__(self, policy):
            super().__init__(policy)
            self.left = [torch.tensor(each) for each in ([1, 0, 1, 0], [0, 0], [1, 0])]

        def leaves(self, *_):
            return self.left.pop(0).bool()

    monkeypatch.setattr(hf_exit_steps, "Judge", Judge)
    model = model_of("llama")
    cache = DynamicCache(config=model.config)
    policy = {**ALONE, "kv": "copy"}
    _, log = exited(model, token_ids(4), policy=policy, past_key_values=cache)
    assert log.row_exits == [{ran: TOKENS - 1} for ran in (1, 3, 1, 4)]
    first, *later = [layer.keys[:, :, 20:] for layer in cache.layers]
    for keys in later:
        assert torch.equal(keys[::2], first[::2])
    assert torch.equal(later[2][1], later[1][1])
    assert not torch.equal(later[1][1], later[0][1])
    assert not torch.equal(later[2][3], later[1][3])


@pytest.mark.parametrize("kv", FILLS)
def test_stock_attention_gets_copies_of_the_rows(kv, monkeypatch):
    """Where the kernel does not take a call, the tokens are the same."""
    policy = {**ALONE, "kv": kv}
    want, log = exited(model_of("llama"), padded(batch=4), policy=policy)
    monkeypatch.setattr(hf_attention, "_why_stock", lambda *_: "plan")
    made, stock = exited(model_of("llama"), padded(batch=4), policy=policy)
    assert torch.equal(made, want)
    assert stock.row_exits == log.row_exits


@pytest.mark.parametrize("kv", FILLS)
@pytest.mark.parametrize("at", [3, 9])
def test_an_interrupt_leaves_the_cache_of_a_batch_whole(kv, at):
    class Interrupt(LogitsProcessor):
        left = at

        def __call__(self, input_ids, scores):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return scores

    model = model_of("llama")
    cache, policy = DynamicCache(config=model.config), {**ALONE, "kv": kv}
    want = exited(model, token_ids(3), policy=policy)[0]
    with adaptive.patch(model, adaptive.EarlyExit(**policy)):
        options = {"past_key_values": cache, "logits_processor": [Interrupt()]}
        with pytest.raises(KeyboardInterrupt):
            greedy(model, token_ids(3), TOKENS, **options)
        (held,) = {layer.get_seq_length() for layer in cache.layers}
        assert 20 <= held < 20 + at
        again = greedy(model, want[:, : held + 1], 3, past_key_values=cache)
    if kv != "project":
        assert torch.equal(again[:, : held + 1], want[:, : held + 1])
    assert all(layer.keys.isfinite().all() for layer in cache.layers)


def test_windows_drop_what_they_need_not_keep_although_some_row_always_waits(monkeypatch):
    """Rows leave in turn, so none waits for long and one always does."""

    class Turns(hf_exit_steps.Judge):
        steps = 0

        def __init__(self, policy):
            super().__init__(policy)
            Turns.steps += 1

        def leaves(self, *_):
            return torch.tensor([Turns.steps % 2 == 0, Turns.steps % 2 == 1])

    monkeypatch.setattr(hf_exit_steps, "Judge", Turns)
    policy = {"layers": (2,), "threshold": 0.0, "rows": "alone", "audit": None}
    made, sizes, held, append = [], [], [], KVStore.append

    def watched(store, key, value):
        held.append(store.length)
        return append(store, key, value)

    monkeypatch.setattr(KVStore, "append", watched)
    for most in (8, 10_000):
        monkeypatch.setattr(hf_exit_steps, "WINDOW_BACKLOG", most)
        held.clear()
        Turns.steps = 0
        made.append(exited(model_of("mistral_window"), token_ids(2), 100, policy=policy)[0])
        sizes.append(max(held))
    assert torch.equal(*made)
    assert sizes[0] < sizes[1]
    assert sizes[1] >= 100


def test_a_way_to_leave_that_is_none_is_refused():
    with pytest.raises(ValueError, match="rows must be one of together, alone, got 'apart'"):
        adaptive.EarlyExit(**{**SOME, "rows": "apart"})
