"""What exit_confidence is measured against: the LM head, then what says how sure it is."""

import torch
from torch import Tensor
from torch.nn import functional

from adaptive.ops import exit_confidence, skinny_linear
from bench.stock import Suite
from bench.stock_linear import linear_truth

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]

LLAMA_1B, SMOLLM_135M = (2048, 128256), (576, 49152)  # width, vocab
ROWS = (1, 4, 16)


def numbers(outputs: Outputs) -> Tensor:
    """``[rows, 4]``: all but the tokens, which 16-bit logits need not agree on."""
    _, top, lse, entropy = outputs
    return torch.cat([top, lse[:, None], entropy[:, None]], dim=1)


def summary(logits: Tensor) -> Outputs:
    """Each of the numbers by the function of PyTorch that is made for it."""
    top, tokens = logits.topk(2, dim=-1)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_share = torch.log_softmax(wide, dim=-1)
    entropy = -(log_share.exp() * log_share).sum(-1)
    return tokens, top, torch.logsumexp(wide, dim=-1), entropy


def separate(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *_: float) -> Tensor:
    """The head, topk, logsumexp, and the entropy from log_softmax."""
    return numbers(summary(functional.linear(hidden, weight, bias)))


def one_exp(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *_: float) -> Tensor:
    """The head and topk; the rest from one exponential of each logit."""
    logits = functional.linear(hidden, weight, bias)
    top, tokens = logits.topk(2, dim=-1)
    shifted = logits.float() - top[:, :1]
    shares = shifted.exp()
    total = shares.sum(-1)
    lse = top[:, 0] + total.log()
    mean = torch.linalg.vecdot(shares, shifted) / total
    return numbers((tokens, top, lse, total.log() - mean))


def without_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *_: float
) -> Tensor:
    """What a criterion by confidence or margin needs."""
    logits = functional.linear(hidden, weight, bias)
    top, lse = logits.topk(2, dim=-1).values, logits.float().logsumexp(dim=-1, keepdim=True)
    return torch.exp(top - lse)


def truth(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *_: float) -> Tensor:
    """The numbers in float64."""
    return numbers(summary(linear_truth(hidden, weight, bias)))


def head_alone(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *_: float) -> Tensor:
    """The logits: what reading the weight costs by itself."""
    return skinny_linear(hidden, weight, bias)


SUITES = {
    exit_confidence.name: Suite(
        forms={
            "F.linear + topk + logsumexp + entropy": separate,
            "F.linear + topk + one exp": one_exp,
        },
        truth=truth,
        sweep=[
            {"rows": rows, "width": width, "vocab": vocab}
            for rows in ROWS
            for width, vocab in ((LLAMA_1B, SMOLLM_135M) if rows == 1 else (LLAMA_1B,))
        ],
        cuda_sweep=[
            {"rows": rows, "width": width, "vocab": vocab}
            for rows in ROWS
            for width, vocab in (LLAMA_1B, SMOLLM_135M)
        ],
        beside={
            "skinny_linear alone": head_alone,
            "F.linear + topk + logsumexp": without_entropy,
        },
        moved_bytes=lambda hidden, weight, *_: hidden.nbytes + weight.nbytes,
        pick=numbers,
    ),
}
"""By name of the op."""
