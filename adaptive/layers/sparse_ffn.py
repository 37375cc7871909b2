"""Gated FFNs whose gate leaves most neurons at 0: in decoding only the others are computed.

Gemma 3n sets all but the largest 5 % of its gate to 0 in the first layers (by the mean and the
deviation of the gate, a number that varies), and then multiplies with every row of the other two
projections. Rows of zeros add nothing, so leaving them out is the same mathematics.
"""

import weakref
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.layers.changes import ChangeLog
from adaptive.layers.fingerprint import source_of
from adaptive.ops.sparse_row_ffn import sparse_row_ffn

_MIB = 1 << 20


@dataclass(kw_only=True)
class SparseFfnLog:
    """What FFNs of few active neurons did since the counters were reset.

    Attributes:
        layers: FFNs that may leave neurons out.
        calls: Calls that did, of all layers; the others ran the model's own code.
        neurons: In these calls, neurons that a dense FFN would have computed.
        active: Of those, neurons that some row of the call needed, whose weights were read.
        copied_bytes: Held now for copies of down projections, transposed.
    """

    layers: int
    calls: int = 0
    neurons: int = 0
    active: int = 0
    copied_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Return one line for people."""
        share = f", {self.active / self.neurons:.1%} of the neurons" if self.neurons else ""
        held = f"{self.copied_bytes / _MIB:.1f} MiB of transposed weights held"
        return f"sparse FFN, {self.layers} layers: {self.calls} calls{share}; {held}"


class TransposedCopy:
    """A weight, transposed, made when first asked for and again when the weight is another one.

    It follows what replaces the weight's memory and what writes to it through PyTorch's operators;
    of what writes past them (``weight.data``, NumPy) only what a sample of the values shows.
    """

    def __init__(self) -> None:
        """Hold nothing."""
        self._source: Any = None
        self._held: Tensor | None = None

    def of(self, weight: Tensor) -> Tensor:
        """The weight, ``[out, in]``, as ``[in, out]``, contiguous."""
        source = source_of(weight)
        if self._held is None or source != self._source:
            self._held = None  # before there are two
            self._held = weight.detach().t().contiguous()
            self._source = source
        return self._held

    @property
    def held_bytes(self) -> int:
        """Bytes of the copy."""
        return 0 if self._held is None else self._held.nbytes


class SparseFfnForward:
    """The forward of one patched FFN, set on the instance; without weights in copies and pickles.

    Subclasses say which calls it takes, by `takes`, and what runs otherwise is the class's own
    forward. An object with a weak reference, for the reasons of `hf_linear.LinearForward`.
    """

    def __init__(self, ffn: nn.Module, switch: Any) -> None:
        """Know the FFN, whose parts are read anew in every call, and the patch's switch."""
        self._ffn = weakref.ref(ffn)
        self.switch = switch
        self.down = TransposedCopy()

    def __getstate__(self) -> tuple[nn.Module | None, Any]:
        """Let copies and pickles arrive with the copy of the FFN, and make their own weights."""
        return self._ffn(), self.switch

    def __setstate__(self, state: tuple[nn.Module, Any]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Return what the FFN's own forward does, of the active neurons alone where that pays."""
        ffn: Any = self._ffn()
        assert ffn is not None  # it is what calls
        stock = torch.compiler.is_compiling() or not self.switch.on
        if stock or not self.takes(ffn, hidden_states):
            return type(ffn).forward(ffn, hidden_states)  # type: ignore[no-any-return]
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        activations = self.activations(ffn, rows)
        self._count(activations)
        out = sparse_row_ffn(
            activations, rows, ffn.up_proj.weight, self.down.of(ffn.down_proj.weight)
        )
        return out.view(*hidden_states.shape[:-1], out.shape[1])

    def takes(self, ffn: Any, hidden_states: Tensor) -> bool:
        """Whether the kernel may answer this call, and would be faster."""
        raise NotImplementedError

    def activations(self, ffn: Any, rows: Tensor) -> Tensor:
        """The gate after its activation function, ``[rows, neurons]``, most of it 0."""
        raise NotImplementedError

    def _count(self, activations: Tensor) -> None:
        log = self.switch.sparse_ffn
        log.calls += 1
        log.neurons += activations.shape[1]
        needed = activations[0] if len(activations) == 1 else activations.any(0)
        log.active += int(torch.count_nonzero(needed))


def held_bytes(log: SparseFfnLog | None, changes: ChangeLog) -> SparseFfnLog | None:
    """A copy of the log that says how much the FFNs hold by now."""
    if log is None:
        return None
    made = [getattr(change, "after", None) for change in changes.entries]
    held = sum(one.down.held_bytes for one in made if isinstance(one, SparseFfnForward))
    return replace(log, copied_bytes=held)
