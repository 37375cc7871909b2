"""nn.MultiheadAttention with few queries on a long memory, answered by memory_attention."""

import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.layers.autocast import autocast_dtype
from adaptive.layers.memory_attention import Projections, memory_attention
from adaptive.layers.state import STATE, LayerState
from adaptive.layers.torch_guard import seconds_since, why_not_plain
from adaptive.ops.decode_attention import DTYPES, MAX_QUERY_TOKENS
from adaptive.policy.plan import STOCK

MIN_MEMORY_TOKENS = 64
"""Below this, leaving the memory unprojected saves less than its own operators cost."""

_BATCHED = 3
_PER_HEAD = 3


class Call(NamedTuple):
    """A call of nn.MultiheadAttention, its tensors laid out as if batched and batch_first."""

    query: Tensor  # [batch, query_tokens, embed_dim]
    key: Tensor  # [batch, tokens, kdim]
    value: Tensor  # [batch, tokens, vdim]
    padding: Tensor | None  # [batch, tokens]
    mask: Tensor | None  # [query_tokens, tokens] or [batch * heads, query_tokens, tokens]
    is_causal: bool
    need_weights: bool


def mha_forward(  # noqa: PLR0913
    self: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The forward of a patched nn.MultiheadAttention; arguments and results are its own."""
    state: LayerState = self.__dict__[STATE]
    masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
    if not state.record.enabled:
        return type(self).forward(self, query, key, value, *masks)
    counting = not torch.compiler.is_compiling()
    start = time.perf_counter() if counting else 0.0
    call = _call(self, (query, key, value), key_padding_mask, attn_mask, is_causal, need_weights)
    reason = "number of dimensions" if call is None else why_stock(self, call)
    reason = "plan" if state.row[0] == STOCK else reason
    if call is None or reason is not None:
        result = type(self).forward(self, query, key, value, *masks)
        if counting:
            rows = query.numel() // max(query.shape[-1], 1)
            state.count_stock(str(reason), rows, seconds_since(start, state, query))
        return result
    out, weights, native = _answer(self, call)
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    if query.dim() < _BATCHED:
        out, weights = out[0], None if weights is None else weights[0]
    elif not self.batch_first:
        out = out.transpose(0, 1)
    if counting:
        _count(state, call, native, seconds_since(start, state, query))
    return out, weights


def why_stock(module: nn.MultiheadAttention, call: Call) -> str | None:
    """Why the stock forward must answer, with its own errors too; None if it need not."""
    (batch, tokens, _), memory = call.query.shape, call.key.shape[1]
    reason = _why_not_worth(module, tokens, memory)
    if reason is not None:
        return reason
    tensors = (call.query, call.key, call.value, *_parameters(module))
    reason = why_not_plain((*tensors, call.padding, call.mask))
    if reason is not None:
        return reason
    shapes = (call.query.shape, call.key.shape, call.value.shape)
    widths = (module.embed_dim, module.kdim, module.vdim)
    wanted = tuple((batch, n, w) for n, w in zip((tokens, memory, memory), widths, strict=True))
    if shapes != wanted:
        return "shape"
    if not _masks_fit(module, call):
        return "mask"
    return _why_not_dtypes(call, tensors)


def _why_not_worth(module: nn.MultiheadAttention, tokens: int, memory: int) -> str | None:
    if module.training and module.dropout > 0:
        return "dropout"
    if not 1 <= tokens <= MAX_QUERY_TOKENS:
        return "query tokens"
    if tokens >= module.head_dim:
        return "heads narrower than the number of queries"
    return "short memory" if memory < MIN_MEMORY_TOKENS else None


def _why_not_dtypes(call: Call, tensors: Iterable[Tensor | None]) -> str | None:
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if call.query.device.type != "cpu":
        return "device"  # a GPU projects a memory so fast that this form may lose
    if not dtypes <= set(DTYPES):
        return "dtype"
    if autocast_dtype(call.query) is not None:
        return "weights under autocast" if call.need_weights else None
    return "mixed dtypes" if len(dtypes) > 1 else None


def _masks_fit(module: nn.MultiheadAttention, call: Call) -> bool:
    (batch, tokens, _), memory = call.query.shape, call.key.shape[1]
    if call.is_causal and call.mask is None:
        return False
    dtypes = {mask.dtype for mask in (call.padding, call.mask) if mask is not None}
    if len(dtypes) > 1 or not dtypes <= {torch.bool, torch.float32, call.query.dtype}:
        return False
    if call.padding is not None and call.padding.shape != (batch, memory):
        return False
    shapes = ((tokens, memory), (batch * module.num_heads, tokens, memory))
    return call.mask is None or call.mask.shape in shapes


def _call(
    module: nn.MultiheadAttention,
    tensors: tuple[Tensor, Tensor, Tensor],
    padding: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    need_weights: bool,
) -> Call | None:
    query, key, value = tensors
    rank = query.dim()
    if rank not in (_BATCHED - 1, _BATCHED) or key.dim() != rank or value.dim() != rank:
        return None
    shared = value is key
    if rank < _BATCHED:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        padding = None if padding is None else padding.unsqueeze(0)
    elif not module.batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    return Call(query, key, key if shared else value, padding, mask, is_causal, need_weights)


def _parameters(module: nn.MultiheadAttention) -> tuple[Tensor | None, ...]:
    separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    packed = (module.in_proj_weight, module.in_proj_bias)
    return (*separate, *packed, module.out_proj.weight, module.out_proj.bias)


def _projections(module: nn.MultiheadAttention) -> Projections:
    biases = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    if module.in_proj_weight is not None:
        query, key, value = module.in_proj_weight.chunk(3)
    else:
        query, key, value = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    return Projections(query, key, value, biases[0], biases[2])


def _merged_mask(heads: int, call: Call) -> Tensor | None:
    """One mask for memory_attention, broadcastable to [batch, heads, query_tokens, tokens]."""
    (batch, tokens, _), memory = call.query.shape, call.key.shape[1]
    mask = call.mask
    if call.is_causal and call.padding is None and not call.need_weights:
        # Stock takes is_causal at its word and reads no mask; aligned top left.
        return torch.ones(tokens, memory, dtype=torch.bool).tril()
    if mask is not None and mask.dim() == _PER_HEAD:
        mask = mask.view(batch, heads, tokens, memory)
    padding = None if call.padding is None else call.padding.view(batch, 1, 1, memory)
    if padding is None or mask is None:
        merged = mask if padding is None else padding
        if merged is None:
            return None
    else:
        merged = mask | padding if mask.dtype == torch.bool else mask.float() + padding.float()
    # PyTorch's boolean masks of this module say what to leave out, ours what takes part.
    return ~merged if merged.dtype == torch.bool else merged.float()


def _answer(module: nn.MultiheadAttention, call: Call) -> tuple[Tensor, Tensor | None, bool]:
    """Result and weights ``[batch, heads, query_tokens, tokens]``; whether the kernel ran."""
    low = autocast_dtype(call.query)
    with torch.autocast(call.query.device.type, enabled=False):
        answer = memory_attention(
            call.query,
            call.key,
            call.value,
            _projections(module),
            module.num_heads,
            _merged_mask(module.num_heads, call),
            call.need_weights,
        )
    dtype = low or call.query.dtype
    out = F.linear(answer.context.to(dtype), module.out_proj.weight, module.out_proj.bias)
    return out, None if answer.weights is None else answer.weights.to(dtype), answer.native


def _count(state: LayerState, call: Call, native: bool, seconds: float) -> None:
    elements = call.key.numel() if call.value is call.key else call.key.numel() + call.value.numel()
    rows, memory = call.query[..., 0].numel(), call.key[..., 0].numel()
    count = state.count_native if native else state.count_torch
    count(rows, memory, elements * call.key.element_size(), seconds)
