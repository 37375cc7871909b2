"""Passes of a part of a transformers model over one KV cache, and taking tokens back from it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from adaptive.layers.depth import Depth
from adaptive.layers.hf_cache_view import cache_from
from adaptive.layers.hf_sliding import AdaptiveSlidingLayer


class Passes:
    """Runs whole and partial passes for a batch whose rows may be at different positions.

    All rows fill the same slots of the cache. Where a row accepted fewer drafts than another, its
    slots in between are masked out; positions count the row's own tokens.

    Attributes:
        slots: Slots of the cache in use by all layers.
        positions: Of each row's next token, ``[batch, 1]``.
        mask: Which slots hold tokens, ``[batch, slots or more]``; None: all do.
        furthest: The last position of each row, ``[batch, 1]``: no draft beyond it is kept, and a
            model may have no later ones; None: there are no such drafts.
    """

    def __init__(
        self, model: nn.Module, base: nn.Module, depth: Depth, cache: Cache, mask: Tensor | None
    ) -> None:
        """Know the model, the module that holds its layers, and the cache."""
        self.model = model
        self.base = base
        self.depth = depth
        self.cache = cache
        self.mask = mask
        self.slots = int(cache.get_seq_length())
        self.positions = torch.zeros(0, 1)
        self.furthest: Tensor | None = None
        self._states: list[Tensor] = []
        self._shallow = self.slots
        self._views: dict[tuple[int, int], Cache] = {}

    @property
    def windowed(self) -> bool:
        """Whether some layers see a window of slots."""
        layers: Sequence[Any] = self.cache.layers
        return any(layer.is_sliding for layer in layers)

    def prompt(self, ids: Tensor, chunk: int | None) -> Tensor:
        """Read the prompt and return its last logits, ``[batch, 1, vocabulary]``.

        Args:
            ids: ``[batch, tokens]``; those that the cache holds already are left out.
            chunk: Tokens to read at a time; None: all.
        """
        batch, tokens = ids.shape
        if self.mask is None:
            positions = torch.arange(tokens, device=ids.device).expand(batch, tokens)
        else:
            positions = (self.mask.cumsum(-1) - 1).clamp_(min=0)
        for start in range(self.slots, tokens, chunk or tokens):
            end = min(start + (chunk or tokens), tokens)
            logits = self._call(ids[:, start:end], positions[:, start:end], end)
        self.slots = self._shallow = tokens
        self.positions = positions[:, -1:] + 1
        for layer in self.cache.layers:
            if isinstance(layer, AdaptiveSlidingLayer):
                layer.record_past = True
        return logits

    def restart(self) -> None:
        """Go on from what every layer holds, after rows of the batch came or went."""
        self._shallow, self._states = self.slots, []

    def plain(self, ids: Tensor) -> Tensor:
        """Run the whole model on one token per row; its logits, ``[batch, 1, vocabulary]``."""
        return self._call(ids, self.positions, self.slots + 1)

    def shallow(self, ids: Tensor, end: int) -> Tensor:
        """Run the layers before ``end`` on one token per row, and keep what they gave.

        Args:
            ids: ``[batch, 1]``.
            end: Layers to run.

        Returns:
            Logits of the model's norm and head on that, ``[batch, 1, vocabulary]``.
        """
        made = self._shallow - self.slots
        with self.depth.run(0, end):
            logits = self._call(ids, self.positions + made, self._shallow + 1)
        self._states.append(self.depth.take())
        self._shallow += 1
        return logits

    def hidden(self, ids: Tensor, end: int) -> Tensor:
        """As `shallow`, but without the head: what the model's norm gave, ``[batch, 1, width]``."""
        made = self._shallow - self.slots
        given = self._inputs(ids, self.positions + made, self._shallow + 1, self.cache)
        with self.depth.run(0, end):
            normed: Tensor = self.base(**given, return_dict=True).last_hidden_state
        self._states.append(self.depth.take())
        self._shallow += 1
        return normed

    def skipping(self, ids: Tensor) -> Tensor:
        """Run all layers on one token per row, without the modules that `Depth.skips` names."""
        logits = self._call(ids, self.positions + self._shallow - self.slots, self._shallow + 1)
        self._shallow += 1
        return logits

    def held(self, first: int) -> Tensor:
        """Which slots from ``first`` on hold tokens, ``[batch, slots - first]``, bool."""
        if self.mask is None:
            ones = torch.ones(len(self.positions), self.slots - first, dtype=torch.bool)
            return ones.to(self.positions.device)
        return self.mask[:, first : self.slots].bool()

    def recall(self, tokens: int) -> None:
        """Have windows hold so many further tokens, for `again`."""
        for layer in self.cache.layers:
            if isinstance(layer, AdaptiveSlidingLayer):
                layer.margin = tokens

    def again(self, ids: Tensor) -> Tensor:
        """Run all layers once more on the last tokens, without the modules that are skipped.

        The cache is left as it was, bit by bit.

        Args:
            ids: The tokens in the last slots, ``[batch, tokens]``; any for slots without one.

        Returns:
            Logits, ``[batch, tokens, vocabulary]``.
        """
        tokens = ids.shape[1]
        if self.mask is None:
            positions = self.positions + torch.arange(-tokens, 0, device=ids.device)
        else:
            counted = self.mask[:, : self.slots].cumsum(-1) - 1
            positions = counted[:, -tokens:].clamp(min=0)
        layers: Sequence[Any] = self.cache.layers
        held = [layer.copy_last(tokens) for layer in layers]
        before = self.slots - tokens
        try:
            self.crop(before)
            return self._call(ids, positions, self.slots, last=tokens)
        finally:
            self.crop(before)
            for layer, (keys, values) in zip(layers, held, strict=True):
                layer.update(keys, values)
            self._shallow = self.slots

    def behind(self, tokens: int) -> bool:
        """Whether `shallow` has not run so many tokens of this step."""
        return self._shallow - self.slots < tokens

    def deep(self, ids: Tensor, begin: int) -> Tensor:
        """Run the layers from ``begin`` on, on the tokens that `shallow` ran.

        Args:
            ids: Those tokens, ``[batch, tokens]``.
            begin: First layer to run.

        Returns:
            Logits, ``[batch, tokens, vocabulary]``.
        """
        tokens = ids.shape[1]
        steps = torch.arange(tokens, device=ids.device)
        state = self._states[0] if tokens == 1 else torch.cat(self._states, 1)
        with self.depth.run(begin, self.depth.layers, state):
            return self._call(
                ids,
                self.positions + steps,
                self.slots + tokens,
                self._cache_from(begin, self.depth.layers),
                tokens,
            )

    def whole(self, ids: Tensor) -> Tensor:
        """Logits of all layers, ``[batch, tokens, vocabulary]``, without what drafts left."""
        self.crop(self.slots)
        tokens = ids.shape[1]
        steps = torch.arange(tokens, device=ids.device)
        return self._call(ids, self.positions + steps, self.slots + tokens, last=tokens)

    def accept(self, accepted: Tensor, most: int) -> None:
        """Keep ``most`` of the slots that the last check wrote, and forget the others.

        Args:
            accepted: Tokens of each row that stay, ``[batch]``, at most ``most``.
            most: Of all rows.
        """
        self.crop(self.slots + most)
        if self.mask is not None or bool((accepted < most).any()):
            steps = torch.arange(most, device=accepted.device)
            self._extend_mask(self.slots + most)
            assert self.mask is not None
            self.mask[:, self.slots : self.slots + most] = steps < accepted[:, None]
        self.slots += most
        self._shallow = self.slots
        self._states = []
        self.positions = self.positions + accepted[:, None].to(self.positions.device)

    def crop(self, slots: int) -> None:
        """Take back what any layer holds beyond ``slots``."""
        layers: Sequence[Any] = self.cache.layers
        for layer in layers:
            layer.drop_last(max(int(layer.get_seq_length()) - slots, 0))
        self._shallow = min(self._shallow, slots)

    def finish(self, slots: int) -> None:
        """Leave the cache as plain decoding would: ``slots`` at most, windows trimmed."""
        self.crop(slots)
        self._states = []
        for layer in self.cache.layers:
            if isinstance(layer, AdaptiveSlidingLayer):
                layer.record_past, layer.margin = False, 0

    def _call(
        self,
        ids: Tensor,
        positions: Tensor,
        slots: int,
        cache: Cache | None = None,
        last: int = 1,
    ) -> Tensor:
        given = self._inputs(ids, positions, slots, cache or self.cache)
        logits: Tensor = self.model(**given, logits_to_keep=last, return_dict=True).logits
        return logits

    def _inputs(self, ids: Tensor, positions: Tensor, slots: int, cache: Cache) -> dict[str, Any]:
        if self.furthest is not None:
            positions = positions.minimum(self.furthest)
        given: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": True,
        }
        if self.mask is not None:
            self._extend_mask(slots)
            given["attention_mask"] = self.mask[:, :slots]
        return given

    def _extend_mask(self, slots: int) -> None:
        """Make the mask at least ``slots`` long, with tokens in the new part."""
        batch = len(self.positions)
        device = self.positions.device
        if self.mask is None:
            self.mask = torch.ones(batch, max(2 * slots, 64), dtype=torch.long, device=device)
        elif self.mask.shape[1] < slots:
            more = torch.ones(batch, slots, dtype=torch.long, device=device)
            self.mask = torch.cat([self.mask, more], 1)

    def _cache_from(self, begin: int, end: int) -> Cache:
        """`cache_from`, made once."""
        if (begin, end) not in self._views:
            self._views[begin, end] = cache_from(self.cache, begin, end)
        return self._views[begin, end]
