"""Reads what users hand in as a batch: token ids, their mask, and which tokens to learn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""Label of a token that is not learned, as everywhere in PyTorch."""

KEYS = ("input_ids", "attention_mask", "labels", "position_ids")
LEAST_TOKENS = 2
_AXES = 2


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch on the model's device.

    Attributes:
        inputs: What the model is called with; "input_ids" is ``[batch, tokens]``.
        places: ``[learned]``, int64: positions in ``batch * tokens`` whose next token is learned.
        targets: ``[learned]``, int64: those next tokens.
    """

    inputs: dict[str, Tensor]
    places: Tensor
    targets: Tensor


def read_batch(given: Tensor | Mapping[str, Any], device: torch.device) -> Batch:
    """Check a batch and move it to ``device``.

    Without labels, every token is learned that the mask shows, if it shows the one before, too.

    Args:
        given: Token ids ``[batch, tokens]``, or a mapping with them as "input_ids" and, if wanted,
            "attention_mask", "labels" and "position_ids" of the same shape.
        device: Of the model's embeddings.

    Raises:
        TypeError: Not a tensor of whole numbers, nor a mapping with one.
        ValueError: A name is unknown, a shape does not fit, or nothing is left to be learned.
    """
    if not isinstance(given, Tensor | Mapping):
        raise TypeError(
            "adaptive: batches must hold tensors or mappings with 'input_ids', "
            f"got {type(given).__name__}"
        )
    fields = {"input_ids": given} if isinstance(given, Tensor) else dict(given)
    fields = {name: value for name, value in fields.items() if value is not None}
    unknown = sorted(map(str, fields.keys() - set(KEYS)))
    if unknown or "input_ids" not in fields:
        raise ValueError(
            f"adaptive: batches must hold 'input_ids' and may hold {', '.join(KEYS[1:])}, "
            f"got {', '.join(map(str, fields)) or 'nothing'}"
        )
    for name, value in fields.items():
        _check(name, value, fields["input_ids"])
    fields = {name: value.to(device, non_blocking=True) for name, value in fields.items()}
    labels = fields.pop("labels", None)
    asked = "labels must leave a token"
    if labels is None:
        asked = "attention_mask must leave a row of two tokens"
        labels = fields["input_ids"]
        mask = fields.get("attention_mask", torch.ones_like(labels)) != 0
        learned = mask[:, 1:] & mask[:, :-1]
    else:
        learned = labels[:, 1:] != IGNORED
    # The place before the token that is learned: of the last column nothing is predicted.
    places = functional.pad(learned, (0, 1)).flatten().nonzero().flatten()
    if not len(places):
        raise ValueError(f"adaptive: {asked} to be learned from, got none")
    return Batch(inputs=fields, places=places, targets=labels.flatten()[places + 1].long())


def read_batches(
    batches: Iterable[Tensor | Mapping[str, Any]], steps: int, device: torch.device
) -> Iterator[Batch]:
    """Yield ``steps`` batches, read when they are asked for."""
    for batch in each_batch(batches, steps):
        yield read_batch(batch, device)


def each_batch(batches: object, steps: int) -> Iterator[Any]:
    """Yield ``steps`` batches as they were given, when they are asked for.

    Raises:
        TypeError: They are not many batches.
        ValueError: There are too few.
    """
    given = _iterate(batches)
    for step in range(steps):
        try:
            yield next(given)
        except StopIteration:
            raise ValueError(
                f"adaptive: batches must hold as many as steps={steps}, got {step}: each was "
                "trained on, and no more"
            ) from None


def read_all(
    batches: Iterable[Tensor | Mapping[str, Any]], device: torch.device
) -> Iterator[Batch]:
    """Yield every batch, read when it is asked for; without one there is a ValueError."""
    none = True
    for batch in _iterate(batches):
        none = False
        yield read_batch(batch, device)
    if none:
        raise ValueError("adaptive: batches must hold a batch, got none")


def _iterate(batches: object) -> Iterator[Any]:
    if isinstance(batches, Tensor | Mapping) or not isinstance(batches, Iterable):
        raise TypeError(
            f"adaptive: batches must be an iterable of batches, got {type(batches).__name__}"
        )
    return iter(batches)


def _check(name: str, value: object, ids: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"adaptive: {name} must be a tensor, got {type(value).__name__}")
    if value.is_floating_point() and name != "attention_mask":
        raise TypeError(f"adaptive: {name} must hold whole numbers, got {value.dtype}")
    if name == "input_ids":
        if value.dim() != _AXES or not len(value) or value.shape[1] < LEAST_TOKENS:
            raise ValueError(
                "adaptive: input_ids must be [batch, tokens] with 1 row and 2 tokens or more, "
                f"got {list(value.shape)}"
            )
    elif isinstance(ids, Tensor) and value.shape != ids.shape:
        raise ValueError(
            f"adaptive: {name} must have the shape of input_ids {list(ids.shape)}, "
            f"got {list(value.shape)}"
        )
