"""When a token may leave a model early: the criteria of `EarlyExit`."""

import torch
from torch import Tensor

from adaptive.layers.exit_head import Outlook
from adaptive.ops import hidden_cosine
from adaptive.policy.early_exit import AGREEMENT, EarlyExit


class Judge:
    """Judges the exits of one step, in ascending order."""

    def __init__(self, policy: EarlyExit) -> None:
        """Know the criterion."""
        self.policy = policy
        self._guesses: list[Tensor] = []

    def keep(self, rows: Tensor) -> None:
        """Of the rows judged so far go on with some: ``rows``, bool or numbers."""
        self._guesses = [guesses[rows.to(guesses.device)] for guesses in self._guesses]

    def leaves(self, said: Outlook, before: Tensor, after: Tensor) -> Tensor:
        """Which rows meet the criterion, ``[batch]``.

        Args:
            said: What this exit says.
            before: Hidden states before the last layer that ran, ``[batch, width]``.
            after: And after it.
        """
        policy = self.policy
        if policy.criterion == AGREEMENT:
            self._guesses.append(said.best)
            last = torch.stack(self._guesses[-policy.agree :])
            enough = len(last) == policy.agree
            return (last == last[-1]).all(0) if enough else torch.zeros_like(last[0] == last[0])
        assert policy.threshold is not None
        if policy.criterion == "cosine":
            return hidden_cosine(after, before) >= policy.threshold
        sure = said.sure(policy.criterion)
        if policy.criterion == "entropy":
            return sure <= policy.threshold
        return sure.clamp(0.0, 1.0) >= policy.threshold
