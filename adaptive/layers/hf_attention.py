"""The attention and mask functions that patched transformers models dispatch to.

Each is registered under a name of its own in transformers' AttentionInterface and
AttentionMaskInterface: ADAPTIVE for models whose attention was "sdpa", ADAPTIVE_EAGER for "eager".
The masks are the stock masks of that kind, so a call that the native kernel does not take runs the
stock function on the stock mask, bit for bit.
"""

from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adaptive.errors import AdaptiveError, PatchConflict
from adaptive.layers import block_sparse, hf_static_attention, local_heads, windowed_attention
from adaptive.layers import hf_encoder_attention as encoder
from adaptive.layers.depth import KeysKept
from adaptive.layers.head_split import HeadSplit
from adaptive.layers.hf_cache import AdaptiveCacheLayer
from adaptive.layers.hf_call import (
    Attended,
    Call,
    attend_all,
    gathered,
    inputs_of,
    is_long,
    rows_of,
    stock_function,
    why_stock,
)
from adaptive.layers.hf_head_attention import attend_chosen, chosen_heads
from adaptive.layers.hf_mask import make_mask
from adaptive.layers.hf_prefill import (
    attend_long,
    local_inputs,
    pattern_of,
    why_stock_long,
    with_local_mask,
    with_stock_mask,
    without_mask,
)
from adaptive.layers.hf_reduced_attention import reduced_call
from adaptive.layers.how import How
from adaptive.layers.pattern import Pattern
from adaptive.layers.sparse_attention import attend_whole
from adaptive.layers.state import ENCODER, STATE, LayerState
from adaptive.policy.plan import STOCK

ADAPTIVE = "adaptive"
ADAPTIVE_EAGER = "adaptive_eager"
NAMES = {"sdpa": ADAPTIVE, "eager": ADAPTIVE_EAGER}
"""The name that takes the place of each stock implementation."""


def adaptive_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Attended:
    """Attention of a patched model whose own implementation was "sdpa".

    Args:
        module: The attention module; its LayerState says what to do.
        query: ``[batch, heads, query_tokens, head_dim]``.
        key: ``[batch, kv_heads, tokens, head_dim]``, of the whole cache.
        value: As ``key``.
        attention_mask: None or ``[batch or 1, heads or 1, query_tokens, tokens or more]``: bool
            (True takes part) or floating (added).
        scaling: Factor on the scores; None: ``1 / sqrt(head_dim)``.
        dropout: Probability; anything but 0 runs the stock function.
        kwargs: What the model passes besides.

    Returns:
        ``[batch, query_tokens, heads, head_dim]`` in the dtype of ``value``, and no weights.
    """
    call = Call(False, module, query, key, value, attention_mask, scaling, dropout, kwargs)
    return _attend(call)


def adaptive_eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Attended:
    """Attention of a patched model whose own implementation was "eager".

    As `adaptive_attention`, but without a mask every query sees every key, ``softcap`` is applied,
    and calls that must return attention weights get them from the stock function.
    """
    call = Call(True, module, query, key, value, attention_mask, scaling, dropout, kwargs)
    return _attend(call)


def adaptive_mask(*args: Any, **kwargs: Any) -> Any:
    """Make the mask that stock "sdpa" attention gets, or what becomes it when looked at."""
    return make_mask("sdpa", args, kwargs)


def adaptive_eager_mask(*args: Any, **kwargs: Any) -> Any:
    """Make the mask that stock "eager" attention gets, or what becomes it when looked at."""
    return make_mask("eager", args, kwargs)


def register() -> None:
    """Make both names known to transformers; other models are not touched by it.

    Raises:
        PatchConflict: Another library put something else under one of the names.
    """
    functions = {
        ADAPTIVE: (adaptive_attention, adaptive_mask),
        ADAPTIVE_EAGER: (adaptive_eager_attention, adaptive_eager_mask),
    }
    for name, (attention, mask) in functions.items():
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
        # An entry set on the instance, as some libraries do, hides what is registered.
        if ALL_ATTENTION_FUNCTIONS[name] is not attention:
            raise PatchConflict(
                f"adaptive: another library has replaced {name!r} in ALL_ATTENTION_FUNCTIONS; "
                "undo that first"
            )


def _state_of(call: Call) -> LayerState:
    state: LayerState | None = call.module.__dict__.get(STATE)
    if state is None:
        raise AdaptiveError(
            f"adaptive: {type(call.module).__name__} asks for {ADAPTIVE!r} attention, but its "
            "model is not patched; load it with attn_implementation='sdpa', then adaptive.patch it"
        )
    return state


