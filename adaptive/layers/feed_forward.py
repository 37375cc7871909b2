"""The FFN of a layer, whatever its family calls its parts: gate, up, activation, down."""

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.errors import PatchConflict
from adaptive.layers.changes import ChangeLog
from adaptive.layers.ffn_parts import SECOND, Parts, parts_of
from adaptive.layers.hf_linear import fast_linear, is_plain, is_watched
from adaptive.layers.survey import Survey
from adaptive.layers.switch import Switch


class FeedForward:
    """One FFN of a model: ``down(activation(gate(x)) * up(x))``, or ``down(activation(up(x)))``.

    Modules are held weakly, for the reasons of `hf_linear.LinearForward`, and their parts read anew
    whenever they are asked for.

    Where two modules are one FFN, as in BERT, the second also adds the layer's input and norms it.
    A forward that runs a part of the neurons then takes the place of its linear layer, and the
    first module hands on what it gets (`HandOn`): what stands around is the model's own code.
    """

    def __init__(
        self,
        parts: Parts,
        module: nn.Module,
        second: nn.Module | None = None,
        seat: nn.Module | None = None,
    ) -> None:
        """Know the modules.

        Args:
            parts: What they call their parts.
            module: The FFN, or the first of two modules.
            second: The other.
            seat: Whose forward is replaced: the linear layer of the second; None: the FFN.
        """
        self.parts = parts
        self._module = weakref.ref(module)
        self._second = None if second is None else weakref.ref(second)
        self._seat = self._module if seat is None else weakref.ref(seat)

    def __getstate__(self) -> tuple[Any, ...]:
        """Let copies and pickles arrive with the copies of the modules."""
        second = None if self._second is None else self._second()
        return self.parts, self._module(), second, None if second is None else self._seat()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    @property
    def complete(self) -> bool:
        """Whether all of it is there: not where someone copied a part of a layer alone."""
        return self._module() is not None and (self._second is None or self._second() is not None)

    @property
    def module(self) -> Any:
        """The module, or the first of the two."""
        return self._module()

    @property
    def down(self) -> Any:
        """The linear layer from the neurons."""
        return self._seat() if self.parts.halves else getattr(self.module, self.parts.down)

    @property
    def linears(self) -> tuple[Any, ...]:
        """The linear layers: of the gate, if it has one of its own, up and down."""
        module, parts = self.module, self.parts
        first = () if parts.gate is None else (getattr(module, parts.gate),)
        return (*first, getattr(module, parts.up), self.down)

    @property
    def neurons(self) -> int:
        """How many there are."""
        return int(self.down.weight.shape[1])

    @property
    def width(self) -> int:
        """Of the states that it reads."""
        return int(self.linears[0].weight.shape[1])

    @property
    def weights(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Of gate, up and down: ``[neurons, width]`` twice, or None, and ``[width, neurons]``."""
        gate, up = self._pair("weight")
        assert up is not None
        return gate, up, self.down.weight

    @property
    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of gate, up and down."""
        return *self._pair("bias"), self.down.bias

    @property
    def scored(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of what the activation function reads."""
        (gate, up, _), (gate_bias, up_bias, _) = self.weights, self.biases
        return (up, up_bias) if gate is None else (gate, gate_bias)

    def _pair(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        *gate, up, _ = (getattr(linear, name) for linear in self.linears)
        if self.parts.fused:
            return (None, None) if up is None else up.chunk(2)
        return (gate[0] if gate else None), up

    @property
    def native(self) -> bool:
        """Whether products with parts of its weights are to be ours, as those with all of them."""
        linears = self.linears[:-1] if self.parts.halves else self.linears  # the last is the seat
        native = all("forward" in linear.__dict__ for linear in linears)
        return native and not torch.compiler.is_compiling()

    @property
    def drops(self) -> bool:
        """Whether two calls could differ by what drops out."""
        names = self.parts.drop, self.parts.drop_last
        return any(name and getattr(self.module, name).training for name in names)

    def activation(self, states: Tensor) -> Tensor:
        """The activation function; what drops out of the neurons drops out of it."""
        made: Tensor = getattr(self.module, self.parts.activation)(states)
        drop = self.parts.drop
        return made if drop is None else getattr(self.module, drop)(made)

    def hidden(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """What the last projection reads, of what the first ones made."""
        return self.activation(up) if gate is None else self.activation(gate) * up

    def hidden_of(self, x: Tensor) -> Tensor:
        """What the last projection reads of states."""
        *gate, up = (linear(x) for linear in self.linears[:-1])
        if self.parts.fused:
            return self.hidden(*up.chunk(2, -1))
        return self.hidden(gate[0] if gate else None, up)

    def finish(self, made: Tensor) -> Tensor:
        """What the FFN does after its last projection."""
        drop = self.parts.drop_last
        return made if drop is None else getattr(self.module, drop)(made)

    def dense(self, x: Tensor) -> Tensor:
        """What the FFN makes of states as it stands."""
        hidden: Tensor = type(self.module).forward(self.module, x)
        if not self.parts.halves:
            return hidden
        down = self.down
        made = fast_linear(hidden, down.weight, down.bias) if self.native else None
        return F.linear(hidden, down.weight, down.bias) if made is None else made

    def stock(self, x: Tensor) -> Tensor:
        """What the module would do whose forward is replaced."""
        seat = self._seat()
        return type(seat).forward(seat, x)  # type: ignore[union-attr, no-any-return]

    def check(self, policy: str) -> None:
        """Look whether parts may still be read.

        Raises:
            PatchConflict: Someone wrapped or watches one, or put another in its place.
        """
        wrong = self._wrapped()
        if wrong is not None:
            raise PatchConflict(
                f"adaptive: {policy} reads parts of {wrong!r}, which someone wrapped or hooked "
                "since patch(); unpatch() first"
            )

    def _wrapped(self) -> str | None:
        """Name of the first part that is not as it was found."""
        parts, linears = self.parts, [*self.linears]
        names = (parts.up, parts.down) if parts.gate is None else (parts.gate, parts.up, parts.down)
        if parts.halves:
            seat = linears.pop()
            second = self._second() if self._second is not None else None
            if is_watched(seat) or getattr(second, parts.down) is not seat:
                return f"{SECOND}.{parts.down}"
            if is_watched(self.module):
                return type(self.module).__name__
        plain = [is_plain(linear) for linear in linears]
        return None if all(plain) else names[plain.index(False)]

    def replace(
        self, root: nn.Module, name: str, log: ChangeLog, forward: Any, switch: Switch
    ) -> None:
        """Let ``forward`` answer for the FFN called ``name``, undoably."""
        if not self.parts.halves:
            log.set(root, name, "forward", forward)
            return
        log.set(root, f"{_beside(name)}.{self.parts.down}", "forward", forward)
        log.set(root, name, "forward", HandOn(self, switch))


class HandOn:
    """The forward of the first of two modules, set on the instance: the second runs the FFN."""

    def __init__(self, ffn: FeedForward, switch: Switch) -> None:
        """Know the FFN and the patch's switch."""
        self.ffn, self.switch = ffn, switch

    def __call__(self, x: Tensor) -> Tensor:
        """Return what came, or what the module makes of it where nobody takes it up."""
        ffn = self.ffn
        if self.switch.on and ffn.complete:
            ffn.check("a policy for FFNs")  # or something else would get states for neurons
            return x
        return type(ffn.module).forward(ffn.module, x)  # type: ignore[no-any-return]


def feed_forward(root: nn.Module, survey: Survey, layer: int) -> FeedForward | str:
    """The layer's FFN, or why it is none of which a part can run."""
    return ffn_at(root, ffn_name(survey, layer), layer)


def ffn_at(root: nn.Module, name: str | None, layer: int) -> FeedForward | str:
    """The FFN that begins with the module called ``name``, or why it is none to run a part of."""
    module: Any = None if name is None else root.get_submodule(name)
    second = holder = None
    if name is not None:
        holder = root.get_submodule(name.rpartition(".")[0])
        second = getattr(holder, SECOND, None)
    parts = parts_of(module, second, holder)
    if parts is None:
        kind = "no FFN" if module is None else f"an FFN, {type(module).__name__},"
        return (
            f"layer {layer} has {kind} that is no down(act(gate(x)) * up(x)) or down(act(up(x))) "
            "of plain linear layers"
        )
    if not parts.halves:
        return FeedForward(parts, module)
    assert second is not None  # parts_of found the half in it
    return FeedForward(parts, module, second, getattr(second, parts.down))


def ffn_name(survey: Survey, layer: int) -> str | None:
    """Dotted name of the FFN of a layer; None if it has none that is known."""
    start = survey.layers[layer] + "."
    return next((name for name in survey.mlps if name.startswith(start)), None)


def _beside(name: str) -> str:
    """The other module of the two that are one FFN."""
    return ".".join((*name.split(".")[:-1], SECOND))
