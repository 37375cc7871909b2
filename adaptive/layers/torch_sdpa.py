"""F.scaled_dot_product_attention, answered by decode_attention where the two agree.

`attention` is the drop-in for code of one's own. Modules that call PyTorch's function themselves
are reached without touching their code: while their forward runs, a TorchFunctionMode sees every
call of it. The mode belongs to the thread and to that forward; it ends with it, exception or not.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adaptive.layers.autocast import autocast_dtype
from adaptive.layers.state import STATE, LayerState
from adaptive.layers.torch_guard import seconds_since, why_not_plain
from adaptive.ops.decode_attention import MAX_QUERY_TOKENS, decode_attention, supports
from adaptive.policy.plan import STOCK

MIN_UNGROUPED_KEYS = 2048
"""With one query head per KV head, PyTorch is as fast on a CPU when there are fewer keys than this
(unless one query of 16 bits asks)."""
MAX_UNGROUPED_TOKENS = 8
"""The same when there are more query tokens than this."""

_PER_HEAD = 4  # [batch, heads, tokens, head_dim]
_ONE_HEAD = 3  # [batch, tokens, head_dim]
_thread = threading.local()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Drop-in for ``F.scaled_dot_product_attention``, faster for 1..16 queries on a long cache.

    Calls of 1..16 query tokens without dropout and gradients go to the native kernel, which reads
    ``key`` and ``value`` in place, whatever their strides; all others go to PyTorch's function.

    Args:
        query: ``[batch, heads, query_tokens, head_dim]`` or ``[batch, query_tokens, head_dim]``.
        key: ``[batch, kv_heads, tokens, head_dim]``, or without heads as ``query``.
        value: As ``key``.
        attn_mask: Broadcastable to ``[batch, heads, query_tokens, tokens]``. bool: True takes
            part. Otherwise it is added to the scores.
        dropout_p: Probability of dropping an attention weight.
        is_causal: Query ``i`` sees keys ``0..i`` (aligned top left, as PyTorch defines it).
        scale: Factor on the scores; None: ``1 / sqrt(head_dim)``.
        enable_gqa: Let ``heads`` be a multiple of ``kv_heads``.

    Returns:
        Shape and dtype of ``query`` (under autocast, autocast's dtype). Sums are taken in float32.

    Raises:
        RuntimeError: PyTorch's function refuses the arguments.
    """
    options = (attn_mask, dropout_p, is_causal)
    if why_stock(query, key, value, *options, enable_gqa) is None:
        return _native(query, key, value, attn_mask, is_causal, scale)
    return F.scaled_dot_product_attention(
        query, key, value, *options, scale=scale, enable_gqa=enable_gqa
    )


