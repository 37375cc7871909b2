"""One call of attention by a transformers model: what it holds, and whether the kernels take it."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adaptive.errors import AdaptiveError
from adaptive.layers.autocast import autocast_dtype
from adaptive.layers.hf_mask import LazyMask
from adaptive.layers.sparse_attention import Inputs
from adaptive.layers.state import LayerState
from adaptive.layers.torch_guard import why_not_plain
from adaptive.ops import decode_attention
from adaptive.ops.decode_attention import DTYPES, MAX_QUERY_TOKENS, supports
from adaptive.ops.tree_attention import tree_attention

MASK_AXES = 4

Attended = tuple[Tensor, Tensor | None]
"""What an attention function returns: ``[batch, query_tokens, heads, head_dim]``, and weights."""

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


def stock_function(module: nn.Module, implementation: str) -> Callable[..., Attended]:
    """Return the attention function that an unpatched ``module`` would call.

    Raises:
        AdaptiveError: There is no eager function beside the module's class.
    """
    if implementation != "eager":
        return cast("Callable[..., Attended]", ALL_ATTENTION_FUNCTIONS[implementation])
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            return cast("Callable[..., Attended]", function)
    raise AdaptiveError(
        f"adaptive: {type(module).__name__} has no eager_attention_forward in its module"
    )


def inputs_of(call: Call, tokens: int) -> Inputs:
    """What the ops need to know of a call whose cache holds ``tokens``."""
    query, key, value, mask = call.query, call.key, call.value, call.mask
    query_tokens = query.shape[2]
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
    softcap = call.kwargs.get("softcap") or 0.0
    return Inputs(query, key, value, mask, call.scaling, softcap, causal)


def rows_of(call: Call) -> Tensor | None:
    """Which rows of the cache the query's rows read, ``[batch]``, int64; None: each its own."""
    if torch.compiler.is_compiling():
        return None
    return getattr(call.key, "adaptive_rows", None)


def gathered(call: Call) -> Call:
    """Return a call whose keys and values are copies of the rows that it reads."""
    rows = rows_of(call)
    if rows is None:
        return call
    return call._replace(key=call.key.index_select(0, rows), value=call.value.index_select(0, rows))


def attend_all(call: Call, inputs: Inputs, state: LayerState, rows: Tensor | None) -> Tensor:
    """Attention to every key that the mask, or the tree that it was made of, lets through.

    Args:
        call: As it came.
        inputs: What the ops need to know of it.
        state: Of the layer, to count in.
        rows: As `rows_of`; a tree's rows are all of the cache's.
    """
    tree = getattr(call.mask, "adaptive_tree", None)
    if tree is None:
        out, _ = decode_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            mask=inputs.mask,
            cache_rows=rows,
            **inputs.options(),
        )
        return out
    state.count_path("tree")
    parents, held = tree
    out, _ = tree_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        parents,
        held,
        scale=inputs.scale,
        softcap=inputs.softcap,
    )
    return out


def is_long(call: Call) -> bool:
    """Whether there are more query tokens than the decode kernel takes."""
    return call.query.shape[2] > MAX_QUERY_TOKENS


def why_stock(call: Call, state: LayerState) -> str | None:
    """Say why the stock function must answer a call, whatever its length; None if it need not."""
    query, key, value = call.query, call.key, call.value
    if state.record.want_weights:
        return "output_attentions"
    if call.dropout > 0:
        return "dropout"
    mask = None if isinstance(call.mask, LazyMask) else call.mask
    return (
        why_not_plain((query, key, value, mask))
        or why_not_tensors(query, key, value)
        or why_not_arguments(call)
    )


def why_not_tensors(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Say what of a call's tensors the kernels do not take; None if they take them."""
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


def why_not_arguments(call: Call) -> str | None:
    """Say which of a call's other arguments they do not know; None if they know all."""
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
