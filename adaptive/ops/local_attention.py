"""local_attention: many query tokens attend to a window of keys, and to some first ones."""

from typing import Any

import torch
from torch import Tensor

from adaptive.ops._local_gradient import backward, setup_context
from adaptive.ops._local_keys import seen_keys
from adaptive.ops._op import op
from adaptive.ops.decode_attention import decode_attention


def make_inputs(  # noqa: PLR0913
    batch: int,
    heads: int,
    kv_heads: int,
    tokens: int,
    head_dim: int,
    query_tokens: int | None = None,
    window: int | None = None,
    windows: bool = False,
    sinks: int = 0,
    sequences: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
    *,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Random arguments; ``windows`` draws one per head, ``sequences`` cuts each row at random."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=rng).to(device=device, dtype=dtype)

    query = draw(batch, heads, tokens if query_tokens is None else query_tokens, head_dim)
    key, value = draw(batch, kv_heads, tokens, head_dim), draw(batch, kv_heads, tokens, head_dim)
    per_head = offsets = None
    if windows:
        per_head = torch.randint(1, tokens + 2, (heads,), generator=rng, dtype=torch.int32)
        per_head = per_head.to(device)
    if sequences:
        offsets = torch.randint(0, tokens + 1, (batch, sequences + 1), generator=rng)
        offsets = offsets.sort(1).values.to(device=device, dtype=torch.int32)
    return query, key, value, window, per_head, sinks, offsets, None, softcap, causal


def outputs(  # noqa: PLR0913
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None = None,
    windows: Tensor | None = None,
    sinks: int = 0,
    offsets: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Uninitialised ``out`` and ``lse`` for these arguments."""
    if query.dim() != 4:  # noqa: PLR2004
        raise ValueError(
            f"adaptive::local_attention: query must have 4 dimensions, got {list(query.shape)}"
        )
    batch, heads, tokens, width = query.shape
    strides = (tokens * heads * width, width, heads * width, 1)
    out = query.new_empty(0).new_empty((batch, tokens, heads, width))
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=query.device)
    return out.as_strided((batch, heads, tokens, width), strides), lse


def reference_mask(
    query: Tensor,
    key: Tensor,
    window: int | Tensor | None,
    sinks: int,
    offsets: Tensor | None,
    causal: bool,
) -> Tensor:
    """Which keys each query sees, ``[batch, heads or 1, query_tokens, tokens]``, bool."""
    tokens = key.shape[2]
    keys = torch.arange(tokens, device=query.device)
    seen = seen_keys(keys[tokens - query.shape[2] :], keys, tokens, window, sinks, offsets, causal)
    return seen.expand(query.shape[0], -1, -1, -1)


@op(
    outputs=outputs,
    inputs=make_inputs,
    gradient=(setup_context, backward),
    edges=[
        # an empty batch, no query token, no token at all
        {"batch": 0, "heads": 4, "kv_heads": 2, "tokens": 8, "head_dim": 64, "window": 3},
        {"batch": 2, "heads": 4, "kv_heads": 2, "tokens": 8, "head_dim": 64, "query_tokens": 0},
        {"batch": 2, "heads": 4, "kv_heads": 2, "tokens": 0, "head_dim": 64},
        # one token; a window of one; about a tile of 64; group ratios 3 and 7
        {"batch": 1, "heads": 1, "kv_heads": 1, "tokens": 1, "head_dim": 128},
        {"batch": 2, "heads": 4, "kv_heads": 4, "tokens": 65, "head_dim": 96, "window": 1},
        {"batch": 2, "heads": 6, "kv_heads": 2, "tokens": 129, "head_dim": 40, "window": 64},
        {"batch": 1, "heads": 7, "kv_heads": 1, "tokens": 300, "head_dim": 256, "window": 65},
        # after a cache, sinks, windows per head, packed sequences, bidirectional, softcap
        {
            "batch": 2,
            "heads": 4,
            "kv_heads": 2,
            "tokens": 400,
            "head_dim": 64,
            "query_tokens": 37,
            "window": 100,
            "sinks": 5,
        },
        {
            "batch": 2,
            "heads": 4,
            "kv_heads": 2,
            "tokens": 150,
            "head_dim": 72,
            "windows": True,
            "sinks": 70,
            "softcap": 5.0,
        },
        {
            "batch": 3,
            "heads": 4,
            "kv_heads": 2,
            "tokens": 260,
            "head_dim": 128,
            "window": 40,
            "sinks": 3,
            "sequences": 5,
        },
        {
            "batch": 2,
            "heads": 2,
            "kv_heads": 2,
            "tokens": 200,
            "head_dim": 80,
            "window": 33,
            "sinks": 2,
            "sequences": 3,
            "causal": False,
        },
    ],
    models=[
        # a layer of Llama-3.2-1B's and of Mistral-7B's shape
        {
            "batch": 1,
            "heads": 32,
            "kv_heads": 8,
            "tokens": 16384,
            "head_dim": 64,
            "window": 1024,
        },
        {
            "batch": 1,
            "heads": 32,
            "kv_heads": 8,
            "tokens": 16384,
            "head_dim": 128,
            "window": 4096,
        },
    ],
)
def local_attention(  # noqa: PLR0913
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None = None,
    windows: Tensor | None = None,
    sinks: int = 0,
    offsets: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attend from any number of query tokens to near keys and sinks; nothing else is computed.

    Sliding-window attention (Beltagy et al. 2020, arXiv:2004.05150) with sinks (Xiao et al. 2023,
    arXiv:2309.17453), tile by tile with the online softmax of FlashAttention (Dao et al. 2022,
    arXiv:2205.14135). No tensor of ``query_tokens x tokens`` exists.

    Differentiable in query, key and value; the backward pass computes no more than the forward one,
    block by block with PyTorch's matrix products (all keys that causality leaves, where windows
    differ between heads, or where there are both sinks and offsets).

    The last query stands at the last of ``tokens`` positions: with a cache, ``key`` and ``value``
    hold all of it, and ``query`` its last tokens.

    Args:
        query: ``[batch, heads, query_tokens, head_dim]``, float32, float16 or bfloat16;
            head_dim in 32..256, a multiple of 8, contiguous; at most ``tokens`` query tokens.
        key: ``[batch, kv_heads, tokens, head_dim]``, dtype of ``query``, any strides but the last;
            ``heads`` is a multiple of ``kv_heads``; at most 2^24 tokens.
        value: As ``key``.
        window: Keys that a query sees up to and with its own: those less than ``window`` away, on
            both sides if not causal; at least 1. None: no limit.
        windows: One window per head instead, ``[heads]``, int32.
        sinks: First tokens of each sequence that its queries see however far.
        offsets: Where each row is cut into sequences that do not see each other,
            ``[batch, sequences + 1]``, int32, ascending (equal ones make empty sequences), in
            0..tokens. What lies before the first or after the last is padding: no key there is
            seen, and a query there gives zeros. None: one sequence of all tokens.
        scale: Factor on the scores; None: ``1 / sqrt(head_dim)``.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0: off.
        causal: A query sees no later key.

    Returns:
        ``(out, lse)``. ``out``: ``[batch, heads, query_tokens, head_dim]``, dtype of ``query``, in
        memory ``[batch, query_tokens, heads, head_dim]``. ``lse``: natural logarithm of the sum of
        the exponentiated scores, ``[batch, heads, query_tokens]``, float32. Sums are taken in
        float32. A query that sees no key gives zeros and ``-inf``. Keys that no query sees have no
        effect, whatever they hold.

    Raises:
        ValueError: A shape, device, memory layout or option is wrong.
        TypeError: An argument is no tensor, or its dtype is wrong.
        IndexError: A window or offset is out of range, or offsets descend. On CUDA, the results
            that depend on it are NaN instead.
        NotImplementedError: The device has no kernel.
    """
    seen = reference_mask(
        query, key, window if windows is None else windows, sinks, offsets, causal
    )
    out, lse = decode_attention.reference(
        query, key, value, mask=seen, scale=scale, softcap=softcap, causal=False
    )
    out = out.to(query.dtype)
    return out, lse
