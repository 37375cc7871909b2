"""Attention of an encoder of transformers to tokens of which some merged or went."""

import torch
from torch import Tensor

from adaptive.layers.hf_call import Call
from adaptive.layers.hf_mask import LazyMask
from adaptive.layers.pattern import Pattern
from adaptive.layers.token_prunes import TokenPrunes
from adaptive.layers.token_reduction import TokenReduction


def reduced_call(call: Call, reduction: TokenReduction) -> Call:
    """Show a call to the reduction, and return it with the mask of the tokens that are left."""
    reduction.see(call.query, call.key, call.scaling)
    if isinstance(reduction, TokenPrunes):
        if not reduction.pruned:
            return call
        lengths = reduction.lengths
        return call._replace(mask=None if lengths is None else _mask(call, lengths, reduction))
    if reduction.bias is None:
        return call
    # Rounded to 16 bits the logarithm would be off by up to half a percent of a weight; kernels of
    # CUDA take no other dtype than the query's.
    bias = reduction.bias if call.query.is_cpu else reduction.bias.to(call.query)
    # Always by SDPA: some eager functions of transformers 4 multiply with what they get.
    return call._replace(mask=bias, eager=False)


def _mask(call: Call, lengths: Tensor, reduction: TokenPrunes) -> LazyMask:
    """What tells padding from the tokens that are left; dense if someone looks at it."""
    known: LazyMask | None = reduction.masks.get(call.eager)
    if known is not None:
        return known
    batch, _, tokens, _ = call.query.shape
    offsets = torch.nn.functional.pad(lengths[:, None], (1, 0))
    dtype = call.query.dtype if call.eager else torch.bool
    given = {"lengths": lengths, "tokens": tokens, "dtype": dtype}
    pattern = Pattern(tokens, offsets=offsets, causal=False)
    shape = (batch, 1, tokens, tokens)
    made = LazyMask(shape, dtype, call.query.device, _dense_mask, given, pattern)
    reduction.masks[call.eager] = made
    return made


def _dense_mask(lengths: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """The same as stock attention takes it, ``[batch, 1, tokens, tokens]``."""
    seen = torch.arange(tokens, device=lengths.device) < lengths[:, None]
    seen = seen | (lengths == 0)[:, None]  # softmax of nothing would be NaN
    if dtype != torch.bool:
        zero = torch.zeros((), dtype=dtype, device=lengths.device)
        seen = torch.where(seen, zero, torch.finfo(dtype).min)
    return seen[:, None, None].expand(-1, -1, tokens, -1)
