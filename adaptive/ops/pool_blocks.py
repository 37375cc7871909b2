"""pool_blocks: the mean of the tokens of each block of queries or keys."""

from typing import Any

import torch
from torch import Tensor

from adaptive.ops._op import op


def make_inputs(  # noqa: PLR0913
    batch: int,
    heads: int,
    tokens: int,
    head_dim: int,
    block_size: int = 64,
    sequences: int = 0,
    *,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Random arguments; ``sequences`` cuts each row at random."""
    rng = torch.Generator().manual_seed(seed)
    source = torch.randn(batch, heads, tokens, head_dim, generator=rng)
    offsets = None
    if sequences:
        offsets = torch.randint(0, tokens + 1, (batch, sequences + 1), generator=rng)
        offsets = offsets.sort(1).values.to(device=device, dtype=torch.int32)
    return source.to(device=device, dtype=dtype), block_size, offsets


def outputs(source: Tensor, block_size: int = 64, offsets: Tensor | None = None) -> Tensor:
    """Uninitialised result for these arguments."""
    if source.dim() != 4 or isinstance(block_size, float) or block_size < 1:  # noqa: PLR2004
        return torch.empty(0, device=source.device)  # what is wrong, the kernel says
    batch, heads, tokens, head_dim = source.shape
    blocks = (tokens + block_size - 1) // block_size
    return torch.empty((batch, heads, blocks, head_dim), dtype=torch.float32, device=source.device)


@op(
    outputs=outputs,
    inputs=make_inputs,
    edges=[
        {"batch": 0, "heads": 2, "tokens": 8, "head_dim": 64},
        {"batch": 2, "heads": 0, "tokens": 8, "head_dim": 64},
        {"batch": 2, "heads": 2, "tokens": 0, "head_dim": 64},
        # one token; one more and one less than blocks; blocks of one and of more than there are
        {"batch": 1, "heads": 1, "tokens": 1, "head_dim": 128},
        {"batch": 2, "heads": 3, "tokens": 129, "head_dim": 40},
        {"batch": 2, "heads": 2, "tokens": 127, "head_dim": 256},
        {"batch": 1, "heads": 2, "tokens": 9, "head_dim": 72, "block_size": 1},
        {"batch": 1, "heads": 2, "tokens": 300, "head_dim": 32, "block_size": 1000},
        # padded on both sides; blocks that padding leaves nothing of
        {"batch": 4, "heads": 2, "tokens": 200, "head_dim": 64, "block_size": 16, "sequences": 1},
        {"batch": 3, "heads": 2, "tokens": 500, "head_dim": 136, "sequences": 4},
    ],
    models=[
        # the queries and the keys of a layer of Llama-3.2-1B and of Llama-3-8B
        {"batch": 1, "heads": heads, "tokens": 16384, "head_dim": head_dim}
        for head_dim in (64, 128)
        for heads in (32, 8)
    ],
)
def pool_blocks(source: Tensor, block_size: int = 64, offsets: Tensor | None = None) -> Tensor:
    """Average the tokens of each block, read in place: what stands for a block of queries or keys.

    Args:
        source: Queries or keys, ``[batch, heads, tokens, head_dim]``, float32, float16 or bfloat16,
            any strides but the last; head_dim in 32..256, a multiple of 8.
        block_size: Tokens of a block, at least 1. Block n is the tokens from ``n * block_size`` on;
            the last one may have fewer.
        offsets: As for ``local_attention``, ``[batch, sequences + 1]``: tokens before the first of
            a row or from its last on are padding, which does not count and is not read. A block
            that two sequences share gives one mean. None: all tokens count.

    Returns:
        ``[batch, heads, blocks, head_dim]``, float32, summed in float32. A block without any token
        that counts gives zeros.

    Raises:
        ValueError: A shape, memory layout or ``block_size`` is wrong.
        TypeError: An argument is no tensor, or its dtype is wrong.
        IndexError: An offset is out of range, or offsets descend. On CUDA, where only the first and
            the last are read, that row's means are NaN instead.
        NotImplementedError: The device has no kernel.
    """
    batch, heads, tokens, head_dim = source.shape
    blocks = (tokens + block_size - 1) // block_size
    position = torch.arange(tokens, device=source.device)
    counts = torch.ones(batch, tokens, dtype=torch.bool, device=source.device)
    if offsets is not None:
        counts = (position >= offsets[:, :1]) & (position < offsets[:, -1:])
    sums = torch.zeros((batch, heads, blocks, head_dim), device=source.device)
    sums = sums.index_add(
        2, position // block_size, source.float().masked_fill(~counts[:, None, :, None], 0)
    )
    number = torch.zeros(batch, blocks, device=source.device)
    number = number.index_add(1, position // block_size, counts.float())
    return sums / number.clamp(min=1)[:, None, :, None]
