"""The attention and mask functions that patched transformers models dispatch to.

Each is registered under a name of its own in transformers' AttentionInterface and
AttentionMaskInterface: ADAPTIVE for models whose attention was "sdpa", ADAPTIVE_EAGER for "eager".
The masks are the stock masks of that kind, so a call that the native kernel does not take runs the
stock function on the stock mask, bit for bit.
"""

import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adaptive.errors import AdaptiveError, PatchConflict
from adaptive.layers.state import STATE, LayerState
from adaptive.layers.torch_guard import autocast_dtype, why_not_plain
from adaptive.ops import decode_attention
from adaptive.ops.decode_attention import DTYPES, MAX_QUERY_TOKENS, supports
from adaptive.policy.plan import STOCK

ADAPTIVE = "adaptive"
ADAPTIVE_EAGER = "adaptive_eager"
NAMES = {"sdpa": ADAPTIVE, "eager": ADAPTIVE_EAGER}
"""The name that takes the place of each stock implementation."""

MASK_AXES = 4

# Arguments that change nothing here: the mask carries windows and positions already, and caches
# are updated before attention is called. Any other that is set goes to the stock function.
HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "is_causal",
        "logits_to_keep",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "sliding_window",
        "softcap",
        "token_type_ids",
        "use_cache",
    }
)

Attended = tuple[Tensor, Tensor | None]


class Call(NamedTuple):
    """One call of a registered attention function; see `adaptive_attention`."""

    eager: bool
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float | None
    dropout: float
    kwargs: dict[str, Any]


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
    """Make the mask that stock "sdpa" attention gets."""
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


def adaptive_eager_mask(*args: Any, **kwargs: Any) -> Any:
    """Make the mask that stock "eager" attention gets."""
    return ALL_MASK_ATTENTION_FUNCTIONS["eager"](*args, **kwargs)


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


def stock_function(module: nn.Module, implementation: str) -> Callable[..., Attended]:
    """Return the attention function that an unpatched ``module`` would call.

    Raises:
        AdaptiveError: There is no eager function beside the module's class.
    """
    if implementation != "eager":
        found: Callable[..., Attended] = ALL_ATTENTION_FUNCTIONS[implementation]
        return found
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            eager: Callable[..., Attended] = function
            return eager
    raise AdaptiveError(
        f"adaptive: {type(module).__name__} has no eager_attention_forward in its module"
    )


def _attend(call: Call) -> Attended:
    """Run the native kernel if it can take the call, the stock function otherwise; count which."""
    state: LayerState | None = call.module.__dict__.get(STATE)
    if state is None:
        raise AdaptiveError(
            f"adaptive: {type(call.module).__name__} asks for {ADAPTIVE!r} attention, but its "
            "model is not patched; load it with attn_implementation='sdpa', then adaptive.patch it"
        )
    if not state.record.enabled:
        return _stock(call)
    reason = _why_stock(call, state)
    if torch.compiler.is_compiling():
        return _native(call) if reason is None else _stock(call)

    start = perf_counter()
    attended = _native(call) if reason is None else _stock(call)
    state.record.timed = call.query.is_cpu
    seconds = perf_counter() - start if state.record.timed else 0.0
    batch, _, query_tokens, _ = call.query.shape
    if reason is None:
        tokens = batch * call.key.shape[2]
        kv_bytes = 2 * call.key.numel() * call.key.element_size()
        state.count_native(batch * query_tokens, tokens, kv_bytes, seconds)
    else:
        state.count_stock(reason, batch * query_tokens, seconds)
    return attended


def _stock(call: Call) -> Attended:
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


def _native(call: Call) -> Attended:
    query, key, value, mask = call.query, call.key, call.value, call.mask
    query_tokens, tokens = query.shape[2], key.shape[2]
    causal = False
    if mask is not None:
        if mask.shape[3] > tokens:  # before 5.0 a mask could be longer than the cache
            mask = mask[..., :tokens]
        if mask.dtype not in (torch.bool, torch.float32):
            mask = mask.float()
    elif not call.eager and query_tokens > 1:
        # Stock "sdpa" then takes its causal flag from the top left: queries see no later keys.
        flag = call.kwargs.get("is_causal")
        causal = bool(getattr(call.module, "is_causal", True) if flag is None else flag)
        if causal and tokens > query_tokens:
            key, value = key[:, :, :query_tokens], value[:, :, :query_tokens]
    out, _ = decode_attention(
        query,
        key,
        value,
        mask=mask,
        scale=call.scaling,
        softcap=call.kwargs.get("softcap") or 0.0,
        causal=causal,
    )
    out = out.transpose(1, 2)
    return out if value.dtype == torch.float32 else out.to(value.dtype), None


def _why_stock(call: Call, state: LayerState) -> str | None:
    """Say why the stock function must answer this call; None if the kernel can."""
    query, key, value = call.query, call.key, call.value
    if state.row[0] == STOCK:
        return "plan"
    if query.shape[2] > MAX_QUERY_TOKENS:
        fresh = call.mask is None or key.shape[2] == query.shape[2]
        return "prefill" if fresh else "long chunk"
    if state.record.want_weights:
        return "output_attentions"
    if call.dropout > 0:
        return "dropout"
    return (
        why_not_plain((query, key, value, call.mask))
        or _why_not_tensors(query, key, value)
        or _why_not_arguments(call)
    )


def _why_not_tensors(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    if not (query.dtype == key.dtype == value.dtype):
        return "mixed dtypes"
    if torch._C._is_any_autocast_enabled() and autocast_dtype(query) not in (None, query.dtype):
        return "autocast"
    head_dim = query.shape[3]
    if head_dim != value.shape[3]:
        return "value head size"
    if not supports(head_dim, query.dtype):
        return f"head size {head_dim}" if query.dtype in DTYPES else f"dtype {query.dtype}"
    if not query.is_cpu and query.device.type not in decode_attention.native:
        return f"device {query.device.type}"
    if query.stride(3) != 1 or key.stride(3) != 1 or value.stride(3) != 1:
        return "layout"
    return None


def _why_not_arguments(call: Call) -> str | None:
    mask, kwargs = call.mask, call.kwargs
    for name, given in kwargs.items():
        if given is not None and given is not False and name not in HARMLESS:
            return f"argument {name}"
    if call.eager and call.scaling is None:
        return "no scaling"
    if not call.eager and kwargs.get("softcap") is not None:
        return "softcap with sdpa"
    if mask is None:
        return None
    if mask.dim() != MASK_AXES or mask.shape[3] < call.key.shape[2]:
        return "mask shape"
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        return "mask dtype"
    return None