def _attend(call: Call) -> Attended:
    """Run the native kernel if it can take the call, the stock function otherwise; count which."""
    state = _state_of(call)
    if (lengths := hf_static_attention.lengths_of(call, state)) is not None:
        return hf_static_attention.attend(call, state, lengths)
    if not state.record.enabled:
        return _stock(call, None)
    if state.site.kind == ENCODER:
        return _attend_both_ways(call, state)
    if state.record.keys_only:
        raise KeysKept
    layer = _layer_of(call)
    split = None if layer is None else layer.store
    reduced = isinstance(split, HeadSplit)
    tokens = split.length if isinstance(split, HeadSplit) else call.key.shape[2]
    if is_long(call):
        block_sparse.refuse_compiling(state, tokens)
    pattern = None if torch.compiler.is_compiling() else pattern_of(call, tokens)
    if (choice := chosen_heads(state)) is not None:
        return attend_chosen(call, state, choice, reduced)
    reason = _why_stock(call, state, pattern, reduced)
    _refuse_unreadable(state, reason, reduced, tokens)
    if reason is not None or state.how is not None:
        call = gathered(call)
    if torch.compiler.is_compiling():
        return _native(call, state, layer, pattern) if reason is None else _stock(call, state.how)

    start = perf_counter()
    attended = _stock(call, state.how) if reason else _native(call, state, layer, pattern)
    state.record.timed = call.query.is_cpu
    seconds = perf_counter() - start if state.record.timed else 0.0
    batch, _, query_tokens, _ = call.query.shape
    if reason is None:  # what was read has been counted where it was read
        state.count_native(batch * query_tokens, 0, 0, seconds)
    else:
        state.count_stock(reason, batch * query_tokens, seconds)
    return attended


def _attend_both_ways(call: Call, state: LayerState) -> Attended:
    """As `_attend`, for an encoder."""
    if (reduction := state.record.token_reduction) is not None and reduction.active:
        call = reduced_call(call, reduction)
    pattern = encoder.pattern_of(call)
    reason = "plan" if state.row[0] == STOCK else why_stock(call, state)
    reason = reason or encoder.why_stock_encoder(call, state, pattern)
    if reason is not None:
        call = encoder.with_policy_mask(call, state, pattern)
    if torch.compiler.is_compiling():
        return _stock(call, None) if reason else encoder.attend_encoder(state, call, pattern)
    start = perf_counter()
    attended = _stock(call, None) if reason else encoder.attend_encoder(state, call, pattern)
    state.record.timed = call.query.is_cpu
    seconds = perf_counter() - start if state.record.timed else 0.0
    tokens = call.query.shape[0] * call.query.shape[2]
    if reason is None:
        state.count_native(tokens, 0, 0, seconds)
    else:
        state.count_stock(reason, tokens, seconds)
    return attended


def _why_stock(call: Call, state: LayerState, pattern: Pattern | None, reduced: bool) -> str | None:
    """Say why the stock function must answer a call; None if native kernels can."""
    if state.row[0] == STOCK:
        return "plan"
    if state.how is not None and state.how.local:
        known = pattern is not None and pattern.causal
        return why_stock(call, state) or (None if known else "mask")
    long = is_long(call) and not reduced
    return (why_stock_long(state, call, pattern) if long else None) or why_stock(call, state)


def _layer_of(call: Call) -> AdaptiveCacheLayer | None:
    """The cache layer that the keys of a call came from, if it is one of ours."""
    if torch.compiler.is_compiling():
        return None
    return getattr(call.key, "adaptive_layer", None)


def _refuse_unreadable(state: LayerState, reason: str | None, reduced: bool, tokens: int) -> None:
    """Raise if a call would need the stock function, which cannot do what the policy says."""
    if reason is not None and not reduced:
        local_heads.refuse_stock(state, reason, tokens)
    elif reason is not None:
        raise NotImplementedError(
            "adaptive: this cache was reduced by a policy, and the stock attention that this call "
            f"needs ({reason}) cannot read it; start with a new cache"
        )


def _stock(call: Call, how: How | None) -> Attended:
    local = how is not None and how.local
    call = with_local_mask(call, how) if local and how else with_stock_mask(call)
    function = stock_function(call.module, "eager" if call.eager else "sdpa")
    return function(
        call.module,
        call.query,
        call.key,
        call.value,
        call.mask,
        scaling=call.scaling,
        dropout=call.dropout,
        **call.kwargs,
    )


def _native(
    call: Call, state: LayerState, layer: AdaptiveCacheLayer | None, pattern: Pattern | None
) -> Attended:
    """Answer a call by native kernels, and count what they read."""
    store = None if layer is None else layer.store
    if state.how is not None and state.how.local:
        assert pattern is not None
        state.record.refuse_compiling()
        out = local_heads.attend(state, local_inputs(call, pattern), pattern, layer)
    elif isinstance(store, HeadSplit):
        out = _windowed(with_stock_mask(call), state, layer, store.length)
    elif is_long(call):
        assert pattern is not None
        out = attend_long(state, call, pattern)
    elif state.how is not None and state.how.windowed:
        out = _windowed(with_stock_mask(call), state, layer, call.key.shape[2])
    else:
        rows = rows_of(call)
        call = without_mask(call, pattern)
        inputs = inputs_of(call, call.key.shape[2])
        if state.how is not None:
            state.record.refuse_compiling()
            out = attend_whole(state, inputs, store)
        else:
            out = attend_all(call, inputs, state, rows)
            batch, size = call.query.shape[0], call.key[0].numel() * call.key.element_size()
            state.count_read(batch * call.key.shape[2], 2 * batch * size, 0)
    out = out.transpose(1, 2)
    return out if call.value.dtype == out.dtype else out.to(call.value.dtype), None


def _windowed(
    call: Call, state: LayerState, layer: AdaptiveCacheLayer | None, tokens: int
) -> Tensor:
    state.record.refuse_compiling()
    return windowed_attention.attend(state, inputs_of(call, tokens), layer)
