"""LayerSkip's schedules: how often layers are dropped, and how much each exit's loss counts.

Elhoushi et al., "LayerSkip", 2024 (arXiv:2404.16710), sections 4.1.1 and 4.1.2. Layers and steps
count from 0. Everything here is a pure function of numbers.
"""

import math
from typing import Literal

Timescale = Literal["exponential", "constant"]
Curriculum = Literal["rotational", "gradual"]

LEAST_LAYERS = 2


def _rise(place: int, places: int) -> float:
    """From 0 at the first place to 1 at the last, and ever steeper: ``2 ** share - 1``."""
    return math.exp(place * math.log(2) / (places - 1)) - 1 if places > 1 else 1.0


def dropout_probabilities(
    step: int, *, steps: int, layers: int, highest: float, timescale: Timescale
) -> list[float]:
    """Return the probability with which each layer is dropped: ``S(t) D(l) p_max``.

    It is 0 at the first layer and rises to ``highest`` at the last one; with the exponential time
    scale it also rises over the steps, from 0 at the first.

    Args:
        step: Of ``steps``.
        steps: Of the whole training, at least 1.
        layers: At least 2.
        highest: Of the last layer, in [0, 1).
        timescale: "exponential", or "constant": the same at every step.
    """
    scale = 1.0 if timescale == "constant" else _rise(step, steps)
    return [scale * _rise(layer, layers) * highest for layer in range(layers)]


def curriculum_mask(
    step: int, *, steps: int, layers: int, curriculum: Curriculum | None, rotation: int
) -> list[bool]:
    """Return whether the loss of the exit after each layer counts: ``C(t, l)``.

    The last layer always counts.

    Args:
        step: Of ``steps``.
        steps: Of the whole training, at least 1.
        layers: At least 2.
        curriculum: "rotational": every ``rotation``-th layer, another set at each step; "gradual":
            one layer more every ``steps / (2 layers)`` steps, from the last one downward, so that
            all count after half of the steps; None: all.
        rotation: At least 1; for the rotational curriculum.
    """
    last = layers - 1
    if curriculum is None:
        return [True] * layers
    if curriculum == "rotational":
        return [layer % rotation == step % rotation or layer == last for layer in range(layers)]
    return [layer >= last - 2 * layers * step // steps for layer in range(layers)]


def exit_weights(mask: list[bool], exit_scale: float) -> list[float]:
    """Return the share of the exit after each layer in the loss: ``e~(t, l)``; they sum to 1.

    ``e(l) = exit_scale * (0 + 1 + ... + l)`` before the last layer, which gets
    ``layers - 1 + exit_scale * (0 + 1 + ... + layers - 2)``. So the first layer's share is 0, and
    with ``exit_scale=0`` the last layer's is 1: plain training.

    Args:
        mask: Of the curriculum: whether each layer counts. The last one must.
        exit_scale: At least 0.
    """
    last = len(mask) - 1
    raw = [exit_scale * layer * (layer + 1) / 2 for layer in range(last)]
    raw.append(last + exit_scale * (last - 1) * last / 2)
    counted = [weight if counts else 0.0 for weight, counts in zip(raw, mask, strict=True)]
    total = math.fsum(counted)
    return [weight / total for weight in counted]
