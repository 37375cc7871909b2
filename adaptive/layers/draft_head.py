"""The LM head of a draft: its best token and how sure it is; of fewer tokens, or in 8 bits."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptive.layers.head_copy import HeadCopy, can_copy
from adaptive.layers.torch_guard import why_not_plain
from adaptive.ops import exit_confidence, skinny_linear
from adaptive.ops.skinny_linear import MAX_ROWS, supports


class DraftHead:
    """Applies a model's LM head to hidden states that its own norm has seen.

    What some families do to logits afterwards (Granite's scale, Gemma's soft cap) is left out: it
    does not change their order, and a draft may come from any distribution.

    Attributes:
        head: The model's own.
        tokens: The vocabulary's first tokens that are drafted; None: all. The weights are a view
            of the model's, so that fewer tokens cost less to read and nothing to keep.
        copy: Where their int8 form is kept, which kernels read instead; None: they do not.
    """

    def __init__(self, head: nn.Linear, tokens: int | None, copy: HeadCopy | None = None) -> None:
        """Know the head, whose weights are read anew in every call, or once for the copy."""
        self.head = head
        self.tokens = tokens
        self.copy = copy
        self._quantized: tuple[Tensor, Tensor] | None = None

    @property
    def reduced(self) -> bool:
        """Whether drafts are made by less than the model's head."""
        return self.tokens is not None or self.copy is not None

    @property
    def held_bytes(self) -> int:
        """What the copy takes that drafts were made with; 0 without one."""
        return self.copy.held_bytes if self.copy is not None and self._quantized else 0

    def best(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The most likely token of each row, ``[batch, 1]``, and its probability, ``[batch]``.

        Args:
            hidden: ``[batch, width]``.
        """
        weight, bias = self._parameters()
        if runs_natively(hidden, weight, bias):
            weight, scales = self._quantize(weight)
            tokens, top, lse, _ = exit_confidence(hidden, weight, bias, weight_scales=scales)
            return tokens[:, :1], (top[:, 0] - lse).exp()
        scores = functional.linear(hidden, weight, bias).float()
        largest, token = scores.max(-1, keepdim=True)
        return token, (largest[:, 0] - scores.logsumexp(-1)).exp()

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the whole vocabulary, ``[batch, 1, vocabulary]``; -inf where not drafted."""
        weight, bias = self._parameters()
        if runs_natively(hidden, weight, bias):
            read, scales = self._quantize(weight)
            scores = skinny_linear(hidden, read, bias, scales)
        else:
            scores = functional.linear(hidden, weight, bias)
        missing = len(self.head.weight) - len(weight)
        return functional.pad(scores, (0, missing), value=-torch.inf)[:, None]

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.head.weight, self.head.bias
        return weight[: self.tokens], None if bias is None else bias[: self.tokens]

    def _quantize(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight that a kernel reads, and its factors."""
        if self.copy is None or not can_copy(weight.shape[1]):
            return weight, None
        if self._quantized is None:  # looked at once per call of generate
            self._quantized = self.copy.of(weight)
        return self._quantized


def draft_head(
    model: nn.Module, tokens: int | None, copy: HeadCopy | None = None
) -> DraftHead | None:
    """The draft head of a model; None if its head is no plain linear layer."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter
    return DraftHead(head, tokens, copy) if plain else None


def runs_natively(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `exit_confidence` takes these."""
    return (
        len(hidden) <= MAX_ROWS
        and hidden.dtype == weight.dtype
        and hidden.device.type in exit_confidence.native
        and supports(weight.shape[1], weight.dtype)
        and why_not_plain((hidden, weight, bias)) is None
    )
