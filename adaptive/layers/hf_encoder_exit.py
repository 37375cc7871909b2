"""Runs the layers of an encoder for the sequences that have not left it, and for no others.

Every layer of a patched encoder gets an `EncoderLayerForward`. It hands the layer's own forward the
rows of the batch that go on, of every argument that has rows, and puts what comes back to its place
among the states of those that left. So all that a model does around its layers is its own code.
"""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.layers.autocast import in_own_dtype
from adaptive.layers.hf_mask import LazyMask
from adaptive.layers.pooling import pool_weights, pooled
from adaptive.layers.switch import Switch
from adaptive.policy import EncoderExit
from adaptive.policy.encoder_exit import GATE_THRESHOLD

_STATES = 3
"""Axes from which on a floating tensor whose first is the batch has a row per sequence.

A table of rotary embeddings, ``[tokens, head_dim]``, may have as many rows as there are sequences.
"""
_NUMBERS = 2
"""The same for whole numbers and truth values: positions and masks, ``[batch, tokens]``."""


@dataclass
class EncoderExits:
    """Which sequences go on in the pass now running; all of it is shared by the layers.

    It holds neither modules nor the record of the patch, through which a deepcopy of one layer
    would reach the whole model.

    Attributes:
        policy: When sequences leave.
        layers: Of the model.
        switch: Of the patch: off inside `Patched.disabled()`.
        at: Depths at which they may.
        active: Whether a pass is running that they may leave.
        in_graph: Whether torch.compile is at work on it. The first layer says so: what is raised
            while a graph is made may be swallowed, and the code then runs without one.
        mask: Which tokens of it are not padding, ``[batch, tokens]``; None: all.
        depths: Layers that ran for each sequence, ``[batch]``; None before the first layer.
        going: Rows that go on, ascending, int64; None: all.
        in_tuple: How long the tuples are that the layers return; 0: they return a tensor.
    """

    policy: EncoderExit
    layers: int
    switch: Switch
    at: tuple[int, ...] = ()
    active: bool = False
    in_graph: bool = False
    mask: Tensor | None = None
    depths: Tensor | None = None
    going: Tensor | None = None
    in_tuple: int = 0
    _wanted: Tensor | None = None
    _weights: Tensor | None = None
    _pooled: tuple[int, Tensor] | None = None
    _compact: tuple[Tensor, Tensor] | None = None
    _sliced: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.at = self.policy.exits(self.layers)

    def begin(self, mask: Tensor | None) -> None:
        """Let sequences leave the pass that begins now."""
        self.end()
        self.active, self.in_graph, self.mask = True, False, mask

    def end(self) -> list[int]:
        """Let no sequence leave any more, forget the pass, and return its depths."""
        depths = [] if self.depths is None else self.depths.tolist()
        self.active, self.mask, self.depths, self.going = False, None, None, None
        self._wanted = self._weights = self._pooled = self._compact = None
        self._sliced = {}
        return depths

    def enter(self, states: Tensor) -> None:
        """Note the states before the first layer; a gate reads them now."""
        self.going = None
        self.depths = torch.zeros(len(states), dtype=torch.int64, device=states.device)
        policy = self.policy
        if policy.layer is None:
            self._weights = pool_weights(states, self.mask, policy.pool)
        if policy.gate is not None:
            assert self._weights is not None
            embedded = pooled(states, self._weights)
            least = GATE_THRESHOLD if policy.threshold is None else policy.threshold
            with in_own_dtype(states.device):
                self._wanted = policy.gate.depths(embedded, self.layers, least)

    def before(self, states: Tensor) -> Tensor:
        """Return the rows that go on of the states that a layer got."""
        if self.going is None:
            return states
        if self._compact is not None and self._compact[0] is states:
            return self._compact[1]  # nobody has changed what the layer before returned
        return states.index_select(0, self.going)

    def after(self, depth: int, all_states: Tensor, states: Tensor, made: Tensor) -> Tensor:
        """Return the states of all rows after a layer, and let those leave that may.

        Args:
            depth: Layers that have run.
            all_states: Of all rows, before the layer.
            states: Of those that go on, before the layer.
            made: The same after it.
        """
        going = self.going
        assert self.depths is not None
        if going is None:
            full = made
            self.depths.fill_(depth)
        else:
            full = all_states.index_copy(0, going, made)
            self.depths.index_fill_(0, going, depth)
        stay = self._stay(depth, states, made) if depth in self.at else None
        if stay is not None and not bool(stay.all()):
            kept = stay.nonzero()[:, 0]
            self.going = kept if going is None else going[kept]
            made = made.index_select(0, kept)
            if self._weights is not None:
                self._weights = self._weights.index_select(0, kept)
            if self._wanted is not None:
                self._wanted = self._wanted.index_select(0, kept)
            if self._pooled is not None:
                self._pooled = (depth, self._pooled[1].index_select(0, kept))
            self._sliced = {}
        self._compact = None if self.going is None else (full, made)
        return full

    def _stay(self, depth: int, states: Tensor, made: Tensor) -> Tensor | None:
        """Which of the rows that go on do not leave now; None: all stay."""
        policy = self.policy
        if policy.layer is not None:
            return torch.zeros(len(made), dtype=torch.bool, device=made.device)
        if self._wanted is not None:
            return self._wanted > depth
        assert policy.threshold is not None
        assert self._weights is not None
        known = self._pooled is not None and self._pooled[0] == depth - 1
        old = self._pooled[1] if self._pooled and known else pooled(states, self._weights)
        new = pooled(made, self._weights)
        self._pooled = (depth, new)
        return ~(torch.cosine_similarity(old, new, dim=-1) >= policy.threshold)

    def left(self, known: Tensor, tokens: int) -> Tensor:
        """Rows of ``known``, ``[batch, tokens]``, that go on."""
        return known if self.going is None else known.index_select(0, self.going.to(known.device))

    def rows_of(self, value: Any) -> Any:
        """Return ``value`` with the rows that go on of each tensor in it that has rows."""
        if isinstance(value, Tensor):
            return self._rows_of_tensor(value)
        if type(value) in (tuple, list):
            return type(value)(self.rows_of(item) for item in value)
        if type(value) is dict:
            return {key: self.rows_of(item) for key, item in value.items()}
        return value

    def _rows_of_tensor(self, value: Tensor) -> Tensor:
        assert self.depths is not None
        axes = _STATES if value.is_floating_point() else _NUMBERS
        if self.going is None or value.dim() < axes or value.shape[0] != len(self.depths):
            return value
        known = self._sliced.get(id(value))
        if known is not None and known[0] is value:
            return known[1]
        if isinstance(value, LazyMask):
            made: Tensor = value.of_batch(self.going)
        else:
            made = value.index_select(0, self.going.to(value.device))
        self._sliced[id(value)] = (value, made)
        return made


