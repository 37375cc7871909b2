"""Recursive transformers: one block of layers, run as often as each token needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.zoo.config import RecursiveTransformerConfig
from adaptive.zoo.decoder import Layer, Linear, Store, initialise, rotary
from adaptive.zoo.depth_run import DepthRun, PromptStores, Slots
from adaptive.zoo.model import Report, ZooModel
from adaptive.zoo.recursion import Rotation, recur
from adaptive.zoo.recursion_choice import CHOICES, Routing
from adaptive.zoo.run import Run


@dataclass(frozen=True)
class RecursiveReport(Report):
    """What a recursive model is, and what its last generation did.

    Attributes:
        depths: How many tokens ran the block 0, 1, 2 ... times, prompts not counted.
        passes: How often the block was run for decoding.
        occupancy: Rows of those passes over the rows that there was room for.
    """

    depths: tuple[int, ...] = ()
    passes: int = 0
    occupancy: float = 0.0


SELECT = ("capacity", "threshold")


class RecursiveTransformer(ZooModel):
    """Mixture-of-Recursions: Bae et al. 2025, arXiv:2507.10524.

    A few layers of their own, then one shared block that is run up to ``recursions`` times, then a
    few layers of their own. A router decides how often each token runs the block (see
    `RecursiveTransformerConfig`); with ``router=None`` all run it equally often, as in Bae et al.
    2024, "Relaxed Recursive Transformers", arXiv:2410.20672, without its adapters. The tokens of a
    recursion are gathered, and nothing is computed for the others.

    Choosing the best of a sequence looks at all of it, so it is for training. Where text is to be
    continued, expert choice takes the tokens whose score reaches a threshold, which the auxiliary
    loss teaches to choose likewise.
    """

    config_type = RecursiveTransformerConfig
    config: RecursiveTransformerConfig

    def __init__(self, config: RecursiveTransformerConfig) -> None:
        """Draw the weights."""
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.first_layers = _stack(config, config.first_layers)
        self.block_layers = _stack(config, config.block_layers)
        self.last_layers = _stack(config, config.last_layers)
        self.router = None
        if config.router is not None:
            self.router = Linear(config.width, config.recursions)
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.head = Linear(config.width, config.vocab_size)
        initialise(self, config.first_layers + config.last_layers + self.most_block_layers)

    @property
    def most_block_layers(self) -> int:
        """Layers of the block that a token passes at most, counted as often as it does."""
        return self.config.block_layers * self.config.recursions

    @property
    def kv_layers(self) -> int:
        """The most layers in which a token has keys and values; `report` counts the real ones."""
        turns = 1 if self.config.kv == "shared" else self.config.recursions
        unique = self.config.first_layers + self.config.last_layers
        return unique + self.config.block_layers * turns

    def forward(self, ids: Tensor, *, select: str | None = None) -> Tensor:
        """Return the logits of each next token.

        Args:
            ids: ``[batch, tokens]``, int32 or int64.
            select: How expert choice takes tokens: ``"capacity"``, the best of each sequence, or
                ``"threshold"``, as ``generate`` does. None: by capacity in training mode, by
                threshold otherwise. Without expert choice it makes no difference.

        Returns:
            ``[batch, tokens, vocab_size]``.

        Raises:
            ValueError, TypeError, IndexError: The ids' shape, dtype or range is wrong.
        """
        self._check_batch(ids)
        return self._told(self._whole(ids, select)[0])

    def report(self) -> RecursiveReport:
        """Return the sizes, and what the last ``generate`` or `generate_many` did."""
        parameters = sum(p.numel() for p in self.parameters())
        return RecursiveReport(parameters, self.kv_bytes_per_token, **self._last)

    def depths(self, ids: Tensor, *, select: str | None = None) -> Tensor:
        """Return how often each token runs the block, ``[batch, tokens]``; as `forward`."""
        self._check_batch(ids)
        with torch.no_grad():
            return self._whole(ids, select)[1].depths

    def losses(
        self, ids: Tensor, labels: Tensor | None = None, *, select: str | None = None
    ) -> dict[str, Tensor]:
        """Cross-entropy in nats, the router's auxiliary loss and its z-loss, none weighted.

        Args:
            ids: ``[batch, tokens]``, at least 2 tokens.
            labels: As for `loss`.
            select: As for `forward`.
        """
        self._check_batch(ids)
        hidden, routing = self._whole(ids, select)
        aux, z = routing.losses(self.config.router)
        told = self._cross_entropy(self._told(hidden), ids, labels)
        return {"cross_entropy": told, "aux": aux, "z": z}

    def loss(self, ids: Tensor, labels: Tensor | None = None, **options: Any) -> Tensor:
        """Mean cross-entropy in nats of each next token; in training mode with the router's losses.

        Args:
            ids: ``[batch, tokens]``, at least 2 tokens.
            labels: As ``ids``: what each token should have been; -100 does not count. None:
                ``ids``.
            options: For `losses`.

        Raises:
            ValueError: A shape is wrong.
        """
        found = self.losses(ids, labels, **options)
        if not self.training:
            return found["cross_entropy"]
        config = self.config
        return found["cross_entropy"] + config.aux_loss * found["aux"] + config.z_loss * found["z"]

    def _whole(
        self,
        ids: Tensor,
        select: str | None,
        valid: Tensor | None = None,
        held: PromptStores | None = None,
    ) -> tuple[Tensor, Routing]:
        select = select or ("capacity" if self.training else "threshold")
        if select not in SELECT:
            raise ValueError(f"adaptive::zoo: select must be one of {SELECT}, got {select!r}")
        x = self.embedding(ids)
        rotation = self._rotation(torch.arange(ids.shape[1], device=ids.device), x.dtype)
        x = _run(self.first_layers, x, rotation, None if held is None else held.first)
        config = self.config
        choice = CHOICES[config.router](config, self.router, select, x)
        x, routing = recur(self.block_layers, choice, rotation, valid, held)
        return _run(self.last_layers, x, rotation, None if held is None else held.last), routing

    def _rotation(self, places: Tensor, dtype: torch.dtype) -> Rotation:
        return rotary(places, self.config.head_width, self.config.rope_theta, dtype)

    def _told(self, hidden: Tensor) -> Tensor:
        return self.head(self.norm(hidden))  # type: ignore[no-any-return]

    def _start(self, prompts: Sequence[Tensor], new_tokens: int, kv_dtype: torch.dtype) -> Run:
        longest = max(len(prompt) for prompt in prompts)
        return DepthRun(Slots(self, len(prompts), longest + new_tokens, kv_dtype), prompts)


def _stack(config: RecursiveTransformerConfig, layers: int) -> nn.ModuleList:
    return nn.ModuleList(Layer(config) for _ in range(layers))


def _run(
    layers: nn.ModuleList, x: Tensor, rotation: Rotation, stores: Sequence[Store] | None
) -> Tensor:
    for number, layer in enumerate(layers):
        x = layer(x, rotation, stores[number] if stores else None)
    return x
