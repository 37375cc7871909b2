"""Attention of layers some of whose heads see a window and first tokens alone, prompts included."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptive.layers.head_split import HeadSplit
from adaptive.layers.hf_cache import AdaptiveCacheLayer
from adaptive.layers.how import How
from adaptive.layers.kv_store import KVStore
from adaptive.layers.local_store import LocalStore, kept_tokens
from adaptive.layers.pattern import Pattern
from adaptive.layers.rebased import add_sinks
from adaptive.layers.sparse_attention import Inputs, attend_densely, attend_whole
from adaptive.layers.state import LayerState
from adaptive.ops import decode_attention, local_attention
from adaptive.ops.decode_attention import MAX_QUERY_TOKENS

FOREIGN = "nothing dropped: the cache is not one that patch() took over"


def attend(
    state: LayerState, inputs: Inputs, pattern: Pattern, layer: AdaptiveCacheLayer | None
) -> Tensor:
    """Answer a call of a layer with local heads.

    Args:
        state: Of the attention layer.
        inputs: Of the call; the mask is needed for calls as short as the decode kernels take.
        pattern: What the queries of heads that keep every key see.
        layer: The cache layer that the keys came from; None if that is not known.

    Returns:
        ``[batch, heads, query_tokens, head_dim]``, float32 or the dtype of the query.
    """
    store = None if layer is None else layer.store
    if layer is not None and isinstance(store, HeadSplit):
        out = _attend_split(state, inputs, pattern, store)
        assert isinstance(store.window, LocalStore)
        store.window.trim()
        return out
    how: How = state.how
    assert how.window is not None
    tokens, queries = pattern.tokens, inputs.query.shape[2]
    if queries <= MAX_QUERY_TOKENS and tokens <= how.window.sinks + how.window.window_tokens(0):
        state.count_read(0, 0, 2 * inputs.key.numel() * inputs.key.element_size())
        return attend_densely(state, inputs, "dense: within the window")
    out = _attend_all(state, inputs, pattern)
    if layer is None:
        if tokens > queries:
            state.record.note(FOREIGN)
    elif isinstance(store, KVStore):
        _reduce(state, pattern, layer, store)
    return out


def refuse_stock(state: LayerState, reason: str, tokens: int) -> None:
    """Raise if the stock function, which ``reason`` asks for, would see sinks where they were."""
    how: How | None = state.how
    if state.rotation is None or how is None or how.window is None:
        return
    kept = how.window.sinks + how.window.window_tokens(tokens)
    if tokens > kept:
        raise NotImplementedError(
            "adaptive: LocalAttention(positions='rebased') turns queries for native kernels alone, "
            f"and this call of {tokens} tokens, more than the {kept} that it keeps, needs the "
            f"stock attention ({reason}); use positions='original'"
        )


def _attend_all(state: LayerState, inputs: Inputs, pattern: Pattern) -> Tensor:
    """Attend where every head still has every key: one call, with a window for each head."""
    how: How = state.how
    query, tokens = inputs.query, pattern.tokens
    window, sinks = _numbers(how, tokens)
    windows = None
    if how.whole:
        windows = torch.full(query.shape[1:2], tokens, dtype=torch.int32, device=query.device)
        heads = torch.tensor(how.windowed, device=query.device)
        windows[inputs.query_heads(heads)] = window
    _count(state, inputs, pattern, window, sinks)
    inputs = inputs._replace(key=inputs.key[:, :, :tokens], value=inputs.value[:, :, :tokens])
    turns = state.rotation is not None and tokens > sinks + window
    near = local_attention(
        *inputs[:3],
        window=window if windows is None else None,
        windows=windows,
        sinks=0 if turns else sinks,
        offsets=pattern.offsets,
        scale=inputs.scale,
        softcap=inputs.softcap,
        causal=True,
    )
    if not turns:
        return near[0]
    if windows is None:
        return add_sinks(state.rotation, inputs, pattern, window, sinks, near)
    out, lse = near
    chosen = inputs.query_heads(heads)
    local, near = inputs._replace(query=query[:, chosen]), (out[:, chosen], lse[:, chosen])
    sizes = (window, sinks)
    made = add_sinks(state.rotation, local, pattern, *sizes, near, kv_heads=heads)
    out[:, chosen] = made.to(out.dtype)
    return out


def _reduce(state: LayerState, pattern: Pattern, layer: AdaptiveCacheLayer, store: KVStore) -> None:
    """Drop what no later token sees, if it is enough to be worth it."""
    how: How = state.how
    window, sinks = _numbers(how, store.length)
    rows = pattern.offsets
    packed = rows is not None and rows.shape[1] > len(("start", "end"))
    if store.length <= sinks + kept_tokens(window) or packed:
        return
    starts = torch.zeros(store.batch, dtype=torch.int64) if rows is None else rows[:, 0].long()
    make = partial(LocalStore, starts=starts, sinks=sinks, window=window)
    split = HeadSplit(store, how.whole, how.windowed, make)
    state.dropped_bytes += store.used_bytes - split.used_bytes
    layer.store = split


def _attend_split(state: LayerState, inputs: Inputs, pattern: Pattern, split: HeadSplit) -> Tensor:
    """Attend where the local heads have dropped tokens."""
    batch, heads, queries, head_dim = inputs.query.shape
    local = split.window
    assert isinstance(local, LocalStore)
    short = queries <= MAX_QUERY_TOKENS
    options: dict[str, Any] = {"scale": inputs.scale, "softcap": inputs.softcap}
    shape = (batch, queries, heads, head_dim)
    out = torch.empty(shape, device=inputs.query.device).transpose(1, 2)
    if split.whole is not None:
        keys, values = split.whole.keys, split.whole.values
        assert keys is not None
        assert values is not None
        part = inputs.heads(split.whole_heads)._replace(key=keys, value=values)
        if short:
            made = attend_whole(state, part, split.whole)
        else:
            rows = pattern.offsets
            made, _ = local_attention(part.query, keys, values, offsets=rows, **options)
        out[:, inputs.query_heads(split.whole_heads)] = made.to(out.dtype)
    chosen = inputs.query_heads(split.windowed_heads)
    query = inputs.query if split.whole is None else inputs.query[:, chosen]
    keys, values = local.tensors()
    turns = state.rotation is not None
    if turns and local.settled and queries == 1:  # its window is all that is held last
        recent = slice(-local.window, None)
        near = decode_attention(query, keys[:, :, recent], values[:, :, recent], **options)
    elif short:
        seen = local.seen(queries, sinks=not turns)
        near = decode_attention(query, keys, values, mask=seen, causal=False, **options)
    else:
        near = local_attention(
            query,
            keys,
            values,
            window=local.window,
            sinks=0 if turns else local.sinks,
            offsets=local.offsets(),
            **options,
        )
    made = near[0]
    if turns:
        part = inputs._replace(query=query, key=keys, value=values)
        sizes = (local.window, local.sinks)
        made = add_sinks(
            state.rotation, part, local.pattern(), *sizes, near, local.dropped_between()
        )
    out[:, chosen] = made.to(out.dtype)
    _count_split(state, inputs, pattern, split)
    return out


def _numbers(how: How, tokens: int) -> tuple[int, int]:
    """Window, no larger than the tokens, and sinks."""
    assert how.window is not None
    return min(how.window.window_tokens(tokens), max(tokens, 1)), how.window.sinks


def _count(state: LayerState, inputs: Inputs, pattern: Pattern, window: int, sinks: int) -> None:
    """Count one call on all keys: what its heads computed and read, of what dense ones would."""
    how: How = state.how
    batch, kv_heads, _, head_dim = inputs.key.shape
    queries, tokens = inputs.query.shape[2], pattern.tokens
    state.count_path("local")
    local, whole = len(how.windowed), len(how.whole)
    read = min(tokens, queries + window - 1 + sinks)
    row_bytes = 2 * batch * head_dim * inputs.key.element_size()
    kept = local * read + whole * tokens
    state.count_read(batch * kept // kv_heads, row_bytes * kept, row_bytes * kv_heads * tokens)
    seen = pattern.scores(batch, queries, window, sinks)
    dense = pattern.scores(batch, queries, None)
    total = Pattern(tokens).scores(batch, queries, None)
    state.count_scores((local * seen + whole * dense) // kv_heads, total)


def _count_split(state: LayerState, inputs: Inputs, pattern: Pattern, split: HeadSplit) -> None:
    """Count one call on a reduced cache; short calls have counted the whole heads themselves."""
    how: How = state.how
    local = split.window
    assert isinstance(local, LocalStore)
    state.count_path("local")
    batch, _, queries, head_dim = inputs.query.shape
    row_bytes = 2 * batch * head_dim * local.tensors()[0].element_size()
    read = min(local.store.length, queries + local.window - 1 + local.sinks) * len(how.windowed)
    dense = split.length * len(how.windowed)
    if queries > MAX_QUERY_TOKENS:
        read += split.length * len(how.whole)
        dense += split.length * len(how.whole)
        window, sinks = _numbers(how, pattern.tokens)
        seen = len(how.windowed) * pattern.scores(batch, queries, window, sinks)
        seen += len(how.whole) * pattern.scores(batch, queries, None)
        total = Pattern(pattern.tokens).scores(batch, queries, None)
        state.count_scores(seen // state.site.kv_heads, total)
    state.count_read(batch * read // state.site.kv_heads, row_bytes * read, row_bytes * dense)


def local_mask(inputs: Inputs, how: How, visible: Tensor) -> Tensor:
    """What the queries of each head see, for attention that takes nothing but a mask.

    Args:
        inputs: Of the call.
        how: Of its layer.
        visible: What heads that keep every key see, ``[batch, 1, query_tokens, tokens]``, bool.

    Returns:
        ``[batch, heads, query_tokens, tokens]``, bool.
    """
    tokens = visible.shape[3]
    window, sinks = _numbers(how, tokens)
    keys = torch.arange(tokens, device=visible.device)
    first = visible.int().argmax(3, keepdim=True)
    place = (visible * keys).amax(3, keepdim=True)
    near = visible & ((place - keys < window) | (keys < first + sinks))
    every = visible.expand(-1, inputs.query.shape[1], -1, -1).clone()
    heads = torch.tensor(how.windowed, device=visible.device)
    every[:, inputs.query_heads(heads)] = near
    return every
