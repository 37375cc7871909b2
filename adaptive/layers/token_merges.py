"""Merges the tokens of an encoder between its layers.

Attention shows the keys of a layer here, and takes the logarithm of the tokens' sizes from here.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from adaptive.layers.token_reduction import TokenReduction, learns
from adaptive.ops import merge_tokens, unmerge_tokens
from adaptive.policy import TokenMerging

_FEATURES = 8
"""The op takes multiples of it; zeros behind a metric change no cosine."""


@dataclass
class TokenMerges(TokenReduction):
    """How tokens merge.

    Attributes:
        policy: How many merge where.
        sizes: Original tokens that each token stands for, ``[batch, tokens]``; None: one each.
    """

    verb: ClassVar[str] = "merge"
    mask_gone: ClassVar[str] = "its place is taken by sizes"

    policy: TokenMerging
    sizes: Tensor | None = None
    _metric: Tensor | None = None

    def forget(self) -> None:
        """Drop what tensors the pass left."""
        super().forget()
        self.sizes = self._metric = None

    def before(self, index: int, states: Tensor) -> None:
        """Note that layer ``index`` now runs on ``states``."""
        super().before(index, states)
        self._metric = None

    def see(self, query: Tensor, key: Tensor, scale: float | None) -> None:
        """Take the keys of a layer after which tokens merge."""
        if self._wanted:
            self._metric = key.detach().float().mean(1)

    def restore(self, states: Tensor) -> Tensor:
        """Give each original token the state of the one that it became part of."""
        assert self.groups is not None
        return unmerge_tokens(states, self.groups)

    def reduce(self, index: int, states: Tensor) -> Tensor:
        """Return what layer ``index`` made with some tokens merged."""
        tokens = states.shape[1]
        removed = self.policy.removed(tokens, self.protect)
        real, counts = self._real, None
        if real is not None:
            pairs = [self.policy.removed(length, self.protect) for length in real]
            real = [length - pair for length, pair in zip(real, pairs, strict=True)]
            counts = torch.tensor(pairs, dtype=torch.int32, device=states.device)
        if removed == 0:
            return states
        if self._metric is None:
            raise RuntimeError("adaptive: TokenMerging saw no attention in a layer")
        metric = nn.functional.pad(self._metric, (0, -self._metric.shape[2] % _FEATURES))
        if states.stride(2) != 1:  # patch embeddings may be a transposed view
            states = states.contiguous()
        native = states.device.type in merge_tokens.native
        run = merge_tokens.reference if learns(states) or not native else merge_tokens
        merged, sizes, groups = run(
            states, metric.to(states.dtype), removed, self.sizes, self.lengths, counts, self.protect
        )
        self.follow(groups)
        self.sizes = sizes
        self.bias = sizes.log()[:, None, None]
        if real is not None:
            self.set_lengths(real, states)
            nothing = (sizes[:, :1] == 0)[:, None, None]
            self.bias = self.bias.masked_fill(nothing, 0.0)  # softmax of -inf alone would be NaN
        return merged
