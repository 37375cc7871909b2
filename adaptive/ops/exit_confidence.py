"""exit_confidence: how sure the LM head is of the next token, without writing its logits."""

from typing import Any

import torch
from torch import Tensor

from adaptive.ops._op import op
from adaptive.ops.skinny_linear import check_matrices, widened
from adaptive.ops.skinny_linear import make_inputs as linear_inputs

TOP = 2  # the largest logit, and the second for the margin


def make_inputs(  # noqa: PLR0913
    rows: int,
    width: int,
    vocab: int,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float = 0.0,
    group: int = 0,
    *,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Random arguments whose logits are of the order of 1, before ``scale``."""
    made = linear_inputs(rows, width, vocab, bias, group, dtype=dtype, device=device, seed=seed)
    hidden, weight, added, *scales = made
    return hidden, weight, added, scale, softcap, *scales


def outputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    weight_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised results for these arguments."""
    check_matrices("exit_confidence", hidden=hidden, weight=weight)
    rows, device = hidden.shape[0], hidden.device
    tokens = torch.empty((rows, TOP), dtype=torch.int64, device=device)
    top = torch.empty((rows, TOP), dtype=torch.float32, device=device)
    lse = torch.empty((rows,), dtype=torch.float32, device=device)
    return tokens, top, lse, torch.empty_like(lse)


@op(
    outputs=outputs,
    inputs=make_inputs,
    edges=[
        {"rows": 0, "width": 64, "vocab": 8},
        # no second token, one in a slice of its own, slices cut short, every kind of row tile
        {"rows": 2, "width": 32, "vocab": 1, "bias": True},
        {"rows": 1, "width": 32, "vocab": 2, "scale": -3.0},
        {"rows": 1, "width": 2048, "vocab": 129, "softcap": 2.0},
        {"rows": 2, "width": 40, "vocab": 128, "bias": True},
        {"rows": 3, "width": 1000, "vocab": 333, "scale": 20.0},
        {"rows": 7, "width": 72, "vocab": 517, "bias": True, "scale": 3.0, "softcap": 15.0},
        {"rows": 16, "width": 576, "vocab": 1026, "softcap": 30.0},
        {"rows": 1, "width": 64, "vocab": 129, "group": 64},
        {"rows": 3, "width": 256, "vocab": 333, "scale": 20.0, "group": 128},
        {"rows": 9, "width": 96, "vocab": 517, "bias": True, "softcap": 15.0, "group": 32},
    ],
    models=[
        # The heads of Llama-3.2-1B, Qwen2.5-0.5B, SmolLM2-135M
        {"rows": 1, "width": 2048, "vocab": 128256},
        {"rows": 1, "width": 896, "vocab": 151936},
        {"rows": 1, "width": 576, "vocab": 49152},
    ],
)
def exit_confidence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    weight_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summarise the softmax over the vocabulary of 0..16 rows, reading the LM head once.

    What the criteria of early exits are computed from: confidence ``exp(top[:, 0] - lse)``, margin
    ``exp(top[:, 0] - lse) - exp(top[:, 1] - lse)`` and entropy (Schuster et al. 2022, CALM,
    arXiv:2207.07061).

    Args:
        hidden: ``[rows, width]``, float32, float16 or bfloat16; at most 16 rows; width a multiple
            of 8, at least 32; any stride between rows. As the head gets it, after the norm.
        weight: ``[vocab, width]``, dtype of ``hidden``, or int8 with ``weight_scales``; any stride
            between rows; vocab at least 1.
        bias: ``[vocab]``, dtype of ``hidden``, contiguous. None: none is added.
        scale: Factor on the logits.
        softcap: Logits become ``softcap * tanh(logits / softcap)`` after ``scale``; 0: not.
        weight_scales: Of int8 weights, as in `skinny_linear`. None: nothing.

    Returns:
        ``(tokens, top, lse, entropy)``, of logits in float32 that are not rounded to the dtype of
        ``hidden``. ``tokens``: ``[rows, 2]``, int64, those of the largest logit and of the second;
        of equals the lower comes first. ``top``: ``[rows, 2]``, float32, their logits; with a
        vocabulary of one the second is token -1 with -inf. ``lse``: ``[rows]``, float32, the
        log-sum-exp of all logits. ``entropy``: ``[rows]``, float32, of the softmax, in nats.

        A row's results depend on that row alone. NaN ranks above all numbers, as in
        ``torch.argmax``, and makes ``lse`` and ``entropy`` NaN. A logit of -inf counts nothing; if
        all are, or one is inf, ``lse`` is that infinity and ``entropy`` NaN.

    Raises:
        ValueError: A shape, device, memory layout or option is wrong.
        TypeError: An argument is no tensor or no number, or its dtype is wrong.
        NotImplementedError: An argument requires a gradient; the device has no kernel.
    """
    logits = hidden.float() @ widened(weight, weight_scales).T
    if bias is not None:
        logits = logits + bias.float()
    logits = logits * scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    ranked = torch.sort(logits, dim=-1, descending=True, stable=True)
    missing = (0, max(0, TOP - weight.shape[0]))
    tokens = torch.nn.functional.pad(ranked.indices[:, :TOP], missing, value=-1)
    top = torch.nn.functional.pad(ranked.values[:, :TOP], missing, value=-torch.inf)
    entropy = torch.special.entr(torch.softmax(logits, -1)).sum(-1)
    return tokens.contiguous(), top.contiguous(), torch.logsumexp(logits, -1), entropy
