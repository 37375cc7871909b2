"""Drops tokens of an encoder between its layers, and gives what follows them all tokens again.

Attention shows here what the class token looks at.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptive.layers.token_choice import (
    best_tokens,
    class_attention,
    fused,
    gathered,
    redundancy,
)
from adaptive.layers.token_reduction import TokenReduction
from adaptive.ops import unmerge_tokens
from adaptive.policy import TokenPruning


@dataclass
class TokenPrunes(TokenReduction):
    """Which tokens are left.

    Attributes:
        policy: How many go where.
        whole: States of all original tokens, of those that went as they went, ``[batch, all
            tokens, width]``; None before any did, and where they are not kept.
        pruned: Whether any token went, so that the model's own masks fit no more.
        masks: Those made for the tokens that are left, for both forms of attention.
    """

    verb: ClassVar[str] = "prune"
    mask_gone: ClassVar[str] = "it would have to follow the tokens that are left"

    policy: TokenPruning
    whole: Tensor | None = None
    pruned: bool = False
    masks: dict[bool, Any] = field(default_factory=dict)
    _weights: Tensor | None = None
    _scores: Tensor | None = None

    def forget(self) -> None:
        """Drop what tensors the pass left."""
        super().forget()
        self.whole = self._weights = self._scores = None
        self.pruned, self.masks = False, {}

    def before(self, index: int, states: Tensor) -> None:
        """Note that layer ``index`` now runs on ``states``."""
        super().before(index, states)
        self._weights = self._scores = None
        batch, tokens, _ = states.shape
        real = [tokens] * batch if self._real is None else self._real
        if not any(self.policy.removed(length, self.protect) for length in real):
            self._wanted = False

    def see(self, query: Tensor, key: Tensor, scale: float | None) -> None:
        """Take the class token's attention in a layer after which tokens go."""
        if not self._wanted:
            return
        weights = class_attention(query, key, self.lengths, scale)
        self._weights = self._scores = weights
        if self.policy.rule == "information":
            # Attention in units of its mean, which is one over the number of tokens.
            tokens = key.shape[2] if self.lengths is None else self.lengths[:, None]
            level = self.policy.balance * weights.detach() * tokens
            self._scores = level - redundancy(key, self.protect)

    def reduce(self, index: int, states: Tensor) -> Tensor:
        """Return what layer ``index`` made without the tokens that go."""
        weights, scores = self._weights, self._scores
        if weights is None or scores is None:
            raise RuntimeError("adaptive: TokenPruning saw no attention in a layer")
        self._look(index, scores)
        if self.policy.restore == "cached":
            self.whole = states if self.groups is None else self._all(states)
        batch, tokens, _ = states.shape
        rows = [tokens] * batch if self._real is None else self._real
        gone = [self.policy.removed(length, self.protect) for length in rows]
        kept = [length - less for length, less in zip(rows, gone, strict=True)]
        listed, slots = best_tokens(scores.nan_to_num(-torch.inf), self.protect, kept, self.lengths)
        goes = slots < 0
        if self.lengths is not None:
            goes &= torch.arange(tokens, device=states.device) < self.lengths[:, None]
        groups = slots.long()
        made = gathered(states, listed)
        if self.policy.fused != "none":
            made = self._with_fused(made, fused(states, weights, goes, self._mean), kept, gone)
            if self.policy.restore == "fused":
                last = torch.tensor(kept, device=states.device)[:, None]
                groups = torch.where(goes, last, groups)
        self.follow(groups)
        if self._real is not None:
            self.set_lengths([self.policy.left(length, self.protect) for length in rows], states)
        self.pruned, self.masks = True, {}
        return made

    def _look(self, index: int, scores: Tensor) -> None:
        """Raise if scores are NaN; where the question would stop the device, note the answer."""
        nan = scores.detach().isnan().any()
        if not _answers_at_once(scores):
            self.nan = nan if self.nan is None else self.nan | nan
        elif bool(nan):
            raise ValueError(
                f"adaptive: the class token's attention in layer {index} must be numbers for "
                "TokenPruning to choose by, got NaN"
            )

    def restore(self, states: Tensor) -> Tensor:
        """Give each original token its state, or that in which it went, or the fused one."""
        if self.policy.restore == "cached":
            return self._all(states)
        assert self.groups is not None
        return unmerge_tokens(states, self.groups)

    @property
    def _mean(self) -> bool:
        return self.policy.fused == "mean"

    def _with_fused(self, made: Tensor, token: Tensor, kept: list[int], gone: list[int]) -> Tensor:
        """Put the fused token of each row that has one behind the tokens that stay."""
        if self._real is None:
            return torch.cat((made, token[:, None]), 1)
        most = max(keeps + (less > 0) for keeps, less in zip(kept, gone, strict=True))
        made = torch.nn.functional.pad(made, (0, 0, 0, most - made.shape[1]))
        rows = [row for row, less in enumerate(gone) if less]
        places = (
            torch.tensor(rows, device=made.device),
            torch.tensor([kept[row] for row in rows], device=made.device),
        )
        return made.index_put(places, token[places[0]])

    def _all(self, states: Tensor) -> Tensor:
        """States of all original tokens, of those that are left from ``states``."""
        assert self.groups is not None
        assert self.whole is not None
        index = self.groups.clamp(min=0)[..., None].expand(-1, -1, states.shape[2])
        return torch.where(self.groups[..., None] < 0, self.whole, states.gather(1, index))


def _answers_at_once(scores: Tensor) -> bool:
    return scores.is_cpu
