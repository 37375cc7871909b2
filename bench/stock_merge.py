"""What merge_tokens is measured against: the published form, in PyTorch's operators."""

import torch
from torch import Tensor
from torch.nn import functional

from adaptive.ops import merge_tokens
from bench.stock import Suite


def scattered(hidden: Tensor, metric: Tensor, removed: int, *_: object) -> Tensor:
    """Scores of even against odd tokens, argsort, scatter_add, and a mask of those that stay."""
    batch, _, width = hidden.shape
    unit = functional.normalize(metric.float(), dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    scores[:, 0] = -torch.inf  # the class token stays
    best, found = scores.max(-1)
    source = best.argsort(dim=-1, descending=True)[:, :removed]
    into = 2 * found.gather(1, source) + 1
    source = 2 * source
    members = hidden.gather(1, source[..., None].expand(-1, -1, width))
    summed = hidden.scatter_add(1, into[..., None].expand(-1, -1, width), members)
    ones = hidden.new_ones(hidden.shape[:2])
    summed /= ones.scatter_add(1, into, ones)[..., None]
    stays = torch.ones_like(ones, dtype=torch.bool).scatter(1, source, False)
    return summed[stays].view(batch, -1, width)


def truth(hidden: Tensor, metric: Tensor, *rest: object) -> Tensor:
    """The reference in float64."""
    return merge_tokens.reference(hidden.double(), metric.double(), *rest)[0]  # type: ignore[arg-type]


SUITES = {
    merge_tokens.name: Suite(
        forms={"argsort + scatter_add": scattered},
        truth=truth,
        sweep=[
            {"batch": 1, "tokens": 197, "width": 768, "removed": 13},
            {"batch": 32, "tokens": 197, "width": 768, "removed": 13},
            {"batch": 1, "tokens": 577, "width": 1024, "removed": 23},
        ],
        cuda_sweep=[{"batch": 32, "tokens": 197, "width": 768, "removed": 13}],
    ),
}
"""By name of the op."""
