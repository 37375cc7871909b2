"""verify_samples: which drafted tokens may stand as samples from the target model."""

from typing import Any

import torch
from torch import Tensor

from adaptive.ops._op import op

I64, F64 = torch.int64, torch.float64
STEPS = 4096  # make_inputs draws multiples of 1 / STEPS, of which every sum is exact


def make_inputs(
    batch: int,
    nodes: int,
    vocab: int,
    ragged: bool = False,
    *,
    dtype: torch.dtype = torch.float32,
    device: str,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Random distributions that are much alike, and tokens drawn from the drafter's."""
    rng = torch.Generator().manual_seed(seed)

    def counted(weights: Tensor) -> Tensor:
        counts = torch.zeros_like(weights)
        if weights.numel() > 0:
            tokens = torch.multinomial(weights, STEPS, True, generator=rng)
            counts.scatter_add_(1, tokens, torch.ones(tokens.shape))
        return counts / STEPS

    weights = torch.randn(batch * (nodes + 1), vocab, generator=rng).mul_(2).exp_()
    target = counted(weights).view(batch, nodes + 1, vocab)
    noise = torch.randn(batch * nodes, vocab, generator=rng).mul_(0.3).exp_()
    near = weights.view(batch, nodes + 1, vocab)[:, :nodes].reshape(batch * nodes, vocab)
    draft = counted(near * noise)
    target[:, : min(nodes, 1)] = draft.view(batch, nodes, vocab)[:, :1]  # and the first, always
    drafted = torch.zeros(batch * nodes, 1, dtype=I64)
    if draft.numel() > 0:
        drafted = torch.multinomial(draft, 1, generator=rng)
    uniforms = torch.rand(batch, nodes + 1, generator=rng)
    uniforms[:, :nodes].div_(2)  # most tokens are accepted
    lengths = torch.randint(0, nodes + 1, (batch,), generator=rng) if ragged else None
    made = (
        drafted.view(batch, nodes),
        draft.view(batch, nodes, vocab),
        target,
        uniforms,
        lengths,
    )
    return tuple(t if t is None else t.to(device) for t in made)


def outputs(
    drafted: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    uniforms: Tensor,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Uninitialised ``accepted`` and ``tokens`` for these arguments."""
    if drafted.dim() != 2:  # noqa: PLR2004
        raise ValueError(
            "adaptive::verify_samples: drafted must have 2 dimensions, "
            f"got shape {list(drafted.shape)}"
        )
    batch, nodes = drafted.shape
    tokens = drafted.new_empty((batch, nodes + 1), dtype=I64)
    return drafted.new_empty(batch, dtype=I64), tokens


@op(
    outputs=outputs,
    inputs=make_inputs,
    edges=[
        {"batch": 0, "nodes": 4, "vocab": 9},
        {"batch": 2, "nodes": 0, "vocab": 9},
        {"batch": 3, "nodes": 2, "vocab": 1},
        {"batch": 9, "nodes": 4, "vocab": 50},
        {"batch": 9, "nodes": 6, "vocab": 33, "ragged": True},
        # more nodes than a warp has lanes; more tokens than a block sums at once
        {"batch": 3, "nodes": 40, "vocab": 1030},
        {"batch": 3, "nodes": 3, "vocab": 20011},
    ],
    models=[
        # Llama-3's vocabulary, and Llama-2's
        {"batch": 1, "nodes": 4, "vocab": 128256},
        {"batch": 8, "nodes": 4, "vocab": 32000},
    ],
)
def verify_samples(
    drafted: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    uniforms: Tensor,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Accept drafted samples so that all tokens are distributed as the target's own samples.

    Speculative sampling (Leviathan et al. 2023, arXiv:2211.17192): a token ``x`` drawn from ``q``
    is accepted with probability ``min(1, p[x] / q[x])``; where one is not, the next token comes
    from ``max(p - q, 0)``, normalised. Exact in distribution for any ``q`` that the tokens were
    really drawn from.

    Args:
        drafted: Tokens of the draft, ``[batch, nodes]``, int64, each in 0..vocab-1.
        draft_probs: What each was drawn from, ``[batch, nodes, vocab]``, float32, last dimension
            contiguous; finite and not negative.
        target_probs: The target's probabilities for each drafted token and for the one after them,
            ``[batch, nodes + 1, vocab]``, as ``draft_probs``. Need not sum to 1 exactly.
        uniforms: Independent random numbers in 0..1 (1 itself is best left out), ``[batch,
            nodes + 1]``, float32. The first ``nodes`` decide about the drafted tokens, the last
            draws the token after the accepted ones: the draw must not depend on the decisions.
        lengths: Nodes of each row that are real, ``[batch]``, int64, each in 0..nodes; the others
            are never accepted or looked at. None: all of them.

    Returns:
        ``(accepted, tokens)``, int64: how many drafted tokens are accepted, ``[batch]``; and those,
        the drawn one, then -1, ``[batch, nodes + 1]``. Token ``x`` is accepted if
        ``u * q[x] < p[x]``, in float64, which is exact: never if ``p[x]`` is 0, always if only
        ``q[x]`` is. The draw takes the first token of positive weight whose cumulative weight
        exceeds ``u`` times the sum, in float64; the last of positive weight if rounding leaves
        none; weights are ``p`` where all of ``max(p - q, 0)`` is 0. Where sums are exact, as with
        multiples of 2^-12, every device draws the same token; otherwise the order of additions may
        decide where ``u`` falls within some 2^-50 of the border between two tokens.

    Raises:
        ValueError: A shape, device or memory layout is wrong; a uniform is out of range; a
            probability that is looked at (a drafted token's, or one of those that the last token
            is drawn from) is negative or not finite, or all of them are 0.
        TypeError: An argument is no tensor, or its dtype is wrong.
        IndexError: A token or length is out of range.
        On CUDA, data that is refused makes the results of its row -1 instead.
    """
    batch, nodes = drafted.shape
    row = torch.arange(batch, device=drafted.device)
    length = torch.full_like(row, nodes) if lengths is None else lengths
    real = torch.arange(nodes, device=drafted.device) < length[:, None]
    listed = drafted.masked_fill(~real, 0)[..., None]
    chance = draft_probs.gather(2, listed)[..., 0].double()
    wanted = target_probs[:, :nodes].gather(2, listed)[..., 0].double()
    kept = real & (uniforms[:, :nodes].double() * chance < wanted)
    accepted = kept.long().cumprod(1).sum(1)

    p = target_probs[row, accepted].double()
    none = draft_probs.new_zeros((batch, 1, target_probs.shape[2]))
    q = torch.cat([draft_probs, none], 1)[row, accepted].double()
    left = torch.where((accepted < length)[:, None], (p - q).clamp(min=0), p)
    left = torch.where((left > 0).any(1, keepdim=True), left, p)
    cumulative = left.cumsum(1)
    bound = uniforms[:, nodes].double() * cumulative[:, -1]
    fits = (cumulative > bound[:, None]) & (left > 0)
    last = left.shape[1] - 1 - (left > 0).long().flip(1).argmax(1)
    drawn = torch.where(fits.any(1), fits.long().argmax(1), last)

    place = torch.arange(nodes + 1, device=drafted.device)
    tokens = torch.cat([drafted, drawn[:, None]], 1)
    tokens = torch.where(place < accepted[:, None], tokens, -1)
    tokens[row, accepted] = drawn
    return accepted, tokens
