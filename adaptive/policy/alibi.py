"""How far heads with linear biases (ALiBi) can see: the rule that needs no calibration."""

import math
from collections.abc import Sequence


def alibi_windows(
    slopes: Sequence[float], norms: Sequence[float], eps: float = 1e-3
) -> tuple[int, ...]:
    """Return the tokens that each head can see; what lies further back weighs at most ``eps``.

    With scores ``q . k - slope * distance`` and ``|q . k| <= norm``, the softmax weight of a key at
    distance d is at most ``exp(2 norm - slope d)``, because the query's own key is in the sum. So
    with ``window = ceil((2 norm - log eps) / slope)`` every key at distance ``window`` or more
    weighs at most ``eps`` (Tang et al. 2024, arXiv:2407.15891, section 3.1). Give the windows to
    `RazorAttention.for_alibi`, per KV head the largest of its query heads.

    Args:
        slopes: Of the heads, above 0.
        norms: Largest ``|q . k|``, scale included, that each head can have. The paper bounds it by
            ``||W_q W_k||_2 (||gamma||^2 + ||beta||^2)``, with the weight and bias of the LayerNorm
            before the projections.
        eps: Above 0 and below 1.

    Raises:
        ValueError: A number is out of its range, or there are not as many norms as slopes.
    """
    if len(slopes) != len(norms):
        raise ValueError(
            f"adaptive: norms must be as many as slopes, {len(slopes)}, got {len(norms)}"
        )
    for name, values, rule, good in (
        ("slopes", slopes, "be above 0", [slope > 0 for slope in slopes]),
        ("norms", norms, "be 0 or more", [norm >= 0 for norm in norms]),
        ("eps", [eps], "be above 0 and below 1", [0 < eps < 1]),
    ):
        for value, fits in zip(values, good, strict=True):
            if not (math.isfinite(value) and fits):
                raise ValueError(f"adaptive: {name} must {rule}, got {value!r}")
    reach = [2 * norm - math.log(eps) for norm in norms]
    return tuple(math.ceil(far / slope) for far, slope in zip(reach, slopes, strict=True))
