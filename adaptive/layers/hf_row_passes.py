"""Passes of one stretch of a model's layers after the other, for the rows of a batch that go on."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from adaptive.layers.exit_head import Outlook
from adaptive.layers.hf_exit_passes import AT_ONCE, StretchPasses
from adaptive.layers.hf_layer_rows import LayerRows

Left = list[tuple[int, Tensor]]
"""Numbers of stretches, and which rows left after them."""


class RowPasses(StretchPasses):
    """Runs a *stretch*, the layers between two exits, on some rows of the batch.

    A row brings all of its tokens that wait for the stretch, so its slots of a layer's cache fill
    in order. Rows for which fewer wait run some of theirs again, which gives what is there already:
    so a pass has one shape, and the states of the last `AT_ONCE` tokens of each row are kept at
    each exit.
    """

    def __init__(self, *given: Any) -> None:
        """As `StretchPasses`."""
        super().__init__(*given)
        self._ran = torch.zeros(len(self.ends), 0, dtype=torch.long)  # slots, [stretches, batch]
        self._ids: Tensor  # [batch, AT_ONCE], a token at its slot modulo AT_ONCE
        self._settled = self.slots
        self._waiting: dict[int, Tensor] = {}  # [batch, AT_ONCE, width], likewise, by stretch

    @property
    def backlog(self) -> int:
        """Tokens of the row for which most wait for the last stretch."""
        return self.slots - int(self._ran.min())

    @property
    def unsettled(self) -> int:
        """Tokens since no row was waiting."""
        return self.slots - self._settled

    def prompt(self, ids: Tensor, chunk: int | None) -> Tensor:
        """As `StretchPasses.prompt`."""
        logits = super().prompt(ids, chunk)
        self.restart()
        return logits

    def restart(self) -> None:
        """As `Passes.restart`; no row waits."""
        super().restart()
        batch = len(self.positions)
        self._ran = torch.full((len(self.ends), batch), self.slots)
        self._ids = self.positions.new_zeros(batch, AT_ONCE)
        self._settled = self.slots
        self._waiting = {}

    def begin(self, ids: Tensor) -> None:
        """Take in a token of each row, ``[batch, 1]``, which no layer has seen."""
        self._ids[:, self.slots % AT_ONCE] = ids[:, 0]
        self.slots += 1
        self.positions = self.positions + 1

    def advance(
        self, stretch: int, rows: Tensor | None = None, head: bool = True
    ) -> Outlook | None:
        """Run a stretch on what waits for it.

        Args:
            stretch: Its number.
            rows: Which rows, ascending, ``[rows]``, on the CPU; None: all.
            head: Whether the model's norm and head run on what it gives.

        Returns:
            What is said of the rows' last tokens; None without a head.
        """
        ran = self._ran[stretch] if rows is None else self._ran[stretch, rows]
        begin, end = self.ends[stretch - 1] if stretch else 0, self.ends[stretch]
        there = self._there(rows)
        said, places = self._run(begin, end, there, int(ran.min()), head)
        before, state = self.depth.before, self.depth.take()
        assert before is not None  # the pass ran
        self.moved = before[:, -1], state[:, -1]
        self.log.count_pass(end - begin, state.shape[0] * state.shape[1])
        if end < self.ends[-1]:
            self._keep(end, state, there, places)
        if rows is None:
            self._ran[stretch] = self.slots
        else:
            self._ran[stretch, rows] = self.slots
        return said

    def catch_up(self, rows: Tensor | None = None, head: bool = False) -> Outlook | None:
        """Run what tokens of ``rows`` wait for; None: of all rows.

        Returns:
            What is said of the last tokens if ``head``, where one waits for the last stretch in
            each row.
        """
        chosen = torch.arange(self._ran.shape[1]) if rows is None else rows
        said = None
        for stretch in range(1, len(self.ends)):
            late = chosen[self._ran[stretch, chosen] < self.slots]
            if len(late):
                everyone = len(late) == self._ran.shape[1]
                last = head and stretch == len(self.ends) - 1
                said = self.advance(stretch, None if everyone else late, last)
                self.log.catch_ups += 1
        return said

    def audit(self, stretch: int, rows: Tensor) -> Outlook | None:
        """What the whole model says of the last token of rows that left after ``stretch``.

        What later layers keep of it is to be overwritten.
        """
        for later in range(stretch + 1, len(self.ends)):
            said = self.advance(later, rows, later == len(self.ends) - 1)
        return said

    def copy_keys(self, left: Left, sources: dict[int, dict[int, int]]) -> None:
        """Give later layers keys and values of layers that ran on the tokens that left.

        Args:
            left: Which rows left where, in ascending order.
            sources: For each number of layers run and each later layer, the layer to copy from.
        """
        layers: Sequence[Any] = self.cache.layers
        batch = self._ran.shape[1]
        places = [None if len(rows) == batch else self._there(rows) for _, rows in left]
        for layer in range(self.ends[left[0][0]], self.ends[-1]):
            for (stretch, _), rows in zip(left, places, strict=True):
                ran = self.ends[stretch]
                if ran > layer:
                    break
                source = layers[sources[ran][layer]]
                made = [states[:, :, -1:] for states in (source.keys, source.values)]
                if rows is not None:
                    made = [states.index_select(0, rows) for states in made]
                LayerRows(layers[layer], rows, self.slots - 1, self.slots).update(*made)
        self._ran[:] = self.slots

    def project_keys(self, left: Left) -> None:
        """Have later layers make keys and values of the hidden states of the tokens that left.

        Raises:
            NotImplementedError: A layer came to its end without any.
        """
        for stretch, rows in left:
            begin = self.ends[stretch]
            self._run(begin, self.ends[-1], self._there(rows), self.slots - 1, None)
            layers: Sequence[Any] = self.cache.layers
            for number in range(begin, self.ends[-1]):
                if int(layers[number].get_seq_length()) != self.slots:
                    raise NotImplementedError(
                        f"adaptive: EarlyExit: kv='project' does not fit "
                        f"{type(self.base).__name__}: layer {number} does not keep keys before its "
                        "attention; use kv='deferred'"
                    )
        self._ran[:] = self.slots

    def settle(self) -> None:
        """Let windows, which keep all that could be taken back, drop it if nobody waits."""
        if self.backlog == 0:
            self.crop(self.slots)
            self._settled = self.slots

    def abandon(self) -> None:
        """Leave in the cache what every layer holds of every row, and forget who waits."""
        self.slots = int(self._ran.min())
        self._ran[:] = self.slots
        self.finish(self.slots)

    def _run(
        self, begin: int, end: int, rows: Tensor | None, start: int, head: bool | None
    ) -> tuple[Outlook | None, Tensor]:
        """Run the layers from ``begin`` to ``end - 1`` on the rows' slots from ``start`` on.

        Args:
            begin: First layer.
            end: After the last one.
            rows: Which rows; None: all.
            start: First slot.
            head: Whether the head runs on the last token; None: layers only keep keys and values.

        Returns:
            What the head says, if it is asked, and where `_ids` holds the tokens.
        """
        slots = torch.arange(start, self.slots, device=self._ids.device)
        places = slots % AT_ONCE
        ids = _chosen(self._ids, rows)[:, places]
        positions = _chosen(self.positions, rows) + slots - self.slots
        entering = _chosen(self._waiting[begin], rows)[:, places] if begin else None
        given = self._inputs(ids, positions, self.slots, self._view(begin, end, rows, start))
        if self.mask is not None:
            given["attention_mask"] = _chosen(given["attention_mask"], rows)
        with self.depth.run(begin, end, entering):
            self.depth.keys_only = head is None
            said = self._outlook(given, end) if head else None
            if not head:
                self.base(**given)
        return said, places

    def _there(self, rows: Tensor | None) -> Tensor | None:
        """The numbers of rows where the tokens are."""
        return None if rows is None else rows.to(self._ids.device)

    def _keep(self, end: int, state: Tensor, rows: Tensor | None, places: Tensor) -> None:
        """Keep hidden states ``[rows, tokens, width]`` for the layers from ``end`` on."""
        if end not in self._waiting:
            shape = (len(self._ids), AT_ONCE, state.shape[2])
            self._waiting[end] = state.new_zeros(shape)
        kept = self._waiting[end]
        if rows is None:
            kept[:, places] = state
        else:
            kept[rows[:, None], places] = state

    def _view(self, begin: int, end: int, rows: Tensor | None, start: int) -> Cache:
        """The cache as the layers from ``begin`` to ``end - 1`` see it, for some rows."""
        layers: Sequence[Any] = self.cache.layers
        if rows is None and all(x.get_seq_length() == start for x in layers[begin:end]):
            return self._cache_from(begin, end) if begin else self.cache
        view = copy.copy(self._cache_from(begin, end))
        inside: Sequence[Any] = view.layers
        view.layers = [LayerRows(layer, rows, start, self.slots) for layer in inside]
        return view


def _chosen(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)
