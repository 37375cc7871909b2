"""The LM head at an exit: what it says of hidden states, computed as far as it is asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.layers.draft_head import runs_natively
from adaptive.layers.hf_linear import is_plain
from adaptive.ops import exit_confidence

Summary = tuple[Tensor, Tensor, Tensor, Tensor]
"""Best tokens, their logits, log-sum-exp and entropy, as `exit_confidence` gives them."""

Finish = tuple[Callable[[Tensor], Tensor], float, float]
"""What a model does to its head's logits, and that as `exit_confidence`'s scale and soft cap."""


class ExitHead:
    """A model's LM head with what the model does to its logits.

    Attributes:
        summarises: Whether the kernel may answer for logits that nobody else needs.
    """

    def __init__(self, head: nn.Linear, finish: Finish) -> None:
        """Know the head, whose weights are read anew in every call."""
        self.head = head
        self.summarises = False
        self._finish, self._scale, self._softcap = finish

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits of hidden states ``[rows, width]`` after its norm."""
        logits: Tensor = self.head(hidden[:, None])
        return self._finish(logits)[:, 0]

    def summary(self, hidden: Tensor) -> Summary | None:
        """What the kernel says of them; None where it does not run."""
        weight, bias = self.head.weight, self.head.bias
        if not self.summarises or not runs_natively(hidden, weight, bias):
            return None
        return exit_confidence(hidden, weight, bias, self._scale, self._softcap)


class Outlook:
    """What an exit says of the next token of some rows: logits, or hidden states and a head.

    A criterion that looks at hidden states costs no head at exits that are not taken, and one that
    looks at the distribution needs no logits written where the kernel runs.
    """

    def __init__(self, said: Tensor, head: ExitHead | None = None) -> None:
        """Know logits, ``[rows, vocabulary]``; with a head normed states, ``[rows, width]``."""
        self._said = said
        self._head = head

    def __len__(self) -> int:
        """Rows."""
        return len(self._said)

    @cached_property
    def logits(self) -> Tensor:
        """``[rows, vocabulary]``."""
        return self._said if self._head is None else self._head.logits(self._said)

    @cached_property
    def summary(self) -> Summary | None:
        """What the kernel says; None where logits are to be asked."""
        return None if self._head is None else self._head.summary(self._said)

    @cached_property
    def best(self) -> Tensor:
        """The token with the largest logit, ``[rows]``."""
        summary = self.summary
        return self.logits.float().argmax(-1) if summary is None else summary[0][:, 0]

    def sure(self, criterion: str) -> Tensor:
        """How sure it is by "confidence", "margin" or "entropy", ``[rows]``, float32."""
        if self.summary is None:
            return measure(criterion, self.logits)
        _, top, total, entropy = self.summary
        if criterion == "entropy":
            return entropy
        chances = (top - total[:, None]).exp()
        return chances[:, 0] if criterion == "confidence" else chances[:, 0] - chances[:, 1]


def measure(criterion: str, logits: Tensor) -> Tensor:
    """How sure logits ``[..., vocabulary]`` are: a number each, ``[...]``, in float32.

    Args:
        criterion: "confidence", "margin" or "entropy".
        logits: Of any floating dtype.
    """
    logits = logits.float()
    if criterion == "entropy":
        spread: Tensor = torch.special.entr(logits.softmax(-1)).sum(-1)
        return spread
    total = logits.logsumexp(-1)
    if criterion == "confidence":
        return (logits.amax(-1) - total).exp()
    best: Tensor = (logits.topk(2, -1).values - total[..., None]).exp()
    return best[..., 0] - best[..., 1]


class Watch:
    """What went through a model's base and head in its last pass; of the last token each."""

    hidden: Tensor | None = None
    entering: Tensor | None = None
    leaving: Tensor | None = None

    def __init__(self, model: nn.Module) -> None:
        """Know the model."""
        self.model = model

    @contextmanager
    def of(self, base: nn.Module) -> Iterator[None]:
        """Watch passes inside the block."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        if not is_plain(head) or type(head.weight) is not nn.Parameter:
            yield
            return

        def keep_hidden(_: nn.Module, __: Any, out: Any) -> None:
            hidden = getattr(out, "last_hidden_state", None)
            self.hidden = None if hidden is None else hidden[:, -1]

        def keep_logits(_: nn.Module, given: Any, out: Tensor) -> None:
            self.entering = given[0][:, -1] if given and given[0].dim() == 3 else None  # noqa: PLR2004
            self.leaving = out[:, -1].clone()  # what follows may write into it

        hooks = [
            base.register_forward_hook(keep_hidden),
            head.register_forward_hook(keep_logits),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def exit_head(self, logits: Tensor) -> ExitHead | None:
        """The head, if the model made these last logits of it and of what its base gave.

        Some models scale or cap logits, and some do more: then None.
        """
        if self.hidden is None or self.entering is None or self.leaving is None:
            return None
        if not torch.equal(self.hidden, self.entering):
            return None
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        for finish in _finishes(self.model.config):
            if torch.equal(finish[0](self.leaving), logits):
                return ExitHead(head, finish)
        return None


def _finishes(config: Any) -> Iterator[Finish]:
    """What the model may do to logits, by its configuration."""

    def number(name: str) -> float:
        value = getattr(config, name, None)
        return float(value) if isinstance(value, int | float) else 0.0

    yield (lambda x: x), 1.0, 0.0
    if cap := number("final_logit_softcapping"):
        yield (lambda x: torch.tanh(x / cap) * cap), 1.0, cap
    if divisor := number("logits_scaling"):
        yield (lambda x: x / divisor), 1.0 / divisor, 0.0
    if factor := number("logit_scale"):
        yield (lambda x: x * factor), factor, 0.0
