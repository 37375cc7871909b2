"""Which heads retrieve: scores on repeated tokens, and the choice of the best of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adaptive.ops.head_scores import head_scores
from adaptive.policy import ModelShape, RazorAttention


class HeadScores:
    """Echo and induction scores of all KV heads: of each the best query head that shares it.

    Attributes:
        echo: ``[layers, most kv_heads]``, float32; 0 where there is no such head.
        induction: The same.

    Args:
        shape: Of the model.
        period: Tokens from one copy to the next in the prompt; the first token is not repeated.
    """

    def __init__(self, shape: ModelShape, period: int) -> None:
        """Start with nothing measured."""
        self._period = period
        self.echo = torch.zeros(len(shape.kv_heads), max(shape.kv_heads, default=0))
        self.induction = torch.zeros_like(self.echo)

    def attention(
        self, layer: int, query: Tensor, key: Tensor, scale: float | None, softcap: float
    ) -> None:
        """See one layer: ``[heads, tokens, head_dim]`` and ``[kv_heads, tokens, head_dim]``."""
        kv_heads = key.shape[0]
        scores = head_scores(query, key, self._period, 1, scale, softcap)
        for table, found in zip((self.echo, self.induction), scores, strict=True):
            table[layer, :kv_heads] = found.view(kv_heads, -1).amax(1).cpu()


def choose_heads(
    echo: Tensor, induction: Tensor, policy: RazorAttention, places: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """Return the heads that keep every key: the best by induction, and the best by echo.

    Args:
        echo: ``[layers, kv_heads]``.
        induction: The same.
        policy: Its shares of ``places`` are taken, rounded up. Of equal scores the earlier head.
        places: (layer, KV head) pairs to choose from.

    Returns:
        Ascending pairs.
    """
    chosen: set[tuple[int, int]] = set()
    for share, scores in ((policy.induction, induction), (policy.echo, echo)):
        ranked = sorted(places, key=lambda place: (-float(scores[place]), place))
        chosen.update(ranked[: math.ceil(share * len(places))])
    return tuple(sorted(chosen))
