"""Drops tokens of an encoder between its layers, and gives what follows them all tokens again.

The attention function leaves the class token's attention here, and takes masks for the tokens that
are left from here.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from adaptive.layers.hf_call import Call
from adaptive.layers.hf_mask import LazyMask
from adaptive.layers.hf_token_reduction import TokenReduction
from adaptive.layers.pattern import Pattern
from adaptive.layers.token_choice import (
    best_tokens,
    class_attention,
    fused,
    gathered,
    redundancy,
)
from adaptive.ops import unmerge_tokens
from adaptive.policy import TokenPruning


@dataclass
class TokenPrunes(TokenReduction):
    """Which tokens are left.

    Attributes:
        policy: How many go where.
        whole: States of all original tokens, of those that went as they went, ``[batch, all
            tokens, width]``; None before any did, and where they are not kept.
    """

    verb: ClassVar[str] = "prune"
    mask_gone: ClassVar[str] = "it would have to follow the tokens that are left"

    policy: TokenPruning
    whole: Tensor | None = None
    _weights: Tensor | None = None
    _scores: Tensor | None = None
    _pruned: bool = False
    _masks: dict[bool, LazyMask] = field(default_factory=dict)

    def forget(self) -> None:
        """Drop what tensors the pass left."""
        super().forget()
        self.whole = self._weights = self._scores = None
        self._pruned, self._masks = False, {}

    def before(self, index: int, states: Tensor) -> None:
        """Note that layer ``index`` now runs on ``states``."""
        super().before(index, states)
        self._weights = self._scores = None
        real = [states.shape[1]] if self._real is None else self._real
        if not any(self.policy.removed(length, self.protect) for length in real):
            self._wanted = False

    def attend(self, call: Call) -> Call:
        """Take the class token's attention; return the call with the mask of what is left."""
        if self._wanted:
            weights = class_attention(call.query, call.key, self.lengths, call.scaling)
            self._weights = self._scores = weights
            if self.policy.rule == "information":
                # Attention in units of its mean, which is one over the number of tokens.
                tokens = call.key.shape[2] if self.lengths is None else self.lengths[:, None]
                level = self.policy.balance * weights.detach() * tokens
                self._scores = level - redundancy(call.key, self.protect)
        if not self._pruned:
            return call
        return call._replace(mask=None if self.lengths is None else self._mask(call))

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
        self._pruned, self._masks = True, {}
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

    def _mask(self, call: Call) -> LazyMask:
        """What tells padding from the tokens that are left; dense if someone looks at it."""
        known = self._masks.get(call.eager)
        if known is not None:
            return known
        assert self.lengths is not None
        batch, _, tokens, _ = call.query.shape
        offsets = torch.nn.functional.pad(self.lengths[:, None], (1, 0))
        dtype = call.query.dtype if call.eager else torch.bool
        given = {"lengths": self.lengths, "tokens": tokens, "dtype": dtype}
        pattern = Pattern(tokens, offsets=offsets, causal=False)
        shape = (batch, 1, tokens, tokens)
        made = LazyMask(shape, dtype, call.query.device, _dense_mask, given, pattern)
        self._masks[call.eager] = made
        return made


def _answers_at_once(scores: Tensor) -> bool:
    return scores.is_cpu


def _dense_mask(lengths: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """The same as stock attention takes it, ``[batch, 1, tokens, tokens]``."""
    seen = torch.arange(tokens, device=lengths.device) < lengths[:, None]
    seen = seen | (lengths == 0)[:, None]  # softmax of nothing would be NaN
    if dtype != torch.bool:
        zero = torch.zeros((), dtype=dtype, device=lengths.device)
        seen = torch.where(seen, zero, torch.finfo(dtype).min)
    return seen[:, None, None].expand(-1, -1, tokens, -1)
