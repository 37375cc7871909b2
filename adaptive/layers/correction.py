"""Cache correction: tokens that were decoded sparsely are run again densely, some at a time.

What a sparse layer computes differs a little from the dense model, and so do the keys and values
that later layers store. Yang et al. 2024 (arXiv:2410.05076) propose to overwrite those entries by
one dense pass over the tokens in question every so often, so that errors cannot pile up.
"""

from typing import Any

import torch
from torch import Tensor, nn

from adaptive.layers.hf_cache import AdaptiveCacheLayer
from adaptive.layers.kv_store import KVStore
from adaptive.layers.state import PatchRecord

NAME = "pending"
_AXES = 2
_UNSEEN = "not corrected: a pass without the policy wrote tokens between"


class Pending:
    """Inputs of the tokens at the end of a cache that are still to be corrected.

    Lives among what derives from the first layer's `KVStore`, and so follows crops and beams.
    """

    def __init__(self) -> None:
        """Start with no token."""
        self._parts: list[dict[str, Tensor]] = []
        self._end = 0

    @property
    def tokens(self) -> int:
        """Tokens to correct."""
        return sum(_length(part) for part in self._parts)

    def add(self, part: dict[str, Tensor], end: int) -> None:
        """Take in the inputs of one pass, ``[batch, tokens, ...]`` each, which ended at ``end``."""
        self._parts.append(part)
        self._end = end

    def ends_at(self, length: int) -> bool:
        """Whether these tokens, if there are any, are the last of the first ``length``."""
        return not self._parts or self._end == length

    def inputs(self) -> dict[str, Tensor]:
        """All inputs as those of one pass."""
        return {name: torch.cat([p[name] for p in self._parts], 1) for name in self._parts[0]}

    def matches(self, part: dict[str, Tensor]) -> bool:
        """Whether a pass with these inputs can be joined to those held."""
        return not self._parts or _form(self._parts[0]) == _form(part)

    def clear(self) -> None:
        """Forget all."""
        self._parts = []

    def crop(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Forget the tokens from position ``length`` of the cache on."""
        gone = max(self._end - length, 0)
        left = max(self.tokens - gone, 0)
        if left == 0:
            self.clear()
            return
        self._parts = [{name: t[:, :left] for name, t in self.inputs().items()}]
        self._end = length

    def select(self, rows: Tensor) -> None:
        """Make a batch of the rows ``rows``."""
        self._parts = [
            {
                name: t.index_select(0, rows.to(t.device)) if len(t) == _batch(part) else t
                for name, t in part.items()  # positions may be one row for the whole batch
            }
            for part in self._parts
        ]


def note_pass(record: PatchRecord, kwargs: dict[str, Any], cache: object) -> None:
    """After a pass: remember its tokens if it, or one before that awaits correction, was sparse.

    Args:
        record: Of the patched model.
        kwargs: Of the base module's forward.
        cache: That the pass wrote to.
    """
    stores = _stores(cache)
    if stores is None:
        if record.selection is not None:
            record.note("not corrected: the cache is not one that patch() took over")
        return
    pending = _pending(stores)
    if record.selection is None and pending.tokens == 0:
        return
    part = {
        name: kwargs[name]
        for name in ("input_ids", "inputs_embeds", "position_ids")
        if isinstance(kwargs.get(name), Tensor)
    }
    if ("input_ids" in part) == ("inputs_embeds" in part) or not pending.matches(part):
        record.note("not corrected: the pass was called in another way than those before")
        pending.clear()
        return
    length = stores[0].length
    if not pending.ends_at(length - _length(part)):
        record.note(_UNSEEN)
        pending.clear()
        if record.selection is None:
            return
    pending.add(part, length)


def correct(
    base: nn.Module, record: PatchRecord, kwargs: dict[str, Any], cache: object, every: int
) -> None:
    """Before a pass: run the pending tokens densely and overwrite their keys and values, if due.

    Args:
        base: The module whose forward is the whole pass.
        record: Of the patched model.
        kwargs: Of the pass about to run, for its attention mask.
        cache: Its cache.
        every: Tokens that must have piled up.
    """
    stores = _stores(cache)
    if stores is None or _pending(stores).tokens < every:
        return
    pending = _pending(stores)
    length = stores[0].length
    if not pending.ends_at(length):
        record.note(_UNSEEN)
        pending.clear()
        return
    mask = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == _AXES):
        record.note("not corrected: the attention mask is not one of padding")
        pending.clear()
        return
    inputs, tokens = pending.inputs(), pending.tokens
    for store in stores:
        store.crop(length - tokens)
    record.sparse = False
    try:
        base.forward(
            **inputs,
            attention_mask=None if mask is None else mask[:, :length],
            past_key_values=cache,
            use_cache=True,
        )
    except BaseException:
        for store in stores:  # what was not written again is still there
            store.restore(length)
        raise
    finally:
        record.sparse = True
        record.selection = None
    pending.clear()
    record.note(f"corrected {tokens} tokens")


def _stores(cache: object) -> list[KVStore] | None:
    """The stores of a cache all of whose layers hold every token; None for any other."""
    layers = getattr(cache, "layers", None) or ()
    stores = [
        layer.store
        for layer in layers
        if isinstance(layer, AdaptiveCacheLayer) and isinstance(layer.store, KVStore)
    ]
    return stores if stores and len(stores) == len(layers) else None


def _pending(stores: list[KVStore]) -> Pending:
    found = stores[0].derived.setdefault(NAME, Pending())
    assert isinstance(found, Pending)
    return found


def _form(part: dict[str, Tensor]) -> dict[str, int]:
    """Names of the inputs of a pass, and the rows of each."""
    return {name: len(tensor) for name, tensor in part.items()}


def _tokens(part: dict[str, Tensor]) -> Tensor:
    return part["input_ids" if "input_ids" in part else "inputs_embeds"]


def _batch(part: dict[str, Tensor]) -> int:
    return len(_tokens(part))


def _length(part: dict[str, Tensor]) -> int:
    return int(_tokens(part).shape[1])
