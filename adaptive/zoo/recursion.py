"""One block run again and again over whole sequences, each time for the tokens that are chosen."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.ops import gather_tokens
from adaptive.zoo.decoder import Layer, Store, attend
from adaptive.zoo.recursion_choice import Choice, Routing, take

Rotation = tuple[Tensor, Tensor]


class Held(Protocol):
    """Where the keys and values of a prompt go."""

    def store(self, turn: int, number: int) -> Store:
        """The store of one layer of the block in recursion ``turn``."""

    def count(self, turn: int, counts: Tensor) -> None:
        """Note how many tokens of each row ran recursion ``turn``."""


def recur(
    layers: nn.ModuleList,
    choice: Choice,
    rotation: Rotation,
    valid: Tensor | None = None,
    held: Held | None = None,
) -> tuple[Tensor, Routing]:
    """Run the block as often as each token is chosen; others are neither computed nor seen.

    Args:
        layers: The block.
        choice: Who chooses, made of the hidden states.
        rotation: Of all positions; chosen tokens keep that of their own.
        valid: ``[batch, tokens]``, True where there is a token, at the beginning of each row.
        held: Takes keys and values.

    Returns:
        Hidden states ``[batch, tokens, width]``, and what was chosen.
    """
    x, config = choice.start, choice.config
    positions = torch.arange(x.shape[1], device=x.device)
    routing = Routing(torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device))
    tokens = None if valid is None else torch.where(valid, positions, -1).int()
    slots: Tensor | None = None  # where the tokens stand among those of the first turn
    shared: list[tuple[Tensor, Tensor]] = []  # keys and values of the layers in the first turn
    for turn in range(config.recursions):
        chosen = choice.choose(turn, x, tokens, routing)
        tokens = chosen.tokens
        if turn > 0 and chosen.places is not None:
            slots = chosen.places if slots is None else take(slots, chosen.places)
        if tokens is not None and tokens.shape[1] == 0:
            break
        inside, turned = x, rotation
        if tokens is not None:
            inside = gather_tokens(x, tokens) if chosen.inside is None else chosen.inside
            at = tokens.long().clamp(min=0)
            turned = (rotation[0][0, 0, at][:, None], rotation[1][0, 0, at][:, None])
        if config.kv == "shared" and turn > 0:
            inside = _reuse(layers, inside, turned, shared, slots)
        else:
            kept = shared if config.kv == "shared" else []
            inside = _attend(layers, inside, turned, kept, turn, held)
            if held is not None:
                held.count(turn, count(x, tokens))
        note(routing, tokens)
        x = choice.merge(turn, x, inside, chosen)
    return x, routing


def _attend(
    layers: nn.ModuleList,
    x: Tensor,
    rotation: Rotation,
    shared: list[tuple[Tensor, Tensor]],
    turn: int,
    held: Held | None,
) -> Tensor:
    """The block, each token attending to those that run it in the same turn."""
    for number, layer in enumerate(layers):
        assert isinstance(layer, Layer)
        query, key, value = layer.project(x, rotation)
        shared.append((key, value))
        store = None if held is None else held.store(turn, number)
        x = layer.finish(x, attend(query, key, value, store, None, None))
    return x


def _reuse(
    layers: nn.ModuleList,
    x: Tensor,
    rotation: Rotation,
    shared: list[tuple[Tensor, Tensor]],
    slots: Tensor | None,
) -> Tensor:
    """The block on keys and values of the first turn, in which the tokens stand at ``slots``."""
    seen = None
    if slots is not None:
        keys = torch.arange(shared[0][0].shape[2], device=x.device)
        seen = (keys <= slots.clamp(min=0)[..., None])[:, None]
    for layer, (key, value) in zip(layers, shared, strict=True):
        assert isinstance(layer, Layer)
        query = layer.project_query(x, rotation)
        grouped = query.shape[1] != key.shape[1]
        mixed = F.scaled_dot_product_attention(
            query, key, value, seen, is_causal=seen is None, enable_gqa=grouped
        )
        x = layer.finish(x, mixed)
    return x


def note(routing: Routing, tokens: Tensor | None) -> None:
    """Note that these tokens ran the block once more."""
    if tokens is None:
        routing.depths += 1
        return
    rows, place = (tokens >= 0).nonzero(as_tuple=True)
    routing.depths[rows, tokens[rows, place].long()] += 1


def count(x: Tensor, tokens: Tensor | None) -> Tensor:
    """How many tokens there are in each row; None: all of ``x``."""
    if tokens is None:
        return torch.full((len(x),), x.shape[1], device=x.device)
    return (tokens >= 0).sum(1)
