"""Which drafts are kept: those that greedy search makes, or a draw from the model's distribution.

Leviathan et al. 2023 (arXiv:2211.17192), Chen et al. 2023 (arXiv:2302.01318).
"""

import torch
from torch import Tensor


def accept_greedy(drafted: Tensor, choices: Tensor) -> tuple[Tensor, list[list[int]]]:
    """Accept leading drafts that equal the model's own choices.

    Args:
        drafted: ``[batch, drafts]``.
        choices: The model's tokens after the context and after each draft, ``[batch, drafts + 1]``.

    Returns:
        Drafts accepted, ``[batch]``, and the tokens of each row: those and one more.
    """
    right = (drafted == choices[:, :-1]).long().cumprod(1).sum(1)
    rows, counts = choices.tolist(), right.tolist()
    return right, [row[: count + 1] for row, count in zip(rows, counts, strict=True)]


def accept_sampled(
    drafted: Tensor, drafts: Tensor, target: Tensor
) -> tuple[Tensor, list[list[int]]]:
    """Accept a draft x with probability min(1, p(x) / q(x)); draw the next from what is left.

    Args:
        drafted: Tokens drawn from q, ``[batch, drafts]``.
        drafts: q, ``[batch, drafts, vocabulary]``.
        target: p, the model's own, ``[batch, drafts + 1, vocabulary]``.

    Returns:
        As `accept_greedy`. The tokens are distributed as if drawn from p one by one.
    """
    p = target[:, :-1].gather(2, drafted[..., None])[..., 0]
    q = drafts.gather(2, drafted[..., None])[..., 0]
    passed = torch.rand_like(p) * q < p
    accepted = passed.long().cumprod(1).sum(1)
    batch = torch.arange(len(drafted), device=drafted.device)
    left = target[batch, accepted]
    if drafted.shape[1]:
        inside = accepted < drafted.shape[1]
        at = accepted.clamp(max=drafted.shape[1] - 1)
        rest = (left - drafts[batch, at]).clamp_(min=0)
        # p and q may be equal up to rounding; then p itself is as good
        usable = inside & (rest.sum(-1) > 0)
        left = torch.where(usable[:, None], rest, left)
    drawn = torch.multinomial(left, 1)[:, 0].tolist()
    tokens = drafted.tolist()
    made = [[*row[:n], x] for row, n, x in zip(tokens, accepted.tolist(), drawn, strict=True)]
    return accepted, made
