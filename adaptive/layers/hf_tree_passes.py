"""Passes over a tree of candidates: the whole model, or what of it drafts have not run yet."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from adaptive.layers.hf_passes import Passes
from adaptive.layers.hf_sliding import AdaptiveSlidingLayer
from adaptive.layers.hf_windows import own_windows

Masks = Tensor | dict[str, Tensor]
"""What a model takes as ``attention_mask``: one for all layers, or one for each kind of them."""


class TreePasses(Passes):
    """Passes whose tokens branch: each sees the context and its own path, and no other branch.

    In a layer with a window a node sees what is closer to it than that: a sibling of a draft has
    the draft's position, whatever slot it lies in. Slots of the context stand for positions, which
    they do where rows have no gaps.
    """

    def tree(self, ids: Tensor, parents: Tensor, depths: Tensor, ancestors: Tensor) -> Tensor:
        """Run the whole model on a token per row and a tree of candidates after it.

        What drafts left in the cache is taken back first.

        Args:
            ids: The token and the tree's nodes, ``[batch, 1 + nodes]``.
            parents: Which of them each follows, -1 for the first, ``[batch, 1 + nodes]``.
            depths: How far each is from the first, ``[batch, 1 + nodes]``.
            ancestors: Which of them each sees, ``[batch, 1 + nodes, 1 + nodes]``, bool; what
                ``parents`` say, for attention that is not ours.

        Returns:
            Logits, ``[batch, 1 + nodes, vocabulary]``.
        """
        self.crop(self.slots)
        return self._check(ids, depths, self._masks(ancestors, depths, parents), self.cache)

    def branches(self, ids: Tensor, depths: Tensor, ancestors: Tensor, end: int) -> None:
        """Run the layers before ``end`` on the nodes that `shallow` has not run, and keep that.

        Args:
            ids: Those that it has run, in that order, and the others: as in `tree`.
            depths: As in `tree`.
            ancestors: As in `tree`.
            end: Layers to run.
        """
        ran = self._shallow - self.slots
        given = self._inputs(ids[:, ran:], self.positions + depths[:, ran:], 0, self.cache)
        given["attention_mask"] = self._masks(ancestors[:, ran:], depths)
        with self._looking_back(ran), self.depth.run(0, end):
            self.base(**given, return_dict=True)
        self._states.append(self.depth.take())
        self._shallow = self.slots + ids.shape[1]

    def deep_tree(
        self, ids: Tensor, parents: Tensor, depths: Tensor, ancestors: Tensor, begin: int
    ) -> Tensor:
        """Run the layers from ``begin`` on, on a tree of which the others have run every node.

        Args:
            ids: As in `tree`, in the order in which `shallow` and `branches` ran them.
            parents: As in `tree`.
            depths: As in `tree`.
            ancestors: As in `tree`.
            begin: First layer to run.

        Returns:
            Logits, ``[batch, 1 + nodes, vocabulary]``.
        """
        mask = self._masks(ancestors, depths, parents)
        view = self._cache_from(begin, self.depth.layers)
        with self.depth.run(begin, self.depth.layers, torch.cat(self._states, 1)):
            return self._check(ids, depths, mask, view)

    def accept_paths(self, paths: list[list[int]], alive: list[bool]) -> None:
        """Keep the first token of each row and the nodes of its path; forget the other nodes.

        Args:
            paths: Nodes in order, counted from 0 after the first token.
            alive: Which rows go on; of the others, the first token alone is kept.
        """
        kept = [len(path) + 1 if on else 1 for path, on in zip(paths, alive, strict=True)]
        most = max(kept)
        index = torch.zeros(len(kept), most, dtype=torch.long)
        for row, path in enumerate(paths):
            for place, node in enumerate(path[: most - 1]):
                index[row, place + 1] = node + 1
        if any(path != list(range(len(path))) for path in paths):  # else they lie there already
            self._keep(index.to(self.positions.device))
        self.accept(torch.tensor(kept, device=self.positions.device), most)

    def _check(self, ids: Tensor, depths: Tensor, mask: Masks, cache: Cache) -> Tensor:
        """Logits of every node."""
        given = self._inputs(ids, self.positions + depths, 0, cache)
        given["attention_mask"] = mask
        model: Any = self.model
        logits: Tensor = model(**given, logits_to_keep=ids.shape[1], return_dict=True).logits
        return logits

    @contextmanager
    def _looking_back(self, tokens: int) -> Iterator[None]:
        """Have windows give so many further tokens inside the block: nodes do not follow them."""
        windows = [layer for layer in self.cache.layers if isinstance(layer, AdaptiveSlidingLayer)]
        for layer in windows:
            layer.reach = tokens
        try:
            yield
        finally:
            for layer in windows:
                layer.reach = 0

    def _masks(self, seen: Tensor, depths: Tensor, parents: Tensor | None = None) -> Masks:
        """The masks of some nodes, the last ones, over the context and all nodes.

        Args:
            seen: Which nodes each of them sees, ``[batch, some, nodes]``.
            depths: Of all nodes, ``[batch, nodes]``.
            parents: Of all nodes, if the mask is of all: our attention reads those instead.
        """
        config: Any = self.base.config
        windows = own_windows(config, self.depth.layers)
        if set(windows) == {None}:
            return self._mask(seen, parents)
        kinds = getattr(config, "layer_types", None) or [""] * len(windows)
        layers: Sequence[Any] = self.cache.layers
        made: dict[str, Tensor] = {}
        for kind, window, layer in zip(kinds, windows, layers, strict=False):
            if kind in made:
                continue
            if window is None:
                made[kind] = self._mask(seen, parents)
            else:
                mask = self._window(seen, depths, window)
                slots = min(self.slots, window - 1) if layer.is_sliding else self.slots
                made[kind] = self._as_asked(mask[..., self.slots - slots :].contiguous())
        return made if len(made) > 1 else next(iter(made.values()))

    def _window(self, seen: Tensor, depths: Tensor, window: int) -> Tensor:
        """Which slots and nodes some nodes see that lie within a window, bool."""
        places = torch.cat(
            [
                torch.arange(self.slots, device=depths.device).expand(len(depths), -1),
                self.slots + depths,
            ],
            1,
        )
        own = places[:, -seen.shape[1] :, None]
        return self._whole(seen) & (own - places[:, None] < window)[:, None]

    def _whole(self, seen: Tensor) -> Tensor:
        """Which slots and nodes some nodes see, ``[batch, 1, some, slots]``, bool."""
        batch, some, _ = seen.shape
        if self.mask is None:
            context = seen.new_ones(1, 1, 1, 1).expand(batch, 1, some, self.slots)
        else:
            known = self.mask[:, None, None, : self.slots].bool()
            context = known.expand(batch, 1, some, self.slots)
        return torch.cat([context, seen[:, None]], 3)

    def _as_asked(self, mask: Tensor) -> Tensor:
        """The mask in the form that the model's attention takes."""
        implementation = getattr(self.model.config, "_attn_implementation", "")
        if "eager" not in str(implementation):
            return mask
        none = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        return none.masked_fill_(~mask, torch.finfo(torch.float32).min)

    def _mask(self, seen: Tensor, parents: Tensor | None) -> Tensor:
        """As `_masks`, of a layer without a window."""
        mask = self._as_asked(self._whole(seen))
        if parents is None:
            return mask
        held = None
        if self.mask is not None:
            nodes = seen.shape[2]
            self._extend_mask(self.slots + nodes)
            held = self.mask[:, : self.slots + nodes].bool()
        mask.adaptive_tree = (parents, held)  # type: ignore[attr-defined]
        return mask

    def _keep(self, index: Tensor) -> None:
        """Of the slots that a tree's nodes wrote keep those at ``index``, ``[batch, kept]``."""
        layers: Sequence[Any] = self.cache.layers
        for layer in layers:
            layer.keep(index, int(layer.get_seq_length()) - self.slots)
