"""What the ops of sparse KV selection are measured against: the best PyTorch compositions."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adaptive.layers.kv_store import KVStore
from adaptive.ops import decode_attention, gather_attention, score_tokens, scored_attention
from bench.stock import Suite, fold

LONG = [
    {"batch": 1, "heads": 32, "kv_heads": 8, "capacity": tokens, "head_dim": 128}
    for tokens in (32768, 131072)
]
LONG_CUDA = [
    {"batch": batch, "heads": 32, "kv_heads": 8, "capacity": tokens, "head_dim": 128}
    for batch, tokens in ((1, 131072), (1, 32768), (16, 131072), (16, 32768))
]


def in_store(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Any, ...]:
    """Hold keys and values as the KV cache of a patched model does, in huge pages where it pays."""
    if not key.is_cpu:
        return query, key, value, *others
    keys, values = KVStore().append(key, value)
    return query, keys, values, *others


def gather_index_select(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, *_: object
) -> Tensor:
    """Copy the chosen keys and values out, head by head, then two matmuls and a softmax."""
    rows = indices.flatten(0, 1)
    keys, values = (
        torch.stack([head.index_select(0, row) for head, row in zip(t, rows, strict=True)])
        for t in (key.flatten(0, 1), value.flatten(0, 1))
    )
    folded = fold(query, key).flatten(0, 1)
    scores = torch.matmul(folded * query.shape[-1] ** -0.5, keys.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores, -1), values).view(query.shape)


def gather_sdpa(query: Tensor, key: Tensor, value: Tensor, indices: Tensor, *_: object) -> Tensor:
    """torch.gather of keys and values, then one scaled_dot_product_attention."""
    where = indices.long()[..., None].expand(-1, -1, -1, key.shape[3])
    keys, values = key.gather(2, where), value.gather(2, where)
    out = functional.scaled_dot_product_attention(fold(query, key), keys, values)
    return out.view(query.shape)


def gather_truth(query: Tensor, key: Tensor, value: Tensor, indices: Tensor, *_: object) -> Tensor:
    """Attention to the chosen keys in float64."""
    where = indices.long()[..., None].expand(-1, -1, -1, key.shape[3])
    keys, values = key.gather(2, where).double(), value.gather(2, where).double()
    scores = fold(query, key).double() @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (torch.softmax(scores, -1) @ values).view(query.shape)


def every_key(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    """This project's own attention to every key: what a layer that reuses a choice saves."""
    return decode_attention(query, key, value)[0]


def chosen_bytes(query: Tensor, key: Tensor, value: Tensor, indices: Tensor, *_: object) -> int:
    """Bytes of the query, of the chosen keys and values, and of the lists."""
    row = key.shape[3] * key.element_size() + value.shape[3] * value.element_size()
    return query.nbytes + indices.numel() * row + indices.nbytes


def full_lists(*arguments: Any) -> tuple[Any, ...]:
    """As `in_store`, with every list as long as it can be."""
    placed = list(in_store(*arguments))
    placed[4] = torch.full_like(placed[4], placed[3].shape[2])
    return tuple(placed)


def weights(query: Tensor, key: Tensor, lengths: object, *_: object) -> Tensor:
    """Fold the query group, one matmul, softmax, and a sum over the group."""
    scores = torch.matmul(fold(query, key) * query.shape[-1] ** -0.5, key.transpose(-1, -2))
    return torch.softmax(scores, -1).sum(2)


def weights_truth(query: Tensor, key: Tensor, *_: object) -> Tensor:
    """Weights of the keys in float64, summed over the query group."""
    scores = fold(query, key).double() @ key.double().transpose(-1, -2) * query.shape[-1] ** -0.5
    return torch.softmax(scores, -1).sum(2)


def scored(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    """Fold the query group, two matmuls; the softmax between them is summed over the group."""
    score = torch.matmul(fold(query, key) * query.shape[-1] ** -0.5, key.transpose(-1, -2))
    weight = torch.softmax(score, -1)
    out = torch.matmul(weight, value)
    weight.sum(2)
    return out.view(query.shape)


def scored_truth(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    """Attention in float64."""
    folded = fold(query, key).double()
    score = folded @ key.double().transpose(-1, -2) * query.shape[-1] ** -0.5
    return (torch.softmax(score, -1) @ value.double()).view(query.shape)


SUITES = {
    gather_attention.name: Suite(
        forms={"index_select + matmuls": gather_index_select, "gather + SDPA": gather_sdpa},
        truth=gather_truth,
        sweep=[{**sizes, "chosen": 2048} for sizes in LONG],
        cuda_sweep=[{**sizes, "chosen": 2048} for sizes in LONG_CUDA],
        beside={"decode_attention of every key": every_key},
        moved_bytes=chosen_bytes,
        place=full_lists,
    ),
    score_tokens.name: Suite(
        forms={"matmul + softmax + sum": weights},
        truth=weights_truth,
        sweep=LONG,
        cuda_sweep=LONG_CUDA,
        place=lambda query, key, *rest: (*in_store(query, key, key)[:2], *rest),
    ),
    scored_attention.name: Suite(
        forms={"folded matmuls + sum": scored},
        truth=scored_truth,
        sweep=LONG,
        cuda_sweep=LONG_CUDA,
        beside={"decode_attention alone": every_key},
        place=in_store,
    ),
}
"""By name of the op."""