class EncoderLayerForward:
    """The forward of one layer, set on the instance; as `LinearForward`, no strong reference.

    Attributes:
        index: Number of the layer.
        exits: Shared by the layers of the model.
    """

    def __init__(self, layer: nn.Module, index: int, exits: EncoderExits) -> None:
        """Know the layer, its number, and what tells which sequences go on."""
        self._layer = weakref.ref(layer)
        self.index = index
        self.exits = exits

    def __getstate__(self) -> tuple[nn.Module | None, int, EncoderExits]:
        """Let copies and pickles arrive with the copy of the layer."""
        return self._layer(), self.index, self.exits

    def __setstate__(self, state: tuple[nn.Module, int, EncoderExits]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer for the sequences that go on; if there are none, pass the states on."""
        layer, exits = self._layer(), self.exits
        assert layer is not None  # it is what calls
        forward = type(layer).forward
        if exits.in_graph and exits.switch.on:
            raise NotImplementedError("adaptive: EncoderExit cannot run under torch.compile")
        if not (exits.active and exits.switch.on):  # an exception may have ended the last pass
            return forward(layer, *args, **kwargs)
        states, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if self.index == 0:
            exits.enter(states)
        if exits.going is not None and not len(exits.going):
            return (states, *[None] * (exits.in_tuple - 1)) if exits.in_tuple else states
        some = exits.before(states)
        if exits.going is not None:
            rest, kwargs = exits.rows_of(rest), exits.rows_of(kwargs)
        made = forward(layer, some, *rest, **kwargs)
        exits.in_tuple = len(made) if isinstance(made, tuple) else 0
        first = made[0] if isinstance(made, tuple) else made
        full = exits.after(self.index + 1, states, some, first)
        return (full, *made[1:]) if isinstance(made, tuple) else full
