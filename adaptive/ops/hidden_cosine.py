"""Cosine of hidden states before and after layers: what layers that change little betray.

Plain PyTorch: two rows of a hidden state are a few KiB, beside the weights of any layer, so there
is nothing for a kernel to gain.
"""

import torch
from torch import Tensor


def hidden_cosine(hidden: Tensor, previous: Tensor) -> Tensor:
    """Return the cosine between each row of ``hidden`` and the same row of ``previous``.

    The criterion of early exits that needs no LM head: hidden states saturate where further layers
    no longer turn them (Schuster et al. 2022, CALM, arXiv:2207.07061).

    Args:
        hidden: ``[rows, width]``, any floating dtype.
        previous: Shape and device of ``hidden``; any floating dtype.

    Returns:
        ``[rows]``, float32, in -1..1, computed in float32 whatever the magnitudes: nothing
        overflows or vanishes. 0 where either row is all zeros, NaN where either holds inf or NaN.

    Raises:
        ValueError: The shapes differ, are not ``[rows, width]``, or width is 0.
        TypeError: An argument is not floating-point.
    """
    for name, tensor in (("hidden", hidden), ("previous", previous)):
        if not tensor.is_floating_point():
            raise TypeError(
                f"adaptive::hidden_cosine: {name} must be floating-point, got {tensor.dtype}"
            )
    if hidden.dim() != 2 or hidden.shape[1] == 0:  # noqa: PLR2004
        raise ValueError(
            "adaptive::hidden_cosine: hidden must be [rows, width] with a width of at least 1, "
            f"got shape {list(hidden.shape)}"
        )
    if previous.shape != hidden.shape:
        raise ValueError(
            f"adaptive::hidden_cosine: previous must have shape {list(hidden.shape)}, "
            f"got {list(previous.shape)}"
        )
    cosine = (_direction(hidden) * _direction(previous)).sum(-1)
    return cosine.clamp(-1, 1)


def _direction(rows: Tensor) -> Tensor:
    """Each row over its length, zeros for zeros."""
    rows = rows.float()
    largest = rows.abs().amax(-1, keepdim=True)
    rows = rows / torch.where(largest == 0, 1.0, largest)  # so that no square leaves float32
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / torch.where(length == 0, 1.0, length)
