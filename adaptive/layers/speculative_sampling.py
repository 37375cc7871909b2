"""Which drafts are kept, as lists of tokens, by `verify_draft` and `verify_samples`."""

import torch
from torch import Tensor

from adaptive.ops.verify_draft import verify_draft
from adaptive.ops.verify_samples import verify_samples


def accept_greedy(drafted: Tensor, choices: Tensor) -> tuple[Tensor, list[list[int]]]:
    """Accept leading drafts that equal the model's own choices.

    Args:
        drafted: ``[batch, drafts]``.
        choices: The model's tokens after the context and after each draft, ``[batch, drafts + 1]``.

    Returns:
        Drafts accepted, ``[batch]``, and the tokens of each row: those and one more.
    """
    accepted, _, tokens = verify_draft(drafted, choices)
    return accepted, _rows(tokens, accepted)


def accept_sampled(
    drafted: Tensor, drafts: Tensor, target: Tensor
) -> tuple[Tensor, list[list[int]]]:
    """Accept drafts so that all tokens are distributed as if drawn from the target one by one.

    Args:
        drafted: Tokens drawn from ``drafts``, ``[batch, drafts]``.
        drafts: Their distributions, ``[batch, drafts, vocabulary]``, float32.
        target: The model's own, ``[batch, drafts + 1, vocabulary]``, float32.

    Returns:
        As `accept_greedy`.
    """
    uniforms = torch.rand(target.shape[:2], device=target.device)
    accepted, tokens = verify_samples(drafted, drafts, target, uniforms)
    return accepted, _rows(tokens, accepted)


def accept_tree(
    drafted: Tensor, choices: Tensor, parents: Tensor, lengths: Tensor
) -> tuple[list[list[int]], list[list[int]]]:
    """Follow each row's tree as far as the model chooses its tokens itself.

    Args:
        drafted: Tokens of the nodes, ``[batch, nodes]``.
        choices: The model's after the context and after each node, ``[batch, nodes + 1]``.
        parents: What each node follows, ``[batch, nodes]``.
        lengths: Nodes of each row, ``[batch]``.

    Returns:
        The nodes of each row's path, and its tokens: theirs and one more.
    """
    accepted, path, tokens = verify_draft(drafted, choices, parents, lengths)
    counts = accepted.tolist()
    paths = [row[:n] for row, n in zip(path.tolist(), counts, strict=True)]
    return paths, _rows(tokens, accepted)


def _rows(tokens: Tensor, accepted: Tensor) -> list[list[int]]:
    counts = accepted.tolist()
    return [row[: n + 1] for row, n in zip(tokens.tolist(), counts, strict=True)]
