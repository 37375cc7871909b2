"""The lab model's architecture and a lean training forward pass over a ``LlamaForCausalLM``."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.lab.start import initialise


def build_config(architecture: dict[str, Any]) -> LlamaConfig:
    """Return the configuration for the ``architecture`` section of a recipe."""
    return LlamaConfig(
        vocab_size=architecture["vocab_size"],
        hidden_size=architecture["hidden_size"],
        intermediate_size=architecture["intermediate_size"],
        num_hidden_layers=architecture["layers"],
        num_attention_heads=architecture["heads"],
        num_key_value_heads=architecture["kv_heads"],
        head_dim=architecture["head_dim"],
        max_position_embeddings=architecture["max_positions"],
        rope_parameters={"rope_type": "default", "rope_theta": architecture["rope_theta"]},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def build_model(architecture: dict[str, Any]) -> LlamaForCausalLM:
    """Return a freshly initialised model in float32."""
    model = LlamaForCausalLM(build_config(architecture)).float()
    initialise(model, architecture["induction_layers"])
    return model


def rope_tables(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``[B, 1, T, head_dim]`` for position ids ``[B, T]``."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() * theta**-steps
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def layer_weights(layer: nn.Module) -> tuple[Tensor, ...]:
    """Return the weights of one decoder layer in the order ``layer_forward`` takes them."""
    attn, mlp = layer.self_attn, layer.mlp
    return (
        layer.input_layernorm.weight,
        attn.q_proj.weight,
        attn.k_proj.weight,
        attn.v_proj.weight,
        attn.o_proj.weight,
        layer.post_attention_layernorm.weight,
        mlp.gate_proj.weight,
        mlp.up_proj.weight,
        mlp.down_proj.weight,
    )


def layer_forward(
    weights: tuple[Tensor, ...], x: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """Return the residual update of one decoder layer (attention and MLP) for ``x``.

    A plain function of tensors, so that one compiled graph serves every layer.
    """
    norm1, wq, wk, wv, wo, norm2, gate, up, down = weights
    batch, length, hidden = x.shape
    dim = cos.shape[-1]
    n = F.rms_norm(x, (hidden,), norm1, eps)
    q = F.linear(n, wq).view(batch, length, -1, dim).transpose(1, 2)
    k = F.linear(n, wk).view(batch, length, -1, dim).transpose(1, 2)
    v = F.linear(n, wv).view(batch, length, -1, dim).transpose(1, 2)
    groups = q.shape[1] // k.shape[1]
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    update = F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), wo)
    n = F.rms_norm(x + update, (hidden,), norm2, eps)
    return update + F.linear(F.silu(F.linear(n, gate)) * F.linear(n, up), down)


def forward_hidden(
    model: LlamaForCausalLM,
    ids: Tensor,
    positions: Tensor,
    keep: Tensor | None = None,
    layer_fn: Any = layer_forward,
) -> list[Tensor]:
    """Return the residual stream after every layer.

    ``keep`` is ``[layers, B]`` with 0 where a layer is dropped for a sample (LayerSkip).
    """
    x = model.model.embed_tokens(ids)
    config = model.config
    theta = config.rope_parameters["rope_theta"]
    cos, sin = rope_tables(positions, config.head_dim, theta)
    states: list[Tensor] = []
    for index, layer in enumerate(model.model.layers):
        update = layer_fn(layer_weights(layer), x, cos, sin, config.rms_norm_eps)
        x = x + update if keep is None else x + update * keep[index][:, None, None]
        states.append(x)
    return states


def head_loss(model: LlamaForCausalLM, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted cross-entropy of ``[N, hidden]`` states through the shared head."""
    norm = model.model.norm
    n = F.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)
    losses = F.cross_entropy(F.linear(n, model.lm_head.weight), targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


def layer_dropout(layers: int, p_max: float, progress: float) -> list[float]:
    """Return LayerSkip's dropout rates: S(t) * D(l) * p_max, both curves exponential."""
    time = math.exp(progress * math.log(2.0)) - 1.0
    return [
        time * (math.exp(i * math.log(2.0) / (layers - 1)) - 1.0) * p_max for i in range(layers)
    ]


def exit_weights(layers: int, scale: float, active: list[int]) -> dict[int, float]:
    """Return LayerSkip's early-exit loss weights, normalised over the active exits."""
    raw = {i: scale * i * (i + 1) / 2 for i in range(layers - 1)}
    raw[layers - 1] = layers - 1 + scale * (layers - 2) * (layers - 1) / 2
    total = sum(raw[i] for i in active)
    return {i: raw[i] / total for i in active}
