"""What the ops that route tokens are measured against: norms, products and index ops of PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional

from adaptive.ops import combine_tokens, gather_tokens, route_tokens, router_scores
from bench.stock import Suite

PROMPT = {"batch": 1, "tokens": 2048, "width": 2048}


def topk_and_sort(
    scores: Tensor, threshold: float | None = None, capacity: float | None = None, *_: object
) -> Tensor:
    """The positions and nothing else; of equal scores whichever topk takes."""
    if threshold is not None:
        made = torch.full_like(scores, -1, dtype=torch.int32)
        for row, taken in zip(made, scores >= threshold, strict=True):
            places = taken.nonzero()[:, 0]
            row[: len(places)] = places
        return made
    share = isinstance(capacity, float)
    room = int(scores.shape[1] * capacity) if share else int(capacity or 0)
    places = scores.topk(room, dim=1, sorted=False).indices.sort(1).values
    return functional.pad(places.int(), (0, scores.shape[1] - room), value=-1)


def routed(scores: Tensor, *options: object) -> Tensor:
    """The same positions, exactly."""
    return route_tokens.reference(scores, *options)[0].double()  # type: ignore[arg-type]


def distinct(scores: Tensor, *options: object) -> tuple[object, ...]:
    """Scores of which no two are equal: topk does not say which of equals it takes."""
    order = torch.randperm(scores.numel(), generator=torch.Generator().manual_seed(0))
    return (order.view(scores.shape).float() / scores.numel(), *options)


def norm_and_linear(
    hidden: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    function: str = "sigmoid",
) -> Tensor:
    """F.rms_norm, F.linear and the function, each in the dtype of the hidden states."""
    if norm_weight is not None:
        hidden = functional.rms_norm(hidden, norm_weight.shape, norm_weight, eps)
    logits = functional.linear(hidden, weight)
    if function == "softmax":
        return logits.softmax(-1)[..., 1]
    return logits[..., 0].sigmoid() if function == "sigmoid" else logits[..., 0]


def in_float32(
    hidden: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    function: str = "sigmoid",
) -> Tensor:
    """One product by router and norm together, and the sum of squares, of widened hidden states."""
    wide, rows = hidden.float(), weight.float()
    router = rows[-1] - rows[0] if function == "softmax" else rows[0]
    if norm_weight is None:
        logits = wide @ router
    else:
        scale = torch.rsqrt(torch.linalg.vecdot(wide, wide) / wide.shape[2] + eps)
        logits = wide @ (router * norm_weight.float()) * scale
    return logits if function == "identity" else logits.sigmoid()


def by_gather(hidden: Tensor, tokens: Tensor) -> Tensor:
    """torch.gather along an expanded index, where the list has no -1."""
    return hidden.gather(1, tokens.long()[..., None].expand(-1, -1, hidden.shape[2]))


def rows_of(hidden: Tensor, tokens: Tensor) -> Tensor:
    """The listed rows among those of all batch rows; nothing to compute of a single one."""
    if len(hidden) == 1:
        return tokens[0]
    first = hidden.shape[1] * torch.arange(len(hidden), dtype=tokens.dtype, device=tokens.device)
    return (tokens + first[:, None]).flatten()


def scaled(update: Tensor, weights: Tensor | None) -> Tensor:
    """Updates times weights, as rows."""
    factor = 1 if weights is None else weights[..., None].to(update.dtype)
    return (update * factor).flatten(0, 1)


def by_index_select(hidden: Tensor, tokens: Tensor) -> Tensor:
    """index_select of the rows of all batch rows."""
    made = hidden.flatten(0, 1).index_select(0, rows_of(hidden, tokens))
    return made.view(*tokens.shape, hidden.shape[2])


def by_index_add(
    hidden: Tensor, update: Tensor, tokens: Tensor, weights: Tensor | None = None
) -> Tensor:
    """A product by the weights and index_add, out of place."""
    rows = rows_of(hidden, tokens)
    return hidden.flatten(0, 1).index_add(0, rows, scaled(update, weights)).view(hidden.shape)


def by_advanced_index(
    hidden: Tensor, update: Tensor, tokens: Tensor, weights: Tensor | None = None
) -> Tensor:
    """A copy, then rows read, added to and written by an index."""
    made = hidden.clone()
    made.view(-1, hidden.shape[2])[rows_of(hidden, tokens).long()] += scaled(update, weights)
    return made


def full_lists(*arguments: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same with a list that is full, as a capacity makes it: stock forms know no -1."""
    made = list(arguments)
    at = next(i for i, t in enumerate(made) if t is not None and t.dtype == torch.int32)
    hidden, tokens = made[0], made[at]
    assert hidden is not None
    assert tokens is not None
    rng = torch.Generator().manual_seed(0)
    places = torch.randperm(hidden.shape[1], generator=rng)[: tokens.shape[1]].sort().values
    made[at] = places.int().expand(len(hidden), -1).contiguous().to(hidden.device)
    return tuple(made)


def gathered(hidden: Tensor, tokens: Tensor) -> Tensor:
    """The same rows in float64."""
    return gather_tokens.reference(hidden.double(), tokens)


def combined(
    hidden: Tensor, update: Tensor, tokens: Tensor, weights: Tensor | None = None
) -> Tensor:
    """The sums in float64."""
    wide = None if weights is None else weights.double()
    return by_index_add(hidden.double(), update.double(), tokens, wide)


def scored(
    hidden: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    function: str = "sigmoid",
) -> Tensor:
    """The scores in float64."""
    gain = None if norm_weight is None else norm_weight.double()
    return norm_and_linear(hidden.double(), weight.double(), gain, eps, function)


def gathered_bytes(hidden: Tensor, tokens: Tensor) -> int:
    """Rows read and written, less the four bytes of an element that the caller counts."""
    return tokens.numel() * hidden.shape[2] * (2 * hidden.element_size() - 4)


def combined_bytes(hidden: Tensor, update: Tensor, *_: object) -> int:
    """Hidden states read and written and updates read, less those four bytes."""
    return 2 * hidden.nbytes + update.nbytes - 4 * hidden.numel()


LISTS = [{**PROMPT, "chosen": chosen} for chosen in (256, 512, 1024)]
SUITES = {
    route_tokens.name: Suite(
        forms={"topk + sort, or nonzero": topk_and_sort},
        truth=routed,
        sweep=[
            {"batch": 1, "tokens": tokens, **option}
            for tokens in (2048, 32768)
            for option in ({"capacity": 0.125}, {"threshold": 0.5})
        ],
        place=distinct,
    ),
    router_scores.name: Suite(
        forms={"rms_norm + linear": norm_and_linear, "products in float32": in_float32},
        truth=scored,
        sweep=[
            {**PROMPT, "norm": True, "function": function} for function in ("sigmoid", "softmax")
        ],
    ),
    gather_tokens.name: Suite(
        forms={"index_select": by_index_select, "gather": by_gather},
        truth=gathered,
        sweep=LISTS,
        moved_bytes=gathered_bytes,
        place=full_lists,
    ),
    combine_tokens.name: Suite(
        forms={"index_add": by_index_add, "advanced index": by_advanced_index},
        truth=combined,
        sweep=[{**sizes, "weighted": True} for sizes in LISTS],
        moved_bytes=combined_bytes,
        place=full_lists,
    ),
}
"""By name of the op."""
