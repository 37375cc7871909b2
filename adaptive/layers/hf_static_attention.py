"""Attention of a static step: a cache of fixed capacity, of which each row uses its own length.

How long a row is, is known to the device alone. So neither a mask nor a view of the keys says what
the queries see, but the lengths, which the kernel reads.
"""

from time import perf_counter

import torch
from torch import Tensor

from adaptive.layers.hf_call import Call, why_not_arguments, why_not_tensors
from adaptive.layers.state import LayerState
from adaptive.layers.torch_guard import seconds_since
from adaptive.ops import decode_attention


def lengths_of(call: Call, state: LayerState) -> Tensor | None:
    """Keys that each row of a static cache uses, ``[batch]``, int32; None for other caches."""
    if torch.compiler.is_compiling():  # where tensors say nothing more
        if state.record.depth is not None and state.record.depth.static:
            raise NotImplementedError(
                "adaptive: SelfSpeculative(static=True) cannot run under torch.compile: call "
                "attention as it is"
            )
        return None
    lengths: Tensor | None = getattr(call.key, "adaptive_lengths", None)
    depth = state.record.depth
    if lengths is None and depth is not None and depth.static and not depth.elsewhere:
        raise NotImplementedError(
            "adaptive: SelfSpeculative(static=True): keys must reach attention as the cache gave "
            f"them, {type(call.module).__name__} changes them; use static=False"
        )
    return lengths


def attend(call: Call, state: LayerState, lengths: Tensor) -> tuple[Tensor, None]:
    """Answer a call of a static step: query ``i`` of ``n`` sees ``lengths - n + i + 1`` keys.

    Returns:
        ``[batch, query_tokens, heads, head_dim]`` in the dtype of the value, and no weights.

    Raises:
        NotImplementedError: The kernel does not take the call; stock could not tell rows apart.
    """
    reason = _why_not(call, state)
    if reason is not None:
        raise NotImplementedError(
            f"adaptive: SelfSpeculative(static=True): attention of {type(call.module).__name__} "
            f"must be one that the native kernel computes, got {reason}; use static=False"
        )
    start = perf_counter()
    out, _ = decode_attention(
        call.query,
        call.key,
        call.value,
        lengths=lengths,
        scale=call.scaling,
        softcap=call.kwargs.get("softcap") or 0.0,
    )
    batch, _, query_tokens, _ = call.query.shape
    state.count_path("static")
    state.count_native(batch * query_tokens, 0, 0, seconds_since(start, state, call.query))
    return out.transpose(1, 2).to(call.value.dtype), None


def _why_not(call: Call, state: LayerState) -> str | None:
    if state.record.want_weights:
        return "output_attentions"
    if call.dropout > 0:
        return "dropout"
    tensors = (call.query, call.key, call.value)
    return why_not_tensors(*tensors) or why_not_arguments(call)
