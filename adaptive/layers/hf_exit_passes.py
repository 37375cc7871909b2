"""Passes of one stretch of a model's layers after the other, for tokens that may leave between."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from adaptive.layers.depth import Depth
from adaptive.layers.exit_head import ExitHead, Outlook, Watch
from adaptive.layers.exit_log import ExitLog
from adaptive.layers.hf_cache import AdaptiveCacheLayer
from adaptive.layers.hf_passes import Passes

AT_ONCE = 16
"""Tokens that kernels for few tokens take in one pass."""


class StretchPasses(Passes):
    """Runs the layers between two exits.

    Attributes:
        ends: Layers run at each exit, and the model's number of layers.
        log: Counts what runs.
        moved: Hidden states of the last token of the rows that ran, before and after the last
            layer, ``[rows, width]``.
        head: The model's, where exits may ask it themselves; None: they run the model's forward.
    """

    def __init__(
        self,
        model: nn.Module,
        base: nn.Module,
        depth: Depth,
        cache: Cache,
        mask: Tensor | None,
        exits: tuple[int, ...],
        log: ExitLog,
    ) -> None:
        """Know what `Passes` does, the exits, and where to count."""
        super().__init__(model, base, depth, cache, mask)
        self.ends = (*exits, depth.layers)
        self.log = log
        self.moved: tuple[Tensor, Tensor]
        self.head: ExitHead | None = None

    def prompt(self, ids: Tensor, chunk: int | None) -> Tensor:
        """As `Passes.prompt`; learns what the model makes of its head's logits, too."""
        watch = Watch(self.model)
        with watch.of(self.base):
            logits = super().prompt(ids, chunk)
        self.head = watch.exit_head(logits[:, -1])
        return logits

    def _outlook(self, given: dict[str, Any], end: int) -> Outlook:
        """Run layers that `Depth` names, and say what an exit after ``end`` of them does."""
        whole = end == self.ends[-1]
        if self.head is None or whole:
            model: Any = self.model
            return Outlook(model(**given, logits_to_keep=1, return_dict=True).logits[:, -1])
        hidden = self.base(**given, return_dict=True).last_hidden_state
        return Outlook(hidden[:, -1], self.head)


class ExitPasses(StretchPasses):
    """Runs the layers between two exits on the tokens that wait at the first of them.

    A token that left early waits there with its hidden state, or not at all where the later layers
    got keys and values for it. Whoever waits at an exit are the last tokens, in order, since going
    on takes all that wait: so each layer's cache is a beginning of the sequence without gaps.
    """

    def __init__(self, *given: Any) -> None:
        """As `StretchPasses`."""
        super().__init__(*given)
        self._waiting: dict[int, list[Tensor]] = {}
        self._ids: list[Tensor] = []

    @property
    def backlog(self) -> int:
        """Tokens that some layers have not seen."""
        return len(self._ids)

    def first(self, ids: Tensor) -> Outlook:
        """Run the layers before the first exit on one token per row, ``[batch, 1]``."""
        self._ids.append(ids)
        self.slots += 1
        self.positions = self.positions + 1
        return self._said(0, self.ends[0])

    def onward(self, begin: int) -> Outlook:
        """Run the layers from exit ``begin`` to the next one on all that wait there."""
        end = self.ends[self.ends.index(begin) + 1]
        said = self._said(begin, end)
        if end == self.ends[-1]:
            self._settle()
        return said

    def catch_up(self, head: bool = False) -> Outlook | None:
        """Run what tokens in the backlog have not seen; what is said of the last if ``head``."""
        said = None
        for begin, end in zip(self.ends, self.ends[1:], strict=False):
            if begin in self._waiting:
                said = self._stretch(begin, end, head and end == self.ends[-1])
                self.log.catch_ups += 1
        self._settle()
        return said

    def audit(self, left: int) -> Outlook:
        """What the whole model says of the token that just left after ``left`` layers.

        What its later layers keep of it is taken back.
        """
        state = self._waiting[left][-1]
        said = self._said(left, self.ends[-1])
        layers: Sequence[Any] = self.cache.layers
        for layer in layers[left:]:
            if isinstance(layer, AdaptiveCacheLayer):
                layer.drop_last(1)
            else:
                layer.crop(-1)
        self._waiting[left] = [state]
        return said

    def copy_keys(self, left: int, sources: dict[int, int]) -> None:
        """Give the later layers keys and values of layers that ran on the token that left.

        Args:
            left: Layers that ran.
            sources: For each later layer, the one whose keys and values it gets.
        """
        layers: Sequence[Any] = self.cache.layers
        for layer, source in sources.items():
            keys, values = layers[source].keys[:, :, -1:], layers[source].values[:, :, -1:]
            layers[layer].update(keys, values)
        self._forget(left)

    def project_keys(self, left: int, ids: Tensor) -> None:
        """Have each later layer make keys and values of the hidden state of the token that left.

        Raises:
            NotImplementedError: A layer came to its end without any.
        """
        (state,) = self._waiting[left]
        end = self.ends[-1]
        given = self._inputs(ids, self.positions - 1, self.slots, self._cache_from(left, end))
        with self.depth.run(left, end, state):
            self.depth.keys_only = True
            self.base(**given)
        layers: Sequence[Any] = self.cache.layers
        for number, layer in enumerate(layers):
            if int(layer.get_seq_length()) != self.slots:
                raise NotImplementedError(
                    f"adaptive: EarlyExit: kv='project' does not fit {type(self.base).__name__}: "
                    f"layer {number} does not keep keys before its attention; use kv='deferred'"
                )
        self._forget(left)

    def restart(self) -> None:
        """As `Passes.restart`; nobody waits."""
        super().restart()
        self._waiting, self._ids = {}, []

    def abandon(self) -> None:
        """Leave in the cache what every layer holds, and forget who waits."""
        layers: Sequence[Any] = self.cache.layers
        self.slots = min(self.slots, *(int(layer.get_seq_length()) for layer in layers))
        self._waiting, self._ids = {}, []
        self.finish(self.slots)

    def _forget(self, left: int) -> None:
        del self._waiting[left]
        self._settle()

    def _settle(self) -> None:
        """Nobody waits: windows, which keep all that could be taken back, may drop it."""
        self._ids = []
        self.crop(self.slots)

    def _said(self, begin: int, end: int) -> Outlook:
        """What the head says after the layers ``begin`` to ``end - 1``."""
        said = self._stretch(begin, end)
        assert said is not None  # the head was asked
        return said

    def _stretch(self, begin: int, end: int, head: bool = True) -> Outlook | None:
        """Run the layers ``begin`` to ``end - 1`` on the tokens that wait for them."""
        states = self._waiting.pop(begin, [])
        entering = torch.cat(states, 1) if len(states) > 1 else states[0] if states else None
        tokens = 1 if entering is None else entering.shape[1]
        ids = torch.cat(self._ids[-tokens:], 1)
        steps = torch.arange(-tokens, 0, device=ids.device)
        cache = self._cache_from(begin, end) if begin else self.cache
        given = self._inputs(ids, self.positions + steps, self.slots, cache)
        with self.depth.run(begin, end, entering):
            said = self._outlook(given, end) if head else None
            if not head:
                self.base(**given)
        before = self.depth.before
        assert before is not None  # the pass ran
        state = self.depth.take()
        self.moved = before[:, -1], state[:, -1]
        self.log.count_pass(end - begin, state.shape[0] * state.shape[1])
        if end < self.ends[-1]:
            self._waiting.setdefault(end, []).append(state)
        return said
