"""What the models of the zoo share: losses, generation, files, and the report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.ops.decode_attention import DTYPES
from adaptive.zoo.config import DecoderSizes
from adaptive.zoo.run import Run, choose

if TYPE_CHECKING:
    from typing_extensions import Self

Prompts = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Report:
    """What a model is, and what its last generation held.

    Attributes:
        parameters: Numbers that training changes.
        kv_bytes_per_token: Of a row, at the model's dtype, in all layers with a KV cache.
        rows: Prompts of the last generation; 0 before one.
        new_tokens: That it returned, in all rows.
        kv_entries: Of each layer and row at its end, padding included.
        kv_bytes: The most that the KV entries of all rows and layers had.
    """

    parameters: int
    kv_bytes_per_token: float
    rows: int = 0
    new_tokens: int = 0
    kv_entries: int = 0
    kv_bytes: int = 0


class ZooModel(nn.Module, ABC):
    """A language model over token ids."""

    config_type: ClassVar[type[DecoderSizes]]
    block_length: int = 1

    def __init__(self, config: DecoderSizes) -> None:
        """Remember the sizes."""
        super().__init__()
        self.config = config
        self._last: dict[str, Any] = {}

    @abstractmethod
    def forward(self, ids: Tensor) -> Tensor:
        """Return logits ``[batch, tokens, vocab_size]``: at each token, of the next one."""

    @abstractmethod
    def _start(self, prompts: Sequence[Tensor], new_tokens: int, kv_dtype: torch.dtype) -> Run:
        """Run the prompts."""

    @property
    @abstractmethod
    def kv_layers(self) -> int:
        """Layers with a KV cache."""

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of KV cache for each token of a row, at the model's dtype."""
        entry = 2 * self.config.groups * self.config.head_width * self.dtype.itemsize
        return self.kv_layers * entry / self.block_length

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.parameters()).device

    def report(self) -> Report:
        """Return the sizes, and what the last ``generate`` held."""
        parameters = sum(p.numel() for p in self.parameters())
        return Report(parameters, self.kv_bytes_per_token, **self._last)

    def loss(self, ids: Tensor, labels: Tensor | None = None, **options: Any) -> Tensor:
        """Mean cross-entropy in nats of each next token.

        Args:
            ids: ``[batch, tokens]``, at least 2 tokens.
            labels: As ``ids``: what each token should have been; -100 does not count. None:
                ``ids``.
            options: For ``forward``.

        Raises:
            ValueError: A shape is wrong.
        """
        return self._cross_entropy(self(ids, **options), ids, labels)

    @staticmethod
    def _cross_entropy(logits: Tensor, ids: Tensor, labels: Tensor | None) -> Tensor:
        labels = ids if labels is None else labels
        if labels.shape != ids.shape or ids.shape[1] < 2:  # noqa: PLR2004
            raise ValueError(
                "adaptive::zoo: labels must have the shape of ids with at least 2 tokens, got "
                f"{list(labels.shape)} for {list(ids.shape)}"
            )
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())

    @torch.no_grad()
    def generate(
        self,
        ids: Prompts,
        max_new_tokens: int,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        eos_token_id: int | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Continue prompts, all at once.

        What a row gives does not depend on the others: neither their lengths, nor which of them
        have finished. Finished rows leave the batch at the end of their block.

        Args:
            ids: ``[batch, tokens]``, or one sequence of ids per row, of any lengths.
            max_new_tokens: For each row.
            do_sample: Draw from the softmax; otherwise the best token is taken.
            temperature: Divides the logits that are drawn from.
            generator: Of the draws; one number per row and token, finished rows included.
            eos_token_id: The token that ends a row.
            kv_dtype: In which keys and values are held; None: the model's.

        Returns:
            The new tokens of each row, int64, the one that ended it included.

        Raises:
            ValueError: No row, an empty row, or an option is out of range.
            TypeError: The ids are not whole numbers, or the model's dtype has no kernels.
            IndexError: An id is not in the vocabulary.
            NotImplementedError: torch.autocast is on.
        """
        prompts = self._prompts(ids)
        kv_dtype = kv_dtype or self.dtype
        self._check_options(max_new_tokens, temperature, eos_token_id, kv_dtype)
        rows, length = len(prompts), self.block_length
        run = self._start(prompts, max_new_tokens, kv_dtype)
        made = torch.zeros(rows, max_new_tokens, dtype=torch.int64, device=self.device)
        ends = torch.full((rows,), max_new_tokens, device=self.device)
        alive = torch.arange(rows, device=self.device)
        peak = run.kv_bytes
        for start in range(0, max_new_tokens, length):
            tokens: list[Tensor] = []
            stop = min(start + length, max_new_tokens)
            for _ in range(start, stop):
                logits = run.logits(tokens[-1] if tokens else None)
                draws = None
                if do_sample:
                    draws = torch.rand(rows, generator=generator, device=self.device)[alive]
                tokens.append(choose(logits, temperature if do_sample else None, draws))
            block = torch.stack(tokens, 1)
            made[alive, start:stop] = block
            hits = block == eos_token_id if eos_token_id is not None else None
            if hits is not None and bool(hits.any()):
                ended = hits.any(1)
                ends[alive[ended]] = start + 1 + hits[ended].int().argmax(1)
                left = (~ended).nonzero().flatten()
                if len(left) == 0:
                    break
                alive, block = alive[left], block[left]
                run.keep(left)
            if stop < max_new_tokens:
                run.advance(block)
                peak = max(peak, run.kv_bytes)
        self._last = {
            "rows": rows,
            "new_tokens": int(ends.sum()),
            "kv_entries": run.kv_entries,
            "kv_bytes": peak,
            **run.figures(),
        }
        return [row[:end] for row, end in zip(made, ends.tolist(), strict=True)]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``.

        Raises:
            ImportError: The package safetensors is missing.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save(folder / "config.json")
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save_pretrained` wrote, in eval mode, in the dtype that was saved.

        Raises:
            ValueError: The files do not describe a model of this class.
            ImportError: The package safetensors is missing.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        with torch.device("meta"):
            model = cls(cls.config_type.load(folder / "config.json"))
        tensors = load_file(folder / "model.safetensors")
        wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        wrong = sorted(
            name for name in wanted.keys() | found if wanted.get(name) != found.get(name)
        )
        if wrong:
            raise ValueError(
                f"adaptive::zoo: {wrong[0]} of model.safetensors must have shape "
                f"{_shape(wanted.get(wrong[0]))}, got {_shape(found.get(wrong[0]))}"
            )
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    def _check_options(
        self, max_new_tokens: int, temperature: float, eos: int | None, kv_dtype: torch.dtype
    ) -> None:
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise ValueError(
                f"adaptive::zoo: max_new_tokens must be a whole number from 1 on, "
                f"got {max_new_tokens!r}"
            )
        if not 0 < temperature < float("inf"):
            raise ValueError(
                f"adaptive::zoo: temperature must be above 0 and finite, got {temperature!r}"
            )
        if eos is not None and not 0 <= eos < self.config.vocab_size:
            limit = self.config.vocab_size
            raise ValueError(f"adaptive::zoo: eos_token_id must be in [0, {limit}), got {eos!r}")
        for name, dtype in (("the model's dtype", self.dtype), ("kv_dtype", kv_dtype)):
            if dtype not in DTYPES:
                raise TypeError(f"adaptive::zoo: {name} must be one of {DTYPES}, got {dtype}")
        if torch.is_autocast_enabled(self.device.type):
            raise NotImplementedError(
                "adaptive::zoo: generation cannot run under torch.autocast, whose dtypes differ "
                "within a layer: leave it, and take model.to(dtype) for another one"
            )

    def _prompts(self, ids: Prompts) -> list[Tensor]:
        if isinstance(ids, Tensor) and ids.dim() != 2:  # noqa: PLR2004
            raise ValueError(
                f"adaptive::zoo: ids must be [batch, tokens], got shape {list(ids.shape)}"
            )
        rows = [torch.as_tensor(row) for row in ids]
        if not rows:
            raise ValueError("adaptive::zoo: ids must have at least one row, got none")
        for number, row in enumerate(rows):
            if row.dim() != 1 or len(row) == 0:
                raise ValueError(
                    f"adaptive::zoo: ids[{number}] must hold at least one token, "
                    f"got shape {list(row.shape)}"
                )
            self._check_ids(row, f"ids[{number}]")
        return [row.to(self.device, torch.int64) for row in rows]

    def _check_batch(self, ids: Tensor) -> None:
        if not isinstance(ids, Tensor) or ids.dim() != 2 or 0 in ids.shape:  # noqa: PLR2004
            got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(
                f"adaptive::zoo: ids must be [batch, tokens] with at least one token, got {got}"
            )
        self._check_ids(ids)

    def _check_ids(self, ids: Tensor, name: str = "ids") -> None:
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"adaptive::zoo: {name} must be int32 or int64, got {ids.dtype}")
        least, most = (int(value) for value in ids.aminmax()) if ids.numel() else (0, 0)
        limit = self.config.vocab_size
        if least < 0 or most >= limit:
            wrong = least if least < 0 else most
            raise IndexError(f"adaptive::zoo: {name} must be in [0, {limit}), got {wrong}")


def _shape(found: torch.Size | None) -> object:
    return "none" if found is None else list(found)
