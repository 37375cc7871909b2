"""How the lab model starts: zero outputs, with the induction circuit planted in a few heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Value every embedding gets in its first dimension: a direction that is always there.
CONSTANT = 2.5
#: Spread of the input embeddings: large, so that a few updates of a layer cannot drown them.
EMBEDDING_STD = 0.5
#: Spread of the output head, which starts as the embeddings scaled down.
HEAD_STD = 0.05
#: Rotary pairs that a previous-token head uses (the fast ones).
FAST_PAIRS = 6
#: First rotary pair that hardly turns over the context, so that matching ignores distance.
SLOW_FROM = 9


def _orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(columns, rows)).Q.T


@torch.no_grad()
def initialise(model: nn.Module, induction_layers: list[int]) -> None:
    """Set all weights: a neutral start, then the planted circuit.

    Neutral: matrices that keep variance, and zero output projections, so the
    residual stream starts as the embeddings alone. Planted: what small models need longest to
    find. Layer 0 gets heads that look one and two tokens back and write what they see into
    directions of their own; the layers in ``induction_layers`` get heads whose queries (this
    token) match these directions in their keys (the token before) and which pass on what they
    attend to. It is a rough start that matches a few dozen tokens; everything is trained.
    """
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
        else:
            std = EMBEDDING_STD if "embed" in name else weight.shape[1] ** -0.5
            nn.init.normal_(weight, std=std)
    model.lm_head.weight.copy_(model.model.embed_tokens.weight * (HEAD_STD / EMBEDDING_STD))
    if induction_layers:
        model.model.embed_tokens.weight[:, 0] = CONSTANT
        reads, *writes = _previous_tokens(model)
        for index in induction_layers:
            _induction(model, index, reads, writes)


def _previous_tokens(model: nn.Module, strength: float = 8.0, scale: float = 0.75) -> list[Tensor]:
    """Make the first group of layer 0 look back by rotary phase; return its directions."""
    config = model.config
    dim, half = config.head_dim, config.head_dim // 2
    groups = config.num_attention_heads // config.num_key_value_heads
    attn = model.model.layers[0].self_attn
    after_norm = CONSTANT / model.model.embed_tokens.weight.square().mean().sqrt()
    amplitude = strength / after_norm
    theta = config.rope_parameters["rope_theta"]
    frequencies = theta ** (-torch.arange(FAST_PAIRS) * 2.0 / dim)
    basis = torch.zeros((1 + groups) * dim, config.hidden_size)
    basis[:, 1:] = _orthonormal((1 + groups) * dim, config.hidden_size - 1)
    directions = list(basis.split(dim))
    attn.k_proj.weight[:dim] = 0.0
    attn.k_proj.weight[:FAST_PAIRS, 0] = amplitude
    attn.v_proj.weight[:dim] = directions[0]
    for head in range(groups):
        rows = attn.q_proj.weight[head * dim : (head + 1) * dim]
        rows.zero_()
        phase = frequencies * (head + 1)
        rows[:FAST_PAIRS, 0] = amplitude * phase.cos()
        rows[half : half + FAST_PAIRS, 0] = -amplitude * phase.sin()
        attn.o_proj.weight[:, head * dim : (head + 1) * dim] = scale * directions[1 + head].T
    return directions


def _induction(
    model: Any, index: int, reads: Tensor, writes: list[Tensor], sharp: float = 2.3,
    scale: float = 1.25,
) -> None:  # fmt: skip
    """Make the first group of one layer match the token before its keys, and pass it on."""
    config = model.config
    dim, half = config.head_dim, config.head_dim // 2
    attn = model.model.layers[index].self_attn
    slow = torch.cat([torch.arange(SLOW_FROM, half), torch.arange(half + SLOW_FROM, dim)])
    one, two = sharp * _orthonormal(len(slow), dim), sharp * _orthonormal(len(slow), dim)
    value = torch.zeros(dim, config.hidden_size)
    value[:, 1:] = _orthonormal(dim, config.hidden_size - 1)
    attn.k_proj.weight[slow] = one @ writes[0] + two @ writes[1]
    attn.q_proj.weight[slow] = one @ reads
    attn.q_proj.weight[dim + slow] = one @ reads + two @ writes[0]
    attn.v_proj.weight[:dim] = value
    for head in range(config.num_attention_heads // config.num_key_value_heads):
        attn.o_proj.weight[:, head * dim : (head + 1) * dim] = scale * value.T
