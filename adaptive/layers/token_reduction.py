"""Runs the layers of an encoder on fewer tokens than it was given; the layers run as they are.

Every layer of a patched encoder gets a `ReducingLayerForward`. While its own forward runs, its
attention shows queries and keys to the `TokenReduction`, and adds what that says to the scores.
"""

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adaptive.layers.instance_method import InstanceMethod
from adaptive.layers.switch import Switch
from adaptive.policy import TokenMerging, TokenPruning


@dataclass
class TokenReduction:
    """What became of the tokens in the pass now running; shared by the layers of the model.

    It holds neither modules nor the record of the patch, through which a deepcopy of one layer
    would reach the whole model.

    Attributes:
        policy: Which tokens stay where.
        layers: Of the model.
        protect: Tokens at the start of a sequence that always stay.
        switch: Of the patch: off inside `Patched.disabled()`.
        active: Whether a pass is running in which tokens may go.
        in_graph: Whether torch.compile is at work on it.
        lengths: Real tokens of each row before the next reduction, ``[batch]``; None: all.
        bias: Added to the scores of each key, ``[batch, 1, 1, tokens]``, float32; None: nothing.
        groups: Which token each original one is part of now, ``[batch, all tokens]``; -1: of none.
            None: itself, also once all have their states again.
        tokens: Real tokens that went through each layer so far.
        seconds: Time spent on choosing and reducing.
        query: Queries of the layer now running whose keys are not there yet.
        nan: Whether what chose was NaN in this pass, on the device; None: nobody looked there.
    """

    verb: ClassVar[str]
    mask_gone: ClassVar[str]
    """Why the model's own masks have no place any more."""

    policy: TokenMerging | TokenPruning
    layers: int
    protect: int
    switch: Switch
    active: bool = False
    in_graph: bool = False
    lengths: Tensor | None = None
    bias: Tensor | None = None
    groups: Tensor | None = None
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    query: Tensor | None = None
    nan: Tensor | None = None
    _real: list[int] | None = None  # of each row; None: all
    _wanted: bool = False

    def begin(self, lengths: Tensor | None) -> None:
        """Let tokens go in the pass that begins now."""
        self.end()
        self.active, self.in_graph, self.lengths = True, False, lengths
        self._real = None if lengths is None else lengths.tolist()

    def end(self) -> tuple[list[int], float]:
        """Forget the pass; return the real tokens of each of its layers and the time it took."""
        done = self.tokens, self.seconds
        self.active, self._wanted, self.tokens, self.seconds = False, False, [], 0.0
        self.lengths = self._real = None
        self.forget()
        return done

    def before(self, index: int, states: Tensor) -> None:
        """Note that layer ``index`` now runs on ``states``."""
        batch, tokens, _ = states.shape
        if index == 0:  # an exception may have ended the last pass
            self.tokens = []
            self.forget()
        self.tokens.append(batch * tokens if self._real is None else sum(self._real))
        self._wanted = index in self.policy.reducing_layers(self.layers)

    def after(self, index: int, states: Tensor) -> Tensor:
        """Return what a layer made, after its tokens went; all tokens after the last layer."""
        start = perf_counter()
        if self._wanted:
            states = self.reduce(index, states)
        if index == self.layers - 1 and self.groups is not None:
            states = self.restore(states)
            self.groups = None
        self.seconds += perf_counter() - start
        return states

    def follow(self, groups: Tensor) -> None:
        """Note where the tokens went: ``groups`` says it of those that there were."""
        if self.groups is None:
            self.groups = groups
        else:
            known = groups.gather(1, self.groups.clamp(min=0))
            self.groups = known.masked_fill_(self.groups < 0, -1)

    def left(self, known: Tensor, tokens: int) -> Tensor:
        """Which of the ``tokens`` of each row that there are now are real, ``[batch, tokens]``."""
        if self.lengths is None:
            return known
        return torch.arange(tokens, device=self.lengths.device) < self.lengths[:, None]

    def set_lengths(self, real: list[int], like: Tensor) -> None:
        """Note how many real tokens each row has now."""
        self._real = real
        self.lengths = torch.tensor(real, dtype=torch.int32, device=like.device)

    def forget(self) -> None:
        """Drop what tensors the pass left."""
        self.groups = self.bias = self.query = self.nan = None

    def see(self, query: Tensor, key: Tensor, scale: float | None) -> None:
        """Take from the attention of the layer now running what is needed after it.

        Args:
            query: ``[batch, heads, tokens, head_dim]``.
            key: Likewise.
            scale: Of the scores; None: ``1 / sqrt(head_dim)``.
        """
        raise NotImplementedError

    def reduce(self, index: int, states: Tensor) -> Tensor:
        """Return what layer ``index`` made with fewer tokens."""
        raise NotImplementedError

    def restore(self, states: Tensor) -> Tensor:
        """Return states of all original tokens."""
        raise NotImplementedError


class ReducingLayerForward(InstanceMethod):
    """The forward of one layer.

    Attributes:
        index: Number of the layer.
        reduction: Shared by the layers of the model.
    """

    def __init__(self, layer: nn.Module, index: int, reduction: TokenReduction) -> None:
        """Know the layer, its number, and what tells which tokens stay."""
        super().__init__(layer)
        self.index = index
        self.reduction = reduction

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer on the tokens that there are, and let some of them go."""
        layer, reduction = self.module, self.reduction
        forward = type(layer).forward
        if reduction.in_graph and reduction.switch.on:
            name = type(reduction.policy).__name__
            raise NotImplementedError(f"adaptive: {name} cannot run under torch.compile")
        if not (reduction.active and reduction.switch.on):
            return forward(layer, *args, **kwargs)
        reduction.before(self.index, args[0] if args else kwargs["hidden_states"])
        made = forward(layer, *args, **kwargs)
        if isinstance(made, tuple):
            return (reduction.after(self.index, made[0]), *made[1:])
        return reduction.after(self.index, made)


def learns(states: Tensor) -> bool:
    """Whether what becomes of the states must be differentiable."""
    return torch.is_grad_enabled() and states.requires_grad
