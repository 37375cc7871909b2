"""One step of self-speculative decoding in which the host decides nothing.

Drafts by the first layers, their check by the others, what is accepted, end tokens and lengths:
all are operations on memory of fixed place and shape. So the step can be captured in a CUDA graph,
and replayed without the host.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from adaptive.layers.hf_static_cache import Places, StaticCacheLayer, load_prompt
from adaptive.layers.state import RECORD, PatchRecord
from adaptive.layers.static_rows import StaticRows
from adaptive.ops import verify_draft

Verify = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Of drafts, ``[batch, drafts]``, and choices, ``[batch, 1 + drafts]``; see `verify_draft`."""


class StaticStep:
    """The step, its cache and its rows.

    Without drafts it is a step of plain decoding, a token by a pass of the whole model.

    Attributes:
        rows: Tokens and lengths.
        cache: Of StaticCacheLayers.
        capacity: Tokens of a row for which there is memory; new ones and drafts included.
        drafts: Tokens drafted per step.
        verify: What accepts drafts.
    """

    def __init__(
        self, model: Any, batch: int, capacity: int, exit_layer: int, drafts: int, ends: int
    ) -> None:
        """Allocate all that the step will ever write to.

        Args:
            model: A patched model, which has a `Depth` and has run once. It is not kept alive.
            batch: Rows.
            capacity: See above.
            exit_layer: Layers that a draft runs.
            drafts: Tokens drafted per step; 0: plain decoding.
            ends: End tokens for which there is memory.
        """
        record: PatchRecord = model.__dict__[RECORD]
        self._model: weakref.ref[Any] = weakref.ref(model)
        self._base: weakref.ref[nn.Module] = weakref.ref(model.get_submodule(record.base))
        self._depth = record.depth
        self.capacity, self.drafts, self.exit_layer = capacity, drafts, exit_layer
        device, shape = model.device, record.plan.shape
        self.rows = StaticRows(batch, capacity, ends, device)
        self._at = Places(self.rows.slots(0, 1), self.rows.lengths.int())
        sizes = zip(shape.kv_heads, shape.head_dim, strict=True)
        self.cache = Cache(
            layers=[
                StaticCacheLayer((batch, heads, capacity, size), model.dtype, device, self._at)
                for heads, size in sizes
            ]
        )
        self._mask = torch.ones(1, 1, 1, capacity, dtype=torch.bool, device=device)
        self.verify: Verify = verify_draft

    @property
    def held_bytes(self) -> int:
        """Bytes of the cache."""
        layers: Any = self.cache.layers
        return sum(int(layer.held_bytes()) for layer in layers)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the step reads and writes and that outlives it, by name."""
        named = {f"rows.{name}": tensor for name, tensor in self.rows.state().items()}
        layers: Any = self.cache.layers
        for number, layer in enumerate(layers):
            named[f"keys.{number}"], named[f"values.{number}"] = layer.keys, layer.values
        return named

    def begin(
        self,
        prompt: Cache,
        mask: Tensor | None,
        first: Tensor,
        limit: int,
        ends: list[int],
        pad: int,
    ) -> None:
        """Start with a prompt that the model has read; see `load_prompt` and `StaticRows.begin`."""
        tokens = int(prompt.get_seq_length())
        lengths = torch.full_like(self.rows.lengths, tokens) if mask is None else mask.sum(-1)
        load_prompt(self.cache, prompt, mask)
        self.rows.begin(lengths, first, limit, ends, pad)

    def step(self) -> None:
        """Make at least one token for each row alive; no others change."""
        self._depth.static = True
        try:
            self._step()
        finally:
            self._depth.static = False

    def _step(self) -> None:
        ids = [self.rows.last]
        if not self.drafts:
            tokens = self._pass(ids[0], 0).argmax(-1)
            self.rows.keep(tokens, torch.zeros_like(tokens[:, 0]))
            return
        states = []
        for place in range(self.drafts):
            with self._depth.run(0, self.exit_layer):
                drafted = self._pass(ids[-1], place).argmax(-1)
            states.append(self._depth.take())
            ids.append(drafted)
        with self._depth.run(0, self.exit_layer):
            self._pass(ids[-1], self.drafts, head=False)  # what follows is not asked
        states.append(self._depth.take())
        with self._depth.run(self.exit_layer, self._depth.layers, torch.cat(states, 1)):
            choices = self._pass(torch.cat(ids, 1), 0).argmax(-1)
        accepted, _, tokens = self.verify(torch.cat(ids[1:], 1), choices)
        self.rows.keep(tokens, accepted)

    def _pass(self, ids: Tensor, offset: int, head: bool = True) -> Tensor:
        """Run the layers that `Depth` names on tokens that lie ``offset`` behind the cache's end.

        Returns:
            Logits of all of them, ``[batch, tokens, vocabulary]``; what the norm gave without head.
        """
        rows, tokens = self.rows, ids.shape[1]
        model, base = self._model(), self._base()
        assert model is not None  # it is what generates
        assert base is not None
        self._at.slots = rows.slots(offset, tokens)
        self._at.lengths = (rows.lengths + (offset + tokens)).int()
        given: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": rows.positions(offset, tokens),
            "attention_mask": self._mask,
            "past_key_values": self.cache,
            "use_cache": True,
            "return_dict": True,
        }
        if not head:
            hidden: Tensor = base(**given).last_hidden_state
            return hidden
        logits: Tensor = model(**given, logits_to_keep=tokens).logits
        return logits
