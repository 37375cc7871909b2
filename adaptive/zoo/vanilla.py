"""A decoder-only transformer of the zoo's building blocks: what the others are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adaptive.zoo.config import VanillaTransformerConfig
from adaptive.zoo.decoder import Decoder, Linear, initialise
from adaptive.zoo.model import ZooModel
from adaptive.zoo.run import DecoderRun, Run, padded


class VanillaTransformer(ZooModel):
    """Embedding, decoder, head: the shape of Llama (Touvron et al. 2023, arXiv:2302.13971).

    It runs the same kernels as the other models of the zoo, so that what is measured beside them is
    their architecture.
    """

    config_type = VanillaTransformerConfig
    config: VanillaTransformerConfig

    def __init__(self, config: VanillaTransformerConfig) -> None:
        """Draw the weights."""
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.decoder = Decoder(config, config.layers)
        self.head = Linear(config.width, config.vocab_size)
        initialise(self, config.layers)

    @property
    def kv_layers(self) -> int:
        """Layers with a KV cache: all."""
        return self.config.layers

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of each next token.

        Args:
            ids: ``[batch, tokens]``, int32 or int64.

        Returns:
            ``[batch, tokens, vocab_size]``.

        Raises:
            ValueError, TypeError, IndexError: The ids' shape, dtype or range is wrong.
        """
        self._check_batch(ids)
        return self.head(self.decoder(self.embedding(ids)))  # type: ignore[no-any-return]

    def _start(self, prompts: Sequence[Tensor], new_tokens: int, kv_dtype: torch.dtype) -> Run:
        grid, first = padded(prompts, 1, 0)
        entries = grid.shape[1] + new_tokens

        def embed(grid: Tensor) -> Tensor:
            return self.embedding(grid[..., 0])  # type: ignore[no-any-return]

        run = _TokenRun(self.decoder, embed, grid, first, entries, kv_dtype)
        run.head = self.head
        return run


class _TokenRun(DecoderRun):
    """Every token is a block, and its context needs the head alone."""

    head: Linear

    def logits(self, previous: Tensor | None) -> Tensor:
        """Return the head's scores of the context."""
        return self.head(self.context)  # type: ignore[no-any-return]
