"""Attention of layers some of whose heads keep a window of their keys and drop the rest for good.

The heads drop them at the first decoding step, when the prompt has been read, and again whenever
too many recent tokens have piled up.
"""

from functools import partial

import torch
from torch import Tensor

from adaptive.layers.certificate import retained_mass
from adaptive.layers.head_split import HeadSplit
from adaptive.layers.hf_cache import AdaptiveCacheLayer
from adaptive.layers.how import How
from adaptive.layers.kv_store import KVStore
from adaptive.layers.sparse_attention import (
    Inputs,
    attend_densely,
    attend_whole,
    log_mass,
    visible_tokens,
)
from adaptive.layers.state import LayerState
from adaptive.layers.window_store import WindowStore
from adaptive.ops import decode_attention
from adaptive.ops.decode_attention import MAX_QUERY_TOKENS


def attend(state: LayerState, inputs: Inputs, layer: AdaptiveCacheLayer | None) -> Tensor:
    """Answer a call of a layer with windowed heads.

    Args:
        state: Of the attention layer.
        inputs: Of the call. Keys and values are all of the cache, or the new ones alone if the
            cache has been reduced.
        layer: The cache layer that the keys came from; None if that is not known.

    Returns:
        ``[batch, heads, query_tokens, head_dim]``, float32.
    """
    if layer is None:
        state.record.note("nothing dropped: the cache is not one that patch() took over")
        return attend_whole(state, inputs, None)
    if not isinstance(layer.store, HeadSplit):
        return _reduce(state, inputs, layer, layer.store)
    pieces = inputs.query.split(MAX_QUERY_TOKENS, dim=2)
    if len(pieces) == 1:
        return _attend_split(state, inputs, layer.store, 0)
    return torch.cat(_in_pieces(state, inputs, layer.store, pieces), dim=2)


def _in_pieces(
    state: LayerState, inputs: Inputs, split: HeadSplit, pieces: tuple[Tensor, ...]
) -> list[Tensor]:
    """A chunk longer than the kernels take, piece by piece; each sees the tokens up to its own."""
    found = []
    start, later = 0, inputs.query.shape[2]
    for piece in pieces:
        later -= piece.shape[2]
        mask = inputs.mask
        if mask is not None:
            rows = slice(start, start + piece.shape[2]) if mask.shape[2] > 1 else slice(None)
            mask = mask[:, :, rows, : split.length - later]
        part = inputs._replace(query=piece, mask=mask, causal=True)
        found.append(_attend_split(state, part, split, later))
        start += piece.shape[2]
    return found


def _reduce(state: LayerState, inputs: Inputs, layer: AdaptiveCacheLayer, store: KVStore) -> Tensor:
    """Attend for the last time to every key; then drop what the windowed heads need not keep."""
    how: How = state.how
    assert how.window is not None
    tokens = inputs.query.shape[2]
    window = how.window.window_tokens(store.length - tokens) + tokens
    if not state.record.sparse or store.length <= how.window.sinks + window:
        state.count_read(0, 0, 2 * inputs.key.numel() * inputs.key.element_size())
        return attend_densely(state, inputs, "dense: within the window")
    visible = visible_tokens(inputs.mask, inputs.key.shape[0])
    make = partial(
        WindowStore,
        visible=visible,
        sinks=how.window.sinks,
        window=window,
        compensation=how.compensation,
    )
    split = HeadSplit(store, how.whole, how.windowed, make)
    state.dropped_bytes += store.used_bytes - split.used_bytes
    _, full = decode_attention(*inputs[:3], mask=inputs.mask, **inputs.options())
    layer.store = split
    kept = _windowed(split, inputs, 0, compensated=False)[1]
    full = full[:, inputs.query_heads(split.windowed_heads)]
    log_mass(state, retained_mass(kept, full), how.windowed)
    state.count_path("audit")
    return _attend_split(state, inputs, split, 0)


def _attend_split(state: LayerState, inputs: Inputs, split: HeadSplit, later: int) -> Tensor:
    """Attend where some heads have dropped tokens; the last ``later`` tokens are not seen yet."""
    batch, heads, tokens, head_dim = inputs.query.shape
    out = torch.empty((batch, tokens, heads, head_dim), device=inputs.query.device).transpose(1, 2)
    if split.whole is not None:
        keys, values = split.whole.keys, split.whole.values
        assert keys is not None
        assert values is not None
        length = split.length - later
        part = inputs.heads(split.whole_heads)
        part = part._replace(key=keys[:, :, :length], value=values[:, :, :length])
        out[:, inputs.query_heads(split.whole_heads)] = attend_whole(state, part, split.whole)
    made, _ = _windowed(split, inputs, later)
    out[:, inputs.query_heads(split.windowed_heads)] = made
    _count_windowed(state, split)
    if later == 0:
        _window(split).trim(visible_tokens(inputs.mask, batch))
    return out


def _window(split: HeadSplit) -> WindowStore:
    assert isinstance(split.window, WindowStore)  # local heads are answered in `local_heads`
    return split.window


def _windowed(
    split: HeadSplit, inputs: Inputs, later: int, compensated: bool = True
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the windowed heads."""
    part = inputs.heads(split.windowed_heads)
    keys, values, bias = _window(split).read(part.mask, later, compensated)
    return decode_attention(
        part.query,
        keys,
        values,
        mask=bias,
        scale=part.scale,
        softcap=part.softcap,
        causal=part.mask is None,
    )


def _count_windowed(state: LayerState, split: HeadSplit) -> None:
    how: How = state.how
    state.count_path("razor" if how.compensation else "window")
    store = split.window.store
    heads = len(how.windowed)
    state.count_read(
        split.batch * store.length * heads // state.site.kv_heads,
        store.used_bytes,
        store.used_bytes // max(store.length, 1) * split.length,
    )
