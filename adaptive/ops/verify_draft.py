"""verify_draft: which drafted tokens are what the target model would have said itself."""

from typing import Any

import torch
from torch import Tensor

from adaptive.ops._op import op

I64 = torch.int64
RIGHT_SHARE = 0.8  # of the drafted tokens of the inputs that make_inputs draws
VOCAB = 32000


def make_inputs(
    batch: int,
    nodes: int,
    tree: bool = False,
    ragged: bool = False,
    *,
    dtype: torch.dtype = torch.float32,
    device: str,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Random drafts, of which the first and most other tokens are those that the target chooses."""
    rng = torch.Generator().manual_seed(seed)
    choices = torch.randint(0, VOCAB, (batch, nodes + 1), generator=rng)
    before = torch.arange(-1, nodes - 1).expand(batch, -1)
    chance = torch.rand(batch, nodes, generator=rng)
    parents = ((before + 2) * chance).floor().long() - 1 if tree else before
    right = torch.rand(batch, nodes, generator=rng) < RIGHT_SHARE
    right[:, :1] = True
    drafted = torch.where(right, choices.gather(1, parents + 1), VOCAB)
    lengths = torch.randint(0, nodes + 1, (batch,), generator=rng) if ragged else None
    made = drafted, choices, parents if tree else None, lengths
    return tuple(t if t is None else t.to(device) for t in made)


def outputs(
    drafted: Tensor,
    choices: Tensor,
    parents: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised ``accepted``, ``path`` and ``tokens`` for these arguments."""
    if not isinstance(drafted, Tensor):
        raise TypeError(
            "adaptive::verify_draft: drafted must be a strided torch.Tensor with data on cpu or "
            f"cuda, got {type(drafted).__name__}"
        )
    if drafted.dim() != 2:  # noqa: PLR2004
        raise ValueError(
            "adaptive::verify_draft: drafted must have 2 dimensions, "
            f"got shape {list(drafted.shape)}"
        )
    batch, nodes = drafted.shape
    path, tokens = (drafted.new_empty((batch, nodes + 1), dtype=I64) for _ in range(2))
    return drafted.new_empty(batch, dtype=I64), path, tokens


@op(
    outputs=outputs,
    inputs=make_inputs,
    edges=[
        {"batch": 0, "nodes": 4},
        {"batch": 2, "nodes": 0},
        {"batch": 1, "nodes": 1},
        {"batch": 5, "nodes": 8, "ragged": True},
        # more nodes than a warp has lanes
        {"batch": 9, "nodes": 70},
        {"batch": 9, "nodes": 16, "tree": True},
        {"batch": 9, "nodes": 100, "tree": True, "ragged": True},
    ],
    models=[
        {"batch": 1, "nodes": 8},
        {"batch": 1, "nodes": 64, "tree": True},
        {"batch": 32, "nodes": 64, "tree": True},
    ],
)
def verify_draft(
    drafted: Tensor,
    choices: Tensor,
    parents: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Accept the drafted tokens that the target model chooses itself, and one more token.

    What follows one verifying pass of speculative decoding (Stern et al. 2018, arXiv:1811.03115),
    over lists or token trees (Miao et al. 2023, arXiv:2305.09781). Exact for greedy decoding: with
    choices the argmax at each node, the tokens are those of decoding without a draft. Exact in
    distribution for sampling, too, if each choice was sampled from the target's distribution at
    its node and the drafted tokens were chosen without regard to these samples, so that every
    token on the way is such a sample. A drafter that samples is better served by `verify_samples`.

    Args:
        drafted: Tokens of the draft, ``[batch, nodes]``, int64.
        choices: The target's tokens, ``[batch, nodes + 1]``, int64: first the one after the
            context, then for each node the one after it.
        parents: What each node follows, ``[batch, nodes]``, int64, contiguous: an earlier node, or
            -1 for the context. None: lists, in which each node follows the one before.
        lengths: Nodes of each row that are real, ``[batch]``, int64, each in 0..nodes; the others
            are never accepted, and their parents not looked at. None: all of them.

    Returns:
        ``(accepted, path, tokens)``, int64. ``accepted``: nodes accepted, ``[batch]``: from the
        context on, the first node that follows and whose token is the choice there, and so on.
        ``path``: which nodes, in order, then -1, ``[batch, nodes + 1]``. ``tokens``: their tokens
        and the choice after the last of them, ``accepted + 1`` in all, then -1.

    Raises:
        ValueError: A shape, device or memory layout is wrong.
        TypeError: An argument is no tensor, or its dtype is wrong.
        IndexError: A parent or length is out of range. On CUDA, such a parent counts as -1, and all
            results of a row with such a length are -1.
    """
    batch, nodes = drafted.shape
    row = torch.arange(batch, device=drafted.device)
    accepted = torch.zeros_like(row)
    here, choice = torch.full_like(row, -1), choices[:, 0]
    path, tokens = (drafted.new_full((batch, nodes + 1), -1) for _ in range(2))
    for node in range(nodes):  # what follows a node comes after it
        parent = node - 1 if parents is None else parents[:, node]
        fits = (here == parent) & (drafted[:, node] == choice)
        if lengths is not None:
            fits = fits & (node < lengths)
        path[row, accepted] = torch.where(fits, node, -1)
        tokens[row, accepted] = torch.where(fits, choice, -1)
        here = torch.where(fits, node, here)
        choice = torch.where(fits, choices[:, node + 1], choice)
        accepted = accepted + fits
    tokens[row, accepted] = choice
    return accepted, path, tokens
