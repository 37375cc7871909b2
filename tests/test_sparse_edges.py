"""Sparse policies at the edges: padding, room behind the tokens, caches of others, no numbers."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from models import PAD, token_ids
from test_sparse_models import PROMPT, TOKENS, deep, logits, quest, tidal
from transformers import StaticCache

import adaptive
from adaptive.policy import StreamingLLM, TidalDecode


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", [tidal(), quest()], ids=["tidal", "quest"])
def test_padding_is_neither_a_sink_nor_part_of_the_budget(policy, implementation):
    model, ids = deep(implementation=implementation), token_ids(batch=1, tokens=PROMPT)
    padding = 24  # whole pages
    mask = torch.ones(1, PROMPT + padding, dtype=torch.long)
    mask[:, :padding] = 0
    inputs = {"input_ids": torch.nn.functional.pad(ids, (padding, 0), value=PAD)}
    with adaptive.patch(model, policy) as patched:
        ours = model.generate(
            **inputs,
            attention_mask=mask,
            max_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=PAD,
            output_logits=True,
            return_dict_in_generate=True,
        )
        padded_mass = [layer.mass_of_heads for layer in patched.report().layers]
        patched.reset_stats()
        alone = model.generate(
            ids,
            max_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=PAD,
            output_logits=True,
            return_dict_in_generate=True,
        )
        mass = [layer.mass_of_heads for layer in patched.report().layers]
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(alone.logits))
    torch.testing.assert_close(torch.tensor(padded_mass[1]), torch.tensor(mass[1]))


def test_the_last_tokens_are_chosen_in_a_cache_with_room_behind_them():
    model, ids = deep(), token_ids(batch=1, tokens=PROMPT)
    with adaptive.patch(model, tidal()):
        ours, _ = logits(model, ids)
        static, _ = logits(model, ids, cache=StaticCache(config=model.config, max_cache_len=200))
    torch.testing.assert_close(static, ours)


def test_bounds_of_pages_are_counted_as_read():
    model, ids = deep(), token_ids(batch=1, tokens=PROMPT)
    with adaptive.patch(model, quest(audit_every=None)) as patched:
        logits(model, ids, steps=1)
        layer = patched.report().layers[1]
    pages, chosen, row_bytes = PROMPT // 4, 24, 2 * 2 * 32 * 4
    assert layer.kv_bytes == (pages + chosen) * row_bytes


def test_bytes_within_the_window_are_counted_as_dense():
    model, ids = deep(), token_ids(tokens=PROMPT)
    with adaptive.patch(model, StreamingLLM(sinks=2, window=200)) as patched:
        logits(model, ids)
        for layer in patched.report().layers:
            assert layer.paths == {"dense: within the window": TOKENS}
            assert layer.dense_bytes == layer.kv_bytes > 0


def test_a_cache_that_was_read_with_other_pages_is_read_right():
    """What derives from a cache outlives a patch, and must not be taken for what another needs."""
    model, ids = deep(), token_ids(tokens=PROMPT)
    with adaptive.patch(model, quest(page_size=16)):
        _, cache = logits(model, ids, steps=2)
    with torch.no_grad(), adaptive.patch(model, quest(page_size=4)):
        again = copy.deepcopy(cache)
        for layer in again.layers:
            layer.store.derived.clear()
        expected = model(ids[:, :1], past_key_values=again).logits
        assert torch.equal(model(ids[:, :1], past_key_values=cache).logits, expected)


def test_a_plain_module_is_refused_before_its_layers_are_counted():
    attention = torch.nn.MultiheadAttention(64, 2)
    with pytest.raises(adaptive.UnsupportedModel, match="plain PyTorch modules can only be exact"):
        adaptive.patch(attention, TidalDecode())


@dataclass(frozen=True, kw_only=True)
class Own(adaptive.Policy):
    """Uses modes whose numbers another policy has."""

    modes: ClassVar[tuple[str, ...]] = ("select", "reuse", "window")
    rows: str = "select reuse reuse reuse reuse"

    def plan(self, table):
        for layer, mode in enumerate(self.rows.split()):
            table = table.with_layer(layer, mode)
        return table


def test_modes_that_no_policy_has_the_numbers_for_are_refused():
    model = deep()
    with pytest.raises(ValueError, match=r"must have a TidalDecode, .* to run select, got Own"):
        adaptive.patch(model, Own())
    with pytest.raises(ValueError, match=r"must have a RazorAttention or StreamingLLM, .*got Own"):
        adaptive.patch(model, Own(rows="dense window window window window"))
    adaptive.patch(model).unpatch()
