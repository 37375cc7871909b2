"""tree_attention: the nodes of a token tree attend to a KV cache that ends with their own keys."""

import math
from typing import Any

import torch
from torch import Tensor

from adaptive.ops._op import op
from adaptive.ops.decode_attention import TAKEN_SHARE, decode_attention
from adaptive.ops.decode_attention import make_inputs as make_decode_inputs


def make_inputs(  # noqa: PLR0913
    batch: int,
    heads: int,
    kv_heads: int,
    capacity: int,
    head_dim: int,
    nodes: int,
    masked: bool = False,
    *,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Random arguments: every parent as likely as any other; ``masked`` draws a mask."""
    sizes = (batch, heads, kv_heads, capacity, head_dim, nodes)
    query, key, value, *_ = make_decode_inputs(*sizes, dtype=dtype, device=device, seed=seed)
    rng = torch.Generator().manual_seed(seed + 1)
    chance = torch.rand(batch, nodes, generator=rng)
    parents = (torch.arange(1, nodes + 1) * chance).floor().long() - 1
    mask = torch.rand(batch, capacity, generator=rng) < TAKEN_SHARE if masked else None
    return query, key, value, parents.to(device), mask if mask is None else mask.to(device)


def outputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parents: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Uninitialised ``out`` and ``lse`` for these arguments."""
    if query.dim() != 4:  # noqa: PLR2004
        raise ValueError(
            f"adaptive::tree_attention: query must have 4 dimensions, got shape {list(query.shape)}"
        )
    made: tuple[Tensor, Tensor] = decode_attention.outputs(query, key, value)
    return made


@op(
    outputs=outputs,
    inputs=make_inputs,
    edges=[
        # an empty batch, no node, nothing but nodes, one node
        {"batch": 0, "heads": 4, "kv_heads": 2, "capacity": 8, "head_dim": 64, "nodes": 3},
        {"batch": 2, "heads": 4, "kv_heads": 2, "capacity": 8, "head_dim": 64, "nodes": 0},
        {"batch": 2, "heads": 4, "kv_heads": 2, "capacity": 7, "head_dim": 64, "nodes": 7},
        {"batch": 1, "heads": 1, "kv_heads": 1, "capacity": 1, "head_dim": 128, "nodes": 1},
        # nodes that end a block of 64 keys, begin one, and lie on both sides of its end
        {"batch": 2, "heads": 4, "kv_heads": 4, "capacity": 64, "head_dim": 96, "nodes": 16},
        {"batch": 2, "heads": 6, "kv_heads": 2, "capacity": 133, "head_dim": 40, "nodes": 5},
        {"batch": 2, "heads": 8, "kv_heads": 2, "capacity": 200, "head_dim": 128, "nodes": 16},
        {"batch": 1, "heads": 7, "kv_heads": 1, "capacity": 300, "head_dim": 256, "nodes": 13},
        {
            "batch": 3,
            "heads": 6,
            "kv_heads": 2,
            "capacity": 130,
            "head_dim": 72,
            "nodes": 9,
            "masked": True,
        },
    ],
    models=[
        # Llama-3-8B and Llama-3.2-1B, one sequence
        {"batch": 1, "heads": 32, "kv_heads": 8, "capacity": tokens, "head_dim": dim, "nodes": 16}
        for dim in (128, 64)
        for tokens in (4096, 16384)
    ],
)
def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parents: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attend from the nodes of a token tree to the context and to their ancestors.

    Verifies many drafted continuations in one pass (Miao et al. 2023, arXiv:2305.09781): each node
    gets what `decode_attention` would give it if the context and its own path were the cache. A
    chain (``parents`` -1, 0, 1, ...) gives the bits of ``decode_attention(causal=True)``. The tree
    is read from ``parents``; no mask of nodes by tokens exists anywhere.

    Args:
        query: ``[batch, heads, nodes, head_dim]``, float32, float16 or bfloat16; at most 16 nodes;
            head_dim in 32..256, a multiple of 8, contiguous.
        key: ``[batch, kv_heads, tokens, head_dim]``, dtype of ``query``, any strides but the last;
            ``heads`` is a multiple of ``kv_heads``. The last ``nodes`` keys are the nodes' own, in
            their order; all before them are the context.
        value: As ``key``.
        parents: What each node follows, ``[batch, nodes]``, int64, contiguous: an earlier node, or
            -1 for the context.
        mask: ``[batch, tokens]``, bool, last dimension contiguous. False: no node sees this key, be
            it padding of the context or a node's. None: every key counts.
        scale: Factor on the scores; None: ``1 / sqrt(head_dim)``.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0: off.

    Returns:
        ``(out, lse)``, as from ``decode_attention``: ``[batch, heads, nodes, head_dim]``, in memory
        ``[batch, nodes, heads, head_dim]``, and ``[batch, heads, nodes]``, both float32.

    Raises:
        ValueError: A shape, device, memory layout or option is wrong.
        TypeError: An argument is no tensor, or its dtype is wrong.
        IndexError: A parent is out of range. On CUDA, it counts as -1 instead.
        NotImplementedError: An argument requires a gradient; the device has no kernel.
    """
    batch, heads, nodes, head_dim = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    group = heads // max(kv_heads, 1)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale

    seen = torch.ones(batch, nodes, tokens, dtype=torch.bool, device=query.device)
    seen[..., tokens - nodes :] = ancestors(parents)
    if mask is not None:
        seen = seen & mask[:, None]

    # What no node sees may hold anything, NaN too: blank it before it meets arithmetic.
    unseen = ~seen.any(1)[:, None, :, None]
    keys = key.float().masked_fill(unseen, 0).repeat_interleave(group, dim=1)
    values = value.float().masked_fill(unseen, 0).repeat_interleave(group, dim=1)
    score = (query.float() * scale) @ keys.transpose(2, 3)
    if softcap > 0:
        score = softcap * torch.tanh(score / softcap)
    score = score.masked_fill(~seen[:, None], -math.inf)
    lse = torch.logsumexp(score, dim=-1)
    weight = torch.exp(score - lse.masked_fill(lse == -math.inf, 0)[..., None])
    out = weight @ values
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def ancestors(parents: Tensor) -> Tensor:
    """Whether node j is an ancestor of node i or i itself, ``[batch, i, j]``, bool."""
    batch, nodes = parents.shape
    found = torch.eye(nodes, dtype=torch.bool, device=parents.device).repeat(batch, 1, 1)
    row = torch.arange(batch, device=parents.device)
    for node in range(nodes):
        parent = parents[:, node]
        found[:, node] |= found[row, parent.clamp(min=0)] & (parent >= 0)[:, None]
    return found
