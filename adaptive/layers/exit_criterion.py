"""When a token may leave a model early: measures of its logits, and the criteria of `EarlyExit`."""

import torch
from torch import Tensor

from adaptive.policy.early_exit import AGREEMENT, EarlyExit


def measure(criterion: str, logits: Tensor) -> Tensor:
    """How sure logits ``[..., vocabulary]`` are: a number each, ``[...]``, in float32.

    Args:
        criterion: "confidence", "margin" or "entropy".
        logits: Of any floating dtype.
    """
    logits = logits.float()
    total = logits.logsumexp(-1)
    if criterion == "confidence":
        return (logits.amax(-1) - total).exp()
    if criterion == "margin":
        best = logits.topk(2, -1).values
        return (best[..., 0] - total).exp() - (best[..., 1] - total).exp()
    chances = logits.softmax(-1)
    return total - torch.where(chances > 0, chances * logits, 0.0).sum(-1)


class Judge:
    """Judges the exits of one step, in ascending order."""

    def __init__(self, policy: EarlyExit) -> None:
        """Know the criterion."""
        self.policy = policy
        self._guesses: list[Tensor] = []

    def keep(self, rows: Tensor) -> None:
        """Of the rows judged so far go on with some: ``rows``, bool or numbers."""
        self._guesses = [guesses[rows.to(guesses.device)] for guesses in self._guesses]

    def leaves(self, logits: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Which rows meet the criterion, ``[batch]``.

        Args:
            logits: Of this exit, ``[batch, vocabulary]``.
            before: Hidden states before the last layer that ran, ``[batch, width]``.
            after: And after it.
        """
        policy = self.policy
        if policy.criterion == AGREEMENT:
            self._guesses.append(logits.argmax(-1))
            last = torch.stack(self._guesses[-policy.agree :])
            enough = len(last) == policy.agree
            return (last == last[-1]).all(0) if enough else torch.zeros_like(last[0] == last[0])
        assert policy.threshold is not None
        if policy.criterion == "cosine":
            near = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            return near.clamp(max=1.0) >= policy.threshold
        sure = measure(policy.criterion, logits)
        if policy.criterion == "entropy":
            return sure <= policy.threshold
        return sure.clamp(0.0, 1.0) >= policy.threshold
