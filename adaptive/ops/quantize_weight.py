"""quantize_weight: a weight in 8 bits, with a factor for each group of its columns."""

import torch
from torch import Tensor

GROUPS = (32, 64, 128)
MAX_LEVEL = 127  # symmetric: -128 is not used

_ROWS = 4096  # at a time: what is computed in float32 on the way stays small


def quantize_weight(weight: Tensor, group: int = 64) -> tuple[Tensor, Tensor]:
    """Round a weight to 8 bits, symmetrically around zero, group by group.

    What `skinny_linear` and `exit_confidence` take with ``weight_scales``.

    Args:
        weight: ``[out_features, in_features]``, float32, float16 or bfloat16.
        group: Neighbouring columns of a row that share a factor: 32, 64 or 128, and a divisor of
            in_features.

    Returns:
        ``(quantized, scales)``: int8, ``[out_features, in_features]``, and float32,
        ``[out_features, in_features / group]``. ``quantized * scales``, group by group, differs
        from ``weight`` by half a ``scales`` at most, which is 1/254 of the group's largest weight.
        A group that holds NaN or infinity becomes NaN.

    Raises:
        ValueError: The weight is no matrix, or ``group`` does not fit.
        TypeError: The weight's dtype is wrong.
    """
    start = "adaptive::quantize_weight: "
    if weight.dim() != 2:  # noqa: PLR2004
        raise ValueError(f"{start}weight must have 2 dimensions, got shape {list(weight.shape)}")
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{start}weight must be float32 or float16 or bfloat16, got {weight.dtype}")
    rows, width = weight.shape
    if group not in GROUPS or width % group != 0:
        rule = f"be 32, 64 or 128 and divide the {width} columns of weight"
        raise ValueError(f"{start}group must {rule}, got {group!r}")
    quantized = torch.empty((rows, width), dtype=torch.int8, device=weight.device)
    scales = torch.empty((rows, width // group), dtype=torch.float32, device=weight.device)
    with torch.no_grad():
        for begin in range(0, rows, _ROWS):
            part = slice(begin, begin + _ROWS)
            wide = weight[part].float().unflatten(1, (-1, group))
            factor = wide.abs().amax(-1) / MAX_LEVEL
            scales[part] = torch.where(factor.isfinite(), factor, torch.nan)
            levels = (wide / factor[..., None]).nan_to_num_(0.0).round_()  # 0 / 0 is 0 here
            quantized[part] = levels.clamp_(-MAX_LEVEL, MAX_LEVEL).flatten(1).to(torch.int8)
    return quantized, scales


def dequantize_weight(quantized: Tensor, scales: Tensor) -> Tensor:
    """The weight that `quantize_weight` rounded to, float32, ``[out_features, in_features]``."""
    groups = scales.shape[1]
    wide: Tensor = quantized.float().unflatten(1, (groups, -1))
    return (wide * scales[..., None]).flatten(1)
