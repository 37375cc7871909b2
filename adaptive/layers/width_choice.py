"""Which width each token of a call gets: what the router says, and what is known of the pass."""

import math
import threading
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from adaptive.layers.autocast import in_own_dtype
from adaptive.policy.token_routing import TokenRouting, neurons_of
from adaptive.policy.width_router import WidthRouter

_PER_TOKEN = 2
"""Axes of a mask that says which tokens are not padding, ``[batch, tokens]``."""


class Reduces(Protocol):
    """What sends rows or tokens of a pass away between its layers."""

    def left(self, known: Tensor, tokens: int) -> Tensor:
        """Of the rows and ``tokens`` that are left, which are real; ``known`` says it of all."""
        ...


@dataclass
class WidthPass(threading.local):
    """What FFNs of one model need to know of the pass now running; each thread has its own.

    Attributes:
        known: Which tokens of cache and pass are not padding, ``[batch, past + tokens]``; None:
            all, or nobody knows.
        past: Tokens of the cache before the pass.
        forced: By layer, choices of all tokens of a call, ``[batch * tokens]``, int64, in place of
            the router's; None: the router decides.
        reduces: What knows which rows and tokens of the pass are left; None: they all stay.
    """

    known: Tensor | None = None
    past: int = 0
    forced: dict[int, Tensor] | None = None
    reduces: Reduces | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave out a pass that an exception ended: what it points at is not the copy's."""
        return WidthPass, ()

    def begin(self, mask: Any, past: int, reduces: Reduces | None = None) -> None:
        """Note what a pass was given: its mask, the tokens of its cache, and what reduces it."""
        self.known, self.past, self.reduces = None, past, reduces
        if isinstance(mask, Tensor) and mask.dim() == _PER_TOKEN and not bool((mask != 0).all()):
            self.known = mask != 0

    def end(self) -> None:
        """Forget the pass."""
        self.known = self.reduces = None

    def real(self, x: Tensor) -> Tensor | None:
        """Which rows of ``x``, ``[batch, tokens, width]``, are no padding, ``[rows]``; None: all.

        A mask of another shape belongs to something else, and tells nothing.
        """
        known = self.known
        if known is None or x.dim() != _PER_TOKEN + 1:
            return None
        if self.reduces is not None:
            known = self.reduces.left(known, x.shape[1])
        if known.shape != (x.shape[0], self.past + x.shape[1]):
            return None
        real = known[:, self.past :].flatten().to(x.device)
        return None if bool(real.all()) else real


def chosen_neurons(
    policy: TokenRouting, layer: int, rows: Tensor, real: Tensor | None, total: int, now: WidthPass
) -> Tensor | int:
    """How many neurons each row computes with, ``[rows]``, int64; of one row the number.

    Args:
        policy: Whose router decides.
        layer: Whose FFN it is.
        rows: What the FFN reads, ``[rows, width]``.
        real: Which rows are no padding; None: all. Padding gets the narrowest width.
        total: Neurons of the FFN.
        now: The pass.

    Raises:
        ValueError: A logit of a row that is no padding is NaN; the layer is named.
    """
    neurons = [neurons_of(share, total) for share in policy.choices]
    if now.forced is not None and layer in now.forced:
        return torch.tensor(neurons, device=rows.device)[now.forced[layer].to(rows.device)]
    with torch.no_grad(), in_own_dtype(rows.device):
        logits = _logits(policy, layer, rows.detach())
    if len(rows) == 1 and real is None:  # decoding: numbers are sooner compared than tensors
        values: list[float] = logits[0].tolist()
        if any(map(math.isnan, values)):
            raise _nan(layer)
        return neurons[values.index(max(values))]
    wrong = logits.isnan().any(1)
    best = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
    if real is not None:
        best, wrong = best.masked_fill(~real, 0), wrong & real
    if bool(wrong.any()):
        raise _nan(layer)
    return torch.tensor(neurons, device=rows.device)[best]


def _logits(policy: TokenRouting, layer: int, rows: Tensor) -> Tensor:
    """Of each choice, ``[rows, choices]``; of equal ones the first is taken."""
    router = policy.router
    assert router is not None
    if isinstance(router, WidthRouter):
        return router.logits(layer, rows)
    weight, bias = router.of(layer, rows.device)
    logit = rows.float() @ weight + bias
    # A logit of 0 chooses the wider, the second; NaN stays.
    return torch.stack([torch.where(logit >= 0, -1.0, 0.0), 0 * logit - 0.5], 1)


def _nan(layer: int) -> ValueError:
    return ValueError(f"adaptive: TokenRouting: scores of layer {layer} must be numbers, got NaN")
