"""FFNs whose routers learn, in decoders and encoders: where they are, and the loss of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.adapters import EncoderFamily
from adaptive.errors import UnsupportedModel
from adaptive.layers.changes import ChangeLog
from adaptive.layers.feed_forward import FeedForward, ffn_at
from adaptive.layers.pooling import pool_weights
from adaptive.layers.switch import Switch
from adaptive.train._batch import each_batch, read_batch
from adaptive.train._checks import any_model
from adaptive.train._learning import check_last, next_token_loss, still

Forwards = Mapping[int, Callable[[Tensor], Tensor]]
"""What runs in the place of the FFNs of layers while their routers learn."""


@dataclass(frozen=True, kw_only=True)
class Ffns:
    """The FFNs of a model that stands still, and what their routers learn from.

    Attributes:
        root: The model.
        total: Its layers.
        names: Of its FFNs, or of their first modules, by layer; None: it has none that is known.
        base: Name of the module that holds an encoder's layers; None: it is a causal LM.
    """

    root: nn.Module
    total: int
    names: tuple[str | None, ...]
    base: str | None

    @staticmethod
    def of(model: nn.Module) -> Ffns:
        """Find them.

        Raises:
            TypeError, UnknownFamily, UnsupportedModel, PatchConflict: As `any_model`.
        """
        root, family, total = any_model(model)
        mlps = family.mlp_names(root)
        starts = [f"{name}." for name in family.layer_names(root)]
        names = tuple(next((n for n in mlps if n.startswith(start)), None) for start in starts)
        base = family.base_name(root) if isinstance(family, EncoderFamily) else None
        return Ffns(root=root, total=total, names=names, base=base)

    def at(self, layers: Sequence[int]) -> dict[int, FeedForward]:
        """The FFNs of these layers, ascending.

        Raises:
            ValueError: The model has fewer layers.
            UnsupportedModel: One has no FFN of which a part can run.
        """
        check_last(layers[-1], self.total)
        found = {}
        for layer in layers:
            ffn = ffn_at(self.root, self.names[layer], layer)
            if isinstance(ffn, str):
                raise UnsupportedModel(f"adaptive: {ffn}")
            found[layer] = ffn
        return found

    def read(
        self, batches: Iterable[Any], steps: int, device: torch.device
    ) -> Iterator[tuple[Any, Tensor | None]]:
        """Yield ``steps`` batches for `loss`, each with its mask of what is no padding, or None.

        Raises:
            TypeError, ValueError: One does not fit the model, or there are too few.
        """
        for given in each_batch(batches, steps):
            if self.base is None:
                batch = read_batch(given, device)
                yield batch, batch.inputs.get("attention_mask")
            else:
                inputs = _inputs(given, self.root, self.base, device)
                yield inputs, inputs.get("attention_mask")

    def loss(self, batch: Any, ffns: Mapping[int, FeedForward], forwards: Forwards) -> Tensor:
        """What the routers learn from of one batch, with ``forwards`` for the FFNs.

        Of a causal LM the cross entropy of the next token, in nats; of an encoder its own loss if
        the batch has labels, else how far its last hidden states are off those of the whole FFNs.
        """
        if self.base is None:
            with self._running(ffns, forwards):
                return next_token_loss(self.root, batch)
        if "labels" in batch:
            with self._running(ffns, forwards):
                loss: Tensor = self.root(**batch).loss
                return loss
        encoder = self.root.get_submodule(self.base)
        with still(self.root, {}), torch.no_grad():
            wanted = encoder(**batch)[0]
        with self._running(ffns, forwards):
            made = encoder(**batch)[0]
        return distance(made, wanted, batch.get("attention_mask"))

    @contextmanager
    def _running(self, ffns: Mapping[int, FeedForward], forwards: Forwards) -> Iterator[None]:
        """Let ``forwards`` answer for the FFNs inside the block; the model stands still."""
        log = ChangeLog()
        with still(self.root, {}), torch.enable_grad():
            try:
                for layer, ffn in ffns.items():
                    name = self.names[layer]
                    assert name is not None  # or there would be no FFN
                    ffn.replace(self.root, name, log, forwards[layer], Switch())
                yield
            finally:
                log.undo(self.root)


def distance(made: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor:
    """Squared error over squared norm of ``wanted``, the mean of what is no padding; float32.

    Args:
        made: ``[batch, tokens, width]``.
        wanted: Likewise.
        mask: ``[batch, tokens]``, 0 for padding; None: there is none.
    """
    weights = pool_weights(wanted, mask, "mean")
    wanted = wanted.float()
    off = (made.float() - wanted).square().sum(-1)
    size = wanted.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (weights * off / size).sum() / weights.sum()


def _inputs(given: Any, root: Any, base: str, device: torch.device) -> dict[str, Any]:
    """What an encoder is called with, on ``device``.

    Raises:
        TypeError: Not a tensor or mapping, or an input is no tensor.
        ValueError: A name is unknown or missing, or there is no row or token.
    """
    main = root.main_input_name
    if not isinstance(given, Tensor | Mapping):
        kind = type(given).__name__
        raise TypeError(
            f"adaptive: batches must hold tensors or mappings with {main!r}, got {kind}"
        )
    fields = {main: given} if isinstance(given, Tensor) else dict(given)
    fields = {name: value for name, value in fields.items() if value is not None}
    known = {*inspect.signature(root.get_submodule(base).forward).parameters} - {"kwargs"}
    known |= {"labels"} & {*inspect.signature(root.forward).parameters}
    unknown = sorted(map(str, fields.keys() - known))
    if unknown or main not in fields:
        raise ValueError(
            f"adaptive: batches for {type(root).__name__} must hold {main!r} and may hold "
            f"{', '.join(sorted(known - {main}))}, got {', '.join(map(str, fields)) or 'nothing'}"
        )
    for name, value in fields.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TypeError(f"adaptive: {name} must be a tensor, got {kind}")
    shape = list(fields[main].shape)
    if not fields[main].numel():
        raise ValueError(f"adaptive: {main} must hold 1 row and 1 token or more, got {shape}")
    mask = fields.get("attention_mask")
    if mask is not None and not bool((mask != 0).any()):
        raise ValueError("adaptive: attention_mask must show a token, got none")
    return {name: value.to(device, non_blocking=True) for name, value in fields.items()}
