"""Sizes of the models of the zoo: frozen, checked on construction, and JSON on disk."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from adaptive.ops.decode_attention import HEAD_DIM_STEP, MAX_HEAD_DIM, MIN_HEAD_DIM

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class DecoderSizes:
    """What the decoders of a model share.

    Args:
        vocab_size: Token ids are below it.
        width: Of the residual stream.
        heads: Query heads.
        kv_heads: Key and value heads, a divisor of ``heads``; None: ``heads``.
        head_dim: None: ``width / heads``; in 32..256, a multiple of 8.
        hidden_width: Inner width of the SwiGLU layers; None: 8/3 of ``width``, up to the next
            multiple of 32.
        rope_theta: Base of the rotary positions.
        norm_eps: Added to the mean square in RMSNorm.

    Raises:
        ValueError: A number is out of range; the message names it.
    """

    model_type: ClassVar[str] = ""

    vocab_size: int
    width: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    hidden_width: int | None = None
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        """Fill in what was left open, and check."""
        for name in ("vocab_size", "width", "heads"):
            self._check_count(name)
        if self.head_dim is None and self.width % self.heads:
            raise self._refused("heads", f"divide width={self.width}", self.heads)
        usual = {
            "kv_heads": self.heads,
            "head_dim": self.width // self.heads,
            "hidden_width": -(-8 * self.width // 96) * 32,
        }
        for name in usual:
            if getattr(self, name) is None:
                object.__setattr__(self, name, usual[name])
        for name in ("kv_heads", "head_dim", "hidden_width"):
            self._check_count(name)
        if self.heads % self.groups:
            raise self._refused("kv_heads", f"divide heads={self.heads}", self.kv_heads)
        if not MIN_HEAD_DIM <= self.head_width <= MAX_HEAD_DIM or self.head_width % HEAD_DIM_STEP:
            rule = f"be a multiple of {HEAD_DIM_STEP} in {MIN_HEAD_DIM}..{MAX_HEAD_DIM}"
            raise self._refused("head_dim", rule, self.head_dim)
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise self._refused(name, "be a positive number", value)

    @property
    def groups(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        """Elements of one head."""
        return self.head_dim or self.width // self.heads

    @property
    def inner_width(self) -> int:
        """Inner width of the SwiGLU layers."""
        return self.hidden_width or self.width

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        if type(value) is not int or value < 1:
            raise self._refused(name, "be a whole number from 1 on", value)

    def _refused(self, name: str, rule: str, value: object) -> ValueError:
        return ValueError(f"adaptive::zoo: {name} must {rule}, got {value!r}")

    def save(self, path: Path) -> None:
        """Write JSON."""
        values = {"model_type": self.model_type, **dataclasses.asdict(self)}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: It is not JSON of this kind of model, or holds unknown or missing fields.
        """
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        kind = values.pop("model_type", None) if isinstance(values, dict) else None
        if kind != cls.model_type:
            raise ValueError(
                f"adaptive::zoo: model_type of {path.name} must be {cls.model_type!r}, got {kind!r}"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != names:
            raise ValueError(
                f"adaptive::zoo: fields of {path.name} must be {sorted(names)}, "
                f"got {sorted(values)}"
            )
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class BlockTransformerConfig(DecoderSizes):
    """Sizes of a `BlockTransformer`.

    Args:
        block_layers: Layers of the decoder over blocks.
        token_layers: Layers of the decoder over the tokens of one block.
        block_length: Tokens of a block; it divides ``width``.
        prefix_length: Vectors through which a block's tokens see what came before.
    """

    model_type: ClassVar[str] = "block_transformer"

    block_layers: int
    token_layers: int
    block_length: int = 4
    prefix_length: int = 2

    def __post_init__(self) -> None:
        """Check the additional numbers, too."""
        super().__post_init__()
        for name in ("block_layers", "token_layers", "block_length", "prefix_length"):
            self._check_count(name)
        if self.width % self.block_length:
            raise self._refused("block_length", f"divide width={self.width}", self.block_length)


@dataclass(frozen=True, kw_only=True)
class VanillaTransformerConfig(DecoderSizes):
    """Sizes of a `VanillaTransformer`.

    Args:
        layers: Layers of the decoder.
    """

    model_type: ClassVar[str] = "vanilla_transformer"

    layers: int

    def __post_init__(self) -> None:
        """Check the additional number, too."""
        super().__post_init__()
        self._check_count("layers")
