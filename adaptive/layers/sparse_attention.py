"""Attention of layers that skip keys: what each mode of a plan does with one call.

A layer that selects attends densely, ranks the keys by what it saw, and leaves the best ones for
the layers after it in the same pass; those attend to them alone. Nothing outlives a pass: beams,
crops and other caches need no care.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptive.layers.certificate import retained_mass
from adaptive.layers.derived import PageBounds, RunningSums
from adaptive.layers.how import How
from adaptive.layers.kv_store import KVStore
from adaptive.layers.state import LayerState
from adaptive.ops import (
    decode_attention,
    gather_attention,
    score_tokens,
    scored_attention,
    select_tokens,
    sum_tokens,
)
from adaptive.policy import Quest, TidalDecode
from adaptive.policy.plan import DENSE, SELECT


class Inputs(NamedTuple):
    """What an attention op takes, by the names of `decode_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float | None
    softcap: float
    causal: bool

    def options(self) -> dict[str, Any]:
        """All but the tensors that differ between heads."""
        return {"scale": self.scale, "softcap": self.softcap, "causal": self.causal}

    def query_heads(self, kv_heads: Tensor) -> Tensor:
        """Numbers of the query heads of these KV heads."""
        group = self.query.shape[1] // self.key.shape[1]
        return (kv_heads[:, None] * group + torch.arange(group, device=kv_heads.device)).flatten()

    def heads(self, kv_heads: Tensor) -> "Inputs":
        """The query heads of these KV heads; key and value stay as they are."""
        chosen = self.query_heads(kv_heads)
        mask = self.mask
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, chosen]
        return self._replace(query=self.query[:, chosen], mask=mask)


@dataclass(frozen=True)
class Selection:
    """What a select layer chose in the pass now running.

    Attributes:
        tokens: Length of the cache it was chosen from.
        indices: ``[batch, kv_heads, budget]``, int32; see `select_tokens`.
        counts: ``[batch, kv_heads]``, int32.
        trusted: Whether it kept as much mass as the policy demands.
    """

    tokens: int
    indices: Tensor
    counts: Tensor
    trusted: bool


def log_mass(state: LayerState, mass: Tensor, kv_heads: Sequence[int]) -> None:
    """Keep the retained mass, ``[batch, heads, query_tokens]``, of the heads of some KV heads."""
    site = state.site
    if len(kv_heads) < site.kv_heads:
        batch, _, tokens = mass.shape
        group = site.heads // site.kv_heads
        every = mass.new_full((batch, site.kv_heads, group, tokens), torch.nan)
        every[:, list(kv_heads)] = mass.view(batch, len(kv_heads), group, tokens)
        mass = every.flatten(1, 2)
    state.mass.add(mass)


def visible_tokens(mask: Tensor | None, batch: int) -> Tensor | None:
    """Which tokens are not padding, ``[batch, length]``, by what the last query sees."""
    if mask is None:
        return None
    last = mask[:, 0, -1]
    if last.dtype != torch.bool:
        last = last > torch.finfo(last.dtype).min / 2
    return last.expand(batch, -1)


def attend_whole(state: LayerState, inputs: Inputs, store: KVStore | None) -> Tensor:
    """Answer a call whose heads all keep every key.

    Args:
        state: Of the layer.
        inputs: Of the call.
        store: Where the keys and values live; None if that is not known.

    Returns:
        ``[batch, heads, query_tokens, head_dim]``, float32.
    """
    how: How = state.how
    tokens = inputs.key.shape[2]
    per_token = 2 * inputs.key.shape[3] * inputs.key.element_size()
    state.count_read(0, 0, inputs.key.shape[0] * inputs.key.shape[1] * tokens * per_token)
    if how.policy is None or how.mode == DENSE:
        return attend_densely(state, inputs, "dense")
    if not state.record.sparse:
        return attend_densely(state, inputs, "dense: correction")
    if tokens < how.policy.min_context:
        return attend_densely(state, inputs, "dense: short context")
    if isinstance(how.policy, Quest):
        return _pages(state, inputs, how.policy, store)
    if how.mode == SELECT:
        return _select(state, inputs, how.policy, store)
    return _reuse(state, inputs, how.policy, store)


def attend_densely(state: LayerState, inputs: Inputs, path: str) -> Tensor:
    """Attend to every key, and count it under the name ``path``."""
    state.count_path(path)
    _count_read(state, inputs)
    return decode_attention(
        inputs.query, inputs.key, inputs.value, mask=inputs.mask, **inputs.options()
    )[0]


def _count_read(state: LayerState, inputs: Inputs) -> None:
    """Count that every key and value was read."""
    batch, heads, tokens, _ = inputs.key.shape
    read = 2 * inputs.key.numel() * inputs.key.element_size()
    state.count_read(batch * tokens * heads // state.site.kv_heads, read, 0)


def _select(
    state: LayerState, inputs: Inputs, policy: TidalDecode, store: KVStore | None
) -> Tensor:
    """Attend densely and choose the keys for the layers that follow."""
    query, key, value, mask = inputs[:4]
    options = inputs.options()
    out, full, scores = scored_attention(
        query, key, value, mask=mask, reduce=policy.group, **options
    )
    visible = visible_tokens(mask, len(key))
    if visible is not None and mask is not None and mask.dtype != torch.bool:
        # A padded key has a finite bias in stock eager masks, but is no sink.
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
    lengths = None
    if visible is not None and store is None:  # a cache such as StaticCache has room behind them
        places = torch.arange(1, key.shape[2] + 1, device=key.device)
        lengths = (visible * places).amax(1).int()
    if policy.shared:
        scores = scores.sum(1, keepdim=True)
    recent = max(policy.recent, query.shape[2])
    budget = max(policy.tokens(key.shape[2]), policy.sinks + recent)
    mass = 1.0 if policy.mass is None else policy.mass
    indices, counts = select_tokens(scores, budget, lengths, policy.sinks, recent, mass)
    if policy.shared:
        indices = indices.expand(-1, key.shape[1], -1)
        counts = counts.expand(-1, key.shape[1])
    _, kept = gather_attention(query, key, value, indices, counts, mask=mask, **options)
    retained = retained_mass(kept, full)
    log_mass(state, retained, state.how.whole)
    trusted = policy.min_mass is None or bool(retained.min() >= policy.min_mass)
    state.record.selection = Selection(key.shape[2], indices, counts, trusted)
    state.count_path("select")
    _count_read(state, inputs)
    state.gathered.add(counts, 1, 2 * key.shape[3] * key.element_size())  # for the certificate
    return out


def _reuse(state: LayerState, inputs: Inputs, policy: TidalDecode, store: KVStore | None) -> Tensor:
    """Attend to what the last select layer chose."""
    selection: Selection | None = state.record.selection
    key = inputs.key
    if selection is None or selection.tokens != key.shape[2]:
        return attend_densely(state, inputs, "dense: nothing selected")
    if not selection.trusted:
        state.record.note("dense: the selection kept less than min_mass")
        return attend_densely(state, inputs, "dense: min_mass")
    indices, counts = selection.indices, selection.counts
    if indices.shape[1] != key.shape[1]:  # some heads of this layer keep a window
        heads = torch.tensor(state.how.whole, device=key.device)
        indices, counts = indices[:, heads], counts[:, heads]
    extra: dict[str, Tensor] = {}
    if policy.compensate:
        extra = _compensation(state, inputs, indices, counts, store)
    return _gathered(state, inputs, indices, counts, policy.audit_every, extra)


def _gathered(
    state: LayerState,
    inputs: Inputs,
    indices: Tensor,
    counts: Tensor,
    audit_every: int | None,
    extra: dict[str, Any],
    page_size: int = 1,
) -> Tensor:
    """Attend to chosen keys, and measure now and then what the others would have weighed."""
    query, key, value, mask = inputs[:4]
    options: dict[str, Any] = {"mask": mask, "page_size": page_size, **inputs.options()}
    out, kept = gather_attention(query, key, value, indices, counts, **extra, **options)
    audit = _audit_is_due(state, audit_every)
    state.count_path(state.how.mode)
    state.gathered.add(counts, page_size, 2 * key.shape[3] * key.element_size())
    if audit:
        if extra:  # the compensation token has no part in what was kept
            _, kept = gather_attention(query, key, value, indices, counts, **options)
        _, full = score_tokens(query, key, mask=mask, reduce="logit", **inputs.options())
        log_mass(state, retained_mass(kept, full), state.how.whole)
        state.count_path("audit")
        state.count_read(0, key.numel() * key.element_size(), 0)
    return out


def _audit_is_due(state: LayerState, every: int | None) -> bool:
    if every is None or torch.compiler.is_compiling():
        return False
    return state.paths.get(state.how.mode, 0) % every == 0


def _compensation(
    state: LayerState,
    inputs: Inputs,
    indices: Tensor,
    counts: Tensor,
    store: KVStore | None,
) -> dict[str, Tensor]:
    """One token for all that were not chosen: their mean key and value, and log of their number."""
    if store is None or inputs.mask is not None:
        state.record.note(
            "no compensation: "
            + ("foreign cache" if store is None else "several tokens, or padding")
        )
        return {}
    key, value = inputs.key, inputs.value
    sums = store.derived.setdefault("sums", RunningSums())
    assert isinstance(sums, RunningSums)
    dropped = (key.shape[2] - counts).double()[..., None]
    found = {"extra_bias": torch.log(dropped).float()}
    for name, source, total in zip(
        ("extra_key", "extra_value"), (key, value), sums.update(key, value), strict=True
    ):
        rest = total - sum_tokens(source, indices, counts)
        found[name] = (rest / dropped.clamp(min=1)).to(source.dtype)[:, :, None]
    return found


def _pages(state: LayerState, inputs: Inputs, policy: Quest, store: KVStore | None) -> Tensor:
    """Attend to the pages whose bounds promise most (Tang et al. 2024, arXiv:2406.10774)."""
    if store is None:
        return attend_densely(state, inputs, "dense: foreign cache")
    query, key = inputs.query, inputs.key
    size = policy.page_size
    bounds = store.derived.setdefault(f"pages of {size}", PageBounds(size))
    assert isinstance(bounds, PageBounds)
    packed = torch.cat([query.clamp(min=0), query.clamp(max=0)], dim=3)
    scale = query.shape[3] ** -0.5 if inputs.scale is None else inputs.scale
    found = bounds.update(key)
    state.count_read(0, found.numel() * found.element_size(), 0)
    visible = visible_tokens(inputs.mask, len(key))
    seen, first = (None, None) if visible is None else _pages_of(visible, policy)
    scores, _ = score_tokens(packed, found, mask=seen, scale=scale, causal=False, reduce="logit")
    if first is not None:
        scores = scores.masked_fill(first[:, None], torch.inf)
    recent = -(-max(policy.recent, query.shape[2]) // size) + 1
    sinks = -(-policy.sinks // size) + (first is not None)  # after padding they may straddle two
    budget = max(-(-policy.tokens(key.shape[2]) // size), sinks + recent)
    indices, counts = select_tokens(scores, budget, None, 0 if first is not None else sinks, recent)
    return _gathered(state, inputs, indices, counts, policy.audit_every, {}, size)


def _pages_of(visible: Tensor, policy: Quest) -> tuple[Tensor, Tensor]:
    """Pages with a visible token, ``[batch, 1, 1, pages]``, and with a sink, ``[batch, pages]``."""
    size = policy.page_size
    sinks = visible & (visible.cumsum(1) <= policy.sinks)
    room = -visible.shape[1] % size
    seen, first = (
        torch.nn.functional.pad(tokens, (0, room)).unflatten(1, (-1, size)).any(2)
        for tokens in (visible, sinks)
    )
    return seen[:, None, None], first