def why_stock(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> str | None:
    """Why PyTorch's function must answer, with its own errors too; None if it need not."""
    if dropout_p != 0:
        return "dropout"
    reason = why_not_plain((query, key, value, attn_mask)) or _why_not_tensors(query, key, value)
    if reason is not None:
        return reason
    if not _fits(query, key, value, is_causal, enable_gqa):
        return "shape"
    if attn_mask is not None and (is_causal or not _mask_fits(attn_mask, query, key)):
        return "mask"
    return None if _pays(query, key, is_causal) else "PyTorch is as fast"


def _pays(query: Tensor, key: Tensor, is_causal: bool) -> bool:
    """Whether the native kernel is faster, from measurements (`python -m bench.modules`)."""
    if not query.is_cpu or query.shape[:-2] != key.shape[:-2]:
        return True
    tokens = query.shape[-2]
    if tokens == 1 and query.dtype != torch.float32:
        return True
    keys = tokens if is_causal else key.shape[-2]
    return tokens <= MAX_UNGROUPED_TOKENS and keys >= MIN_UNGROUPED_KEYS


def _why_not_tensors(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    rank, dtype, device = query.dim(), query.dtype, query.device
    if rank not in (_ONE_HEAD, _PER_HEAD) or key.dim() != rank or value.dim() != rank:
        return "number of dimensions"
    tokens, head_dim = query.shape[-2:]
    if not 1 <= tokens <= MAX_QUERY_TOKENS:
        return "query tokens"
    if not supports(head_dim, dtype):
        return "head_dim or dtype"
    if device.type not in decode_attention.native:
        return "device"
    if key.dtype != dtype or value.dtype != dtype:
        return "mixed dtypes"
    if key.device != device or value.device != device:
        return "mixed devices"
    if query.stride(-1) != 1 or key.stride(-1) != 1 or value.stride(-1) != 1:
        return "memory layout"
    return None


def _fits(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool) -> bool:
    (batch, *heads, tokens, head_dim), shape = query.shape, key.shape
    if shape != value.shape or shape[0] != batch or shape[-1] != head_dim or shape[-2] == 0:
        return False
    if is_causal and shape[-2] < tokens:
        return False
    if not heads or heads[0] == shape[1]:
        return True
    return enable_gqa and shape[1] > 0 and heads[0] % shape[1] == 0


def _mask_fits(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    if mask.device != query.device or mask.dim() > query.dim():
        return False
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return False
    full = (*query.shape[:-1], key.shape[-2])
    sizes = zip(reversed(mask.shape), reversed(full), strict=False)
    return all(size in (1, wanted) for size, wanted in sizes)


def _native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    per_head = query.dim() == _PER_HEAD
    dtype = autocast_dtype(query) or query.dtype
    if attn_mask is not None:
        if attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.float()
        if attn_mask.dim() == _ONE_HEAD and not per_head:
            attn_mask = attn_mask.unsqueeze(1)
    if is_causal:
        # PyTorch aligns its causal mask top left, decode_attention bottom right: they agree when
        # there are as many keys as queries, and no query sees a key beyond those.
        key, value = key[..., : query.shape[-2], :], value[..., : query.shape[-2], :]
    if not per_head:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
    no_softcap = 0.0  # by position: naming the arguments would take a tenth of a short call
    out, _ = decode_attention(query, key, value, None, attn_mask, scale, no_softcap, is_causal)
    return (out if per_head else out.squeeze(1)).to(dtype)


class _Route(TorchFunctionMode):
    """Hands the calls of F.scaled_dot_product_attention to `_routed`; all else passes through."""

    def __init__(self, state: LayerState) -> None:
        self.state = state

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _routed(self.state, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _routed(  # noqa: PLR0913
    state: LayerState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    options = (attn_mask, dropout_p, is_causal)
    reason = why_stock(query, key, value, *options, enable_gqa)
    reason = "plan" if state.row[0] == STOCK else reason
    counting = not torch.compiler.is_compiling()
    start = time.perf_counter() if counting else 0.0
    if reason is None:
        out = _native(query, key, value, attn_mask, is_causal, scale)
        if counting:
            keys = query.shape[-2] if is_causal else key.shape[-2]
            kv_bytes = 2 * key[..., :keys, :].numel() * key.element_size()
            seconds = seconds_since(start, state, query)
            state.count_native(_tokens(query), key.shape[0] * keys, kv_bytes, seconds)
        return out
    inner = counting and not getattr(_thread, "counted", False)
    if inner:
        _thread.counted = True  # by this forward: one around it must not count the call again
    try:
        out = F.scaled_dot_product_attention(
            query, key, value, *options, scale=scale, enable_gqa=enable_gqa
        )
    finally:
        if inner:
            _thread.counted = False
    if inner:
        state.count_stock(reason, _tokens(query), seconds_since(start, state, query))
    return out


def _tokens(query: Tensor) -> int:
    return query.shape[0] * query.shape[-2] if query.dim() >= _ONE_HEAD else query.shape[0]


def sdpa_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module whose calls of F.scaled_dot_product_attention are answered here."""
    state: LayerState = self.__dict__[STATE]
    if not state.record.enabled:
        return type(self).forward(self, *args, **kwargs)
    with _Route(state):
        return type(self).forward(self, *args, **kwargs)
