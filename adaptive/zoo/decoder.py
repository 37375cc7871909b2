"""The decoder that the models of the zoo are made of: RMSNorm, rotary positions, SwiGLU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.layers.hf_linear import MIN_WEIGHT_BYTES, most_rows
from adaptive.ops import decode_attention, local_attention, skinny_linear
from adaptive.ops.decode_attention import MAX_QUERY_TOKENS
from adaptive.ops.skinny_linear import supports
from adaptive.zoo.config import DecoderSizes

INIT_STD = 0.02


class Store(Protocol):
    """Where a layer's keys and values go; a `KVStore`, for example."""

    @property
    def length(self) -> int:
        """Tokens held."""

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Hold more, and return all."""


class Linear(nn.Linear):
    """A linear layer without bias that reads a large weight at full speed for a few rows."""

    def __init__(self, in_features: int, out_features: int) -> None:
        """Draw the weight later: see `initialise`."""
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T``, by the rule that `patch` applies to linear layers."""
        return multiply(input, self.weight)


class Layer(nn.Module):
    """One decoder layer: attention, then SwiGLU (Shazeer 2020, arXiv:2002.05202), both added."""

    def __init__(self, sizes: DecoderSizes) -> None:
        """Make the weights."""
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = sizes.heads, sizes.groups, sizes.head_width
        width, hidden = sizes.width, sizes.inner_width
        self.attention_norm = nn.RMSNorm(width, sizes.norm_eps)
        self.qkv = Linear(width, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.out = Linear(self.heads * self.head_dim, width)
        self.mlp_norm = nn.RMSNorm(width, sizes.norm_eps)
        self.gate_up = Linear(width, 2 * hidden)
        self.down = Linear(hidden, width)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        store: Store | None = None,
        first: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """Return the residual stream after this layer; arguments as `Decoder.forward`."""
        query, key, value = self.project(x, rotation)
        return self.finish(x, attend(query, key, value, store, first, seen))

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens, ``[batch, heads, tokens, head_dim]`` each."""
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        turned, value = heads.split([self.heads + self.kv_heads, self.kv_heads], 1)
        query, key = rotate(turned, rotation).split([self.heads, self.kv_heads], 1)
        return query, key, value

    def project_query(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Queries alone, for tokens that attend to keys which are there already."""
        weight = self.qkv.weight[: self.heads * self.head_dim]
        heads = multiply(self.attention_norm(x), weight).unflatten(-1, (-1, self.head_dim))
        return rotate(heads.transpose(1, 2), rotation)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Add what attention mixed, ``[batch, heads, tokens, head_dim]``, and SwiGLU."""
        x = x + self.out(mixed.transpose(1, 2).flatten(2).to(x.dtype))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        x = x + self.down(F.silu(gate) * up)
        return x


class Decoder(nn.Module):
    """A stack of layers over ``[batch, tokens, width]``, each token seeing those up to itself."""

    def __init__(self, sizes: DecoderSizes, layers: int) -> None:
        """Make the layers and the last norm."""
        super().__init__()
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(layers))
        self.norm = nn.RMSNorm(sizes.width, sizes.norm_eps)
        self.head_dim, self.theta = sizes.head_width, sizes.rope_theta

    def forward(
        self,
        x: Tensor,
        stores: Sequence[Store] | None = None,
        first: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Run tokens through all layers.

        Args:
            x: ``[batch, tokens, width]``.
            stores: One for each layer: the tokens come behind those that they hold, and are held,
                too. None: there are none before, and nothing is kept.
            first: ``[batch]``, int32: where each row begins, counted from the first token held;
                what lies before is padding that no token sees. None: all begin at 0.
            last_only: Return the last token alone.

        Returns:
            ``[batch, tokens or 1, width]``, normed.
        """
        held = stores[0].length if stores else 0
        places = torch.arange(held, held + x.shape[1], device=x.device)
        seen = None
        if first is not None:
            if x.shape[1] <= MAX_QUERY_TOKENS:
                keys = torch.arange(held + x.shape[1], device=x.device)
                seen = (keys >= first[:, None])[:, None, None]
            places = (places - first[:, None]).clamp(min=0)
        rotation = rotary(places, self.head_dim, self.theta, x.dtype)
        for number, layer in enumerate(self.layers):
            x = layer(x, rotation, stores[number] if stores else None, first, seen)
        normed: Tensor = self.norm(x[:, -1:] if last_only else x)
        return normed


def multiply(input: Tensor, weight: Tensor) -> Tensor:
    """Return ``input @ weight.T``, by the rule that `patch` applies to linear layers."""
    columns = weight.shape[1]
    rows = input.numel() // columns
    if (
        torch.is_grad_enabled()
        or not 1 <= rows <= most_rows(weight.dtype)
        or weight.nbytes < MIN_WEIGHT_BYTES
        or not weight.is_cpu
        or not supports(columns, weight.dtype)
        or torch.is_autocast_enabled("cpu")
    ):
        return F.linear(input, weight)
    out = skinny_linear(input.reshape(rows, columns), weight)
    return out.view(*input.shape[:-1], len(weight))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    store: Store | None,
    first: Tensor | None,
    seen: Tensor | None,
) -> Tensor:
    """Causal attention of new tokens to all, ``[batch, heads, tokens, head_dim]``.

    A store decides the dtype of what it holds, and the query follows it.
    """
    grouped = query.shape[1] != key.shape[1]
    if store is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    keys, values = store.append(key, value)
    query = query.to(keys.dtype)
    if query.shape[2] <= MAX_QUERY_TOKENS:
        return decode_attention(query, keys, values, mask=seen)[0]
    offsets = None
    if first is not None:
        offsets = torch.stack([first, torch.full_like(first, keys.shape[2])], 1)
    return local_attention(query, keys, values, offsets=offsets)[0]


def rotary(
    places: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (Su et al. 2021, arXiv:2104.09864).

    Args:
        places: ``[tokens]`` or ``[batch, tokens]``.
        head_dim: Elements to rotate.
        theta: The base.
        dtype: Of the result.

    Returns:
        Two of ``[1 or batch, 1, tokens, head_dim]``; the sines of the first half are negated, as
        `rotate` uses them.
    """
    powers = torch.arange(0, head_dim, 2, device=places.device, dtype=torch.float32) / head_dim
    angles = places.view(-1, 1, places.shape[-1], 1) * theta**-powers
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs of elements half a head apart, ``[batch, heads, tokens, head_dim]``."""
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def initialise(model: nn.Module, layers: int) -> None:
    """Draw all weights: normal, smaller where ``layers`` layers add up (Radford et al. 2019)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            adds = name.endswith((".out", ".down"))
            nn.init.normal_(module.weight, std=INIT_STD * ((2 * layers) ** -0.5 if adds else 1.0))
