"""Sizes of the models of the zoo: frozen, checked on construction, and JSON on disk."""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from adaptive.ops.decode_attention import HEAD_DIM_STEP, MAX_HEAD_DIM, MIN_HEAD_DIM

if TYPE_CHECKING:
    from typing_extensions import Self

ROUTER_STEP = 8
"""Widths that the routers' kernel reads are multiples of this."""


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


@dataclass(frozen=True, kw_only=True)
class RecursiveTransformerConfig(DecoderSizes):
    """Sizes of a `RecursiveTransformer`.

    Args:
        block_layers: Layers of the block that is run again and again.
        recursions: The most times that a token runs it.
        first_layers: Layers of their own before the block; may be 0.
        last_layers: Layers of their own behind it; may be 0.
        router: Who decides how often a token runs the block. ``"expert"``: each recursion chooses
            among the tokens of the one before; ``"token"``: each token chooses its depth at the
            beginning; None: all run all recursions.
        kv: ``"recursion"``: each recursion has keys and values of the tokens that ran it;
            ``"shared"``: all attend to those of the first recursion.
        capacities: Share of the tokens of a sequence that runs each recursion, none larger than the
            one before; for router ``"expert"`` alone. None: 1, then evenly down to
            ``1 / recursions``. Where it is 1 all tokens of the recursion before go on.
        threshold: Where there is no sequence to choose from, as in decoding, a recursion of
            capacity below 1 takes the tokens whose router's sigmoid reaches this.
        weighted: The router's score weighs what the block computed, and so learns from the loss;
            otherwise the block's result stands for itself.
        alpha: Factor of those weights. None: 0.1 for ``"expert"``, 1 for ``"token"``.
        aux_loss: Factor of the loss that teaches the threshold (``"expert"``) or balances the
            depths (``"token"``).
        z_loss: Factor of the loss that keeps the router's logits small.
    """

    model_type: ClassVar[str] = "recursive_transformer"

    block_layers: int
    recursions: int
    first_layers: int = 1
    last_layers: int = 1
    router: str | None = "expert"
    kv: str = "recursion"
    capacities: tuple[float, ...] | None = None
    threshold: float = 0.5
    weighted: bool = True
    alpha: float | None = None
    aux_loss: float = 0.01
    z_loss: float = 0.001

    def __post_init__(self) -> None:
        """Fill in what was left open, and check the additional values, too."""
        super().__post_init__()
        for name in ("block_layers", "recursions"):
            self._check_count(name)
        for name in ("first_layers", "last_layers"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise self._refused(name, "be a whole number from 0 on", value)
        for name, known in (
            ("router", ("expert", "token", None)),
            ("kv", ("recursion", "shared")),
            ("weighted", (True, False)),
        ):
            value = getattr(self, name)
            if not any(value is each or (value == each and type(value) is str) for each in known):
                raise self._refused(name, f"be one of {known}", value)
        if self.router is not None and self.width % ROUTER_STEP:
            raise self._refused("width", f"be a multiple of {ROUTER_STEP} for a router", self.width)
        if self.alpha is None:
            object.__setattr__(self, "alpha", 1.0 if self.router == "token" else 0.1)
        for name in ("alpha", "aux_loss", "z_loss"):
            self._check_number(name, float("inf"))
        self._check_number("threshold", 1.0)
        self._check_capacities()

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of a sequence's tokens that each recursion takes at most."""
        return self.capacities or (1.0,) * self.recursions

    @property
    def factor(self) -> float:
        """Of the router's weights."""
        return 1.0 if self.alpha is None else self.alpha

    def _check_number(self, name: str, most: float) -> None:
        value = getattr(self, name)
        if type(value) not in (int, float) or not 0 <= value <= most or value == float("inf"):
            rule = f"be in [0, {most:g}]" if most < float("inf") else "be finite, from 0 on"
            raise self._refused(name, rule, value)

    def _check_capacities(self) -> None:
        if self.router != "expert":
            if self.capacities is not None:
                raise self._refused(
                    "capacities", f"be None for router={self.router!r}", self.capacities
                )
            return
        count, given = self.recursions, self.capacities
        if given is None:
            given = tuple((count - done) / count for done in range(count))
        right = isinstance(given, tuple | list) and len(given) == count
        if not right or not all(type(c) in (int, float) and 0 < c <= 1 for c in given):
            raise self._refused("capacities", f"be {count} numbers above 0 and at most 1", given)
        if any(later > earlier for earlier, later in itertools.pairwise(given)):
            raise self._refused("capacities", "not grow from one recursion to the next", given)
        object.__setattr__(self, "capacities", tuple(float(c) for c in given))
