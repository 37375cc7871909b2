"""router_scores: one score for each token, from its hidden state by a linear router."""

from typing import Any

import torch
from torch import Tensor

from adaptive.ops._op import op
from adaptive.ops._router_gradient import backward, setup_context


def make_inputs(  # noqa: PLR0913
    batch: int,
    tokens: int,
    width: int,
    norm: bool = False,
    eps: float = 1e-6,
    function: str = "sigmoid",
    *,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Random arguments whose logits are of the order of 1."""
    rng = torch.Generator().manual_seed(seed)
    routes = 2 if function == "softmax" else 1
    hidden = torch.randn(batch, tokens, width, generator=rng)
    weight = torch.randn(routes, width, generator=rng) * width**-0.5
    made = [hidden, weight, torch.rand(width, generator=rng) + 0.5 if norm else None]
    return *(t if t is None else t.to(device, dtype) for t in made), eps, function


def outputs(
    hidden: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    function: str = "sigmoid",
) -> Tensor:
    """Uninitialised scores for these arguments."""
    if hidden.dim() != 3:  # noqa: PLR2004
        raise ValueError(
            "adaptive::router_scores: hidden must have 3 dimensions, "
            f"got shape {list(hidden.shape)}"
        )
    return torch.empty(hidden.shape[:2], dtype=torch.float32, device=hidden.device)


@op(
    outputs=outputs,
    inputs=make_inputs,
    edges=[
        {"batch": 0, "tokens": 3, "width": 64},
        {"batch": 2, "tokens": 0, "width": 64},
        # one vector, less than one, several and a rest; an odd number of tokens
        {"batch": 1, "tokens": 1, "width": 8, "norm": True},
        {"batch": 1, "tokens": 3, "width": 32, "function": "identity"},
        {"batch": 3, "tokens": 7, "width": 72, "norm": True, "function": "softmax"},
        {"batch": 2, "tokens": 5, "width": 1000, "function": "softmax"},
        {"batch": 2, "tokens": 40, "width": 2048, "norm": True, "eps": 1e-2},
        {"batch": 1, "tokens": 9, "width": 4104, "norm": True, "function": "identity"},
    ],
    models=[
        # Routers of MindSkip and of gamma-MoD, on Llama-3.2-1B
        {"batch": 1, "tokens": 2048, "width": 2048, "norm": True},
        {"batch": 1, "tokens": 2048, "width": 2048, "norm": True, "function": "softmax"},
        {"batch": 8, "tokens": 1, "width": 2048, "norm": True},
    ],
    gradient=(setup_context, backward),
)
def router_scores(
    hidden: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    function: str = "sigmoid",
) -> Tensor:
    """Score every token by a linear router, reading the hidden states once, the norm included.

    What ``route_tokens`` decides by. A router of one output with a sigmoid is that of Router-Tuning
    (He et al. 2024, arXiv:2410.13184), of two with a softmax that of gamma-MoD (Luo et al. 2024,
    arXiv:2410.13859), of one without either that of Mixture-of-Depths (Raposo et al. 2024,
    arXiv:2404.02258).

    Args:
        hidden: ``[batch, tokens, width]``, float32, float16 or bfloat16, any strides but the last;
            width a multiple of 8.
        weight: The router, ``[1, width]``, or ``[2, width]`` for softmax, dtype of ``hidden``, any
            stride between rows.
        norm_weight: Weight of an RMSNorm before the router, ``[width]``, dtype of ``hidden``. None:
            no norm.
        eps: Added to the mean of squares in the norm, at least 0.
        function: ``sigmoid`` or ``identity`` of the logit, or the last share of the ``softmax`` of
            two.

    Returns:
        ``[batch, tokens]``, float32. Sums are float32, and nothing is rounded to the dtype of
        ``hidden`` on the way, the norm's result neither. A token's score depends on that token
        alone. Differentiable in ``hidden``, ``weight`` and ``norm_weight``.

    Raises:
        ValueError: A shape, device, memory layout or option is wrong.
        TypeError: An argument is no tensor or no number, or its dtype is wrong.
        NotImplementedError: The device has no kernel.
    """
    x = hidden.float()
    if norm_weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_weight.float()
    logits = x @ weight.float().T
    if function == "softmax":
        return torch.softmax(logits, -1)[..., 1].contiguous()
    return logits[..., 0].sigmoid() if function == "sigmoid" else logits[..., 0].contiguous()
