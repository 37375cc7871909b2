"""The LM head of a draft: its best token and how sure it is, among all tokens or few."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptive.layers.torch_guard import why_not_plain
from adaptive.ops import exit_confidence
from adaptive.ops.skinny_linear import MAX_ROWS, supports


class DraftHead:
    """Applies a model's LM head to hidden states that its own norm has seen.

    What some families do to logits afterwards (Granite's scale, Gemma's soft cap) is left out: it
    does not change their order, and a draft may come from any distribution.

    Attributes:
        head: The model's own.
        tokens: The vocabulary's first tokens that are drafted; None: all. The weights are a view
            of the model's, so that fewer tokens cost less to read and nothing to keep.
    """

    def __init__(self, head: nn.Linear, tokens: int | None) -> None:
        """Know the head, whose weights are read anew in every call."""
        self.head = head
        self.tokens = tokens

    def best(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The most likely token of each row, ``[batch, 1]``, and its probability, ``[batch]``.

        Args:
            hidden: ``[batch, width]``.
        """
        weight, bias = self._parameters()
        if _runs_natively(hidden, weight, bias):
            tokens, top, lse, _ = exit_confidence(hidden, weight, bias)
            return tokens[:, :1], (top[:, 0] - lse).exp()
        scores = functional.linear(hidden, weight, bias).float()
        largest, token = scores.max(-1, keepdim=True)
        return token, (largest[:, 0] - scores.logsumexp(-1)).exp()

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the whole vocabulary, ``[batch, 1, vocabulary]``; -inf where not drafted."""
        weight, bias = self._parameters()
        scores = functional.linear(hidden, weight, bias)
        missing = len(self.head.weight) - len(weight)
        return functional.pad(scores, (0, missing), value=-torch.inf)[:, None]

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.head.weight, self.head.bias
        return weight[: self.tokens], None if bias is None else bias[: self.tokens]


def draft_head(model: nn.Module, tokens: int | None) -> DraftHead | None:
    """The draft head of a model; None if its head is no plain linear layer."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter
    return DraftHead(head, tokens) if plain else None


def _runs_natively(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        len(hidden) <= MAX_ROWS
        and hidden.dtype == weight.dtype
        and hidden.device.type in exit_confidence.native
        and supports(weight.shape[1], weight.dtype)
        and why_not_plain((hidden, weight, bias)) is None
    )
