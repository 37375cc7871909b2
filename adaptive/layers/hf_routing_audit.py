"""Audits of routed decoders: some passes are run again by the whole model, their outputs compared.

A pass that goes on with a cache cannot be: keys are missing from it. There the whole sequence is
run again, from its first token on. What was said of it is kept with the cache, so that crops and
beams change it, too. An audit never touches a cache.
"""

from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.layers.hf_cache import AdaptiveCacheLayer
from adaptive.layers.hf_row_cache import RowCacheLayer
from adaptive.layers.kv_store import KVStore
from adaptive.layers.routing_log import RoutingLog
from adaptive.layers.state import PatchRecord

NAME = "heard"
_PER_TOKEN = 2
_KEPT = ("input_ids", "position_ids")
_ALSO = (*_KEPT, "attention_mask", "cache_position")


class Heard:
    """The inputs of all tokens of a cache; one of what derives from a `KVStore`."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        """Start with those of the first pass, ``[batch, tokens]`` each."""
        self.inputs = inputs

    @property
    def tokens(self) -> int:
        """Of each sequence."""
        return int(self.inputs["input_ids"].shape[1])

    def add(self, inputs: dict[str, Tensor]) -> None:
        """Take in those of the next pass, which have the same names."""
        self.inputs = {n: torch.cat([held, inputs[n]], 1) for n, held in self.inputs.items()}

    def crop(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Forget the tokens from ``length`` on."""
        self.inputs = {name: held[:, :length] for name, held in self.inputs.items()}

    def select(self, rows: Tensor) -> None:
        """Make a batch of the rows ``rows``."""
        self.inputs = {n: t.index_select(0, rows.to(t.device)) for n, t in self.inputs.items()}


@torch.no_grad()
def after_pass(
    base: nn.Module,
    record: PatchRecord,
    given: dict[str, Any],
    made: Tensor,
    past: int,
    valid: Tensor | None,
) -> None:
    """Note what a pass was given, and audit it if it is its turn.

    Args:
        base: The module whose forward is the whole pass.
        record: Of the patched model.
        given: The arguments of the pass, by name.
        made: Its last hidden states, ``[batch, tokens, width]``.
        past: Tokens of the cache before it.
        valid: Which of its tokens are not padding, ``[batch, tokens]``; None: all.
    """
    log: RoutingLog | None = record.routing_log
    assert log is not None  # the pass was routed
    heard = _note(given, made, past)
    batch, tokens = made.shape[:2]
    log.since_audit += batch * tokens
    every: int = record.routes.policy.audit_every
    if log.audits and log.since_audit < every * batch * (past + tokens):
        return
    again = dict(given)
    if past:
        other = [n for n, value in given.items() if isinstance(value, Tensor) and n not in _ALSO]
        if heard is None or other:
            record.note("step not audited: what its sequence was made of is not known")
            return
        again = {**heard.inputs, "attention_mask": given.get("attention_mask")}
    again.pop("cache_position", None)
    again.update(past_key_values=None, use_cache=False)
    start = perf_counter()
    record.enabled = False
    try:
        full: Tensor = base.forward(**again)[0]
    finally:
        record.enabled = True
    cosines = torch.cosine_similarity(made.float(), full[:, -tokens:].float(), dim=-1)
    known = cosines.flatten() if valid is None else cosines[valid]
    log.since_audit = 0
    log.count_audit(known.clamp(max=1).tolist(), perf_counter() - start if record.timed else 0.0)


def _note(given: dict[str, Any], made: Tensor, past: int) -> Heard | None:
    """Keep what a pass was given with its cache; None if not all of the sequence is known."""
    store = _store(given.get("past_key_values"))
    if store is None:
        return None
    heard = store.derived.pop(NAME, None) if past else None
    shape = made.shape[:2]
    inputs = {}
    for name in _KEPT:
        value = given.get(name)
        if value is not None:
            if not isinstance(value, Tensor) or value.dim() != _PER_TOKEN:
                return None
            inputs[name] = value.expand(shape).clone()
    if "input_ids" not in inputs or store.length != past + shape[1]:
        return None
    if not past:
        heard = Heard(inputs)
    elif (
        isinstance(heard, Heard)
        and heard.tokens == past
        and heard.inputs.keys() == inputs.keys()
        and len(heard.inputs["input_ids"]) == shape[0]
    ):
        heard.add(inputs)
    else:
        return None
    store.derived[NAME] = heard
    return heard


def _store(cache: Any) -> KVStore | None:
    """The store of a layer that holds all tokens of all rows, if the cache has one."""
    for layer in getattr(cache, "layers", ()):
        inner = layer.inner if isinstance(layer, RowCacheLayer) and not layer.drops else layer
        if type(inner) is AdaptiveCacheLayer and isinstance(inner.store, KVStore):
            return inner.store
    return None
