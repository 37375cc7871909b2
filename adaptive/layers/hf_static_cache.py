"""A KV cache of fixed capacity whose rows have lengths of their own, which the device knows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class Places:
    """Where the pass now running writes; shared by the layers of a cache.

    Attributes:
        slots: Of each new token, ``[batch, tokens]``, int64.
        lengths: Keys of each row in use once they are written, ``[batch]``, int32.
    """

    slots: Tensor
    lengths: Tensor


class StaticCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, in memory that stays where it is.

    Row ``b`` holds its tokens from slot 0 on, without gaps. Taking tokens back is to write over
    them: what a slot behind the lengths holds is not read.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: Any, at: Places) -> None:
        """Allocate ``[batch, kv_heads, capacity, head_dim]`` for keys and as much for values."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: Tensor = torch.zeros(*shape, dtype=dtype, device=device)
        self.values: Tensor = torch.zeros(*shape, dtype=dtype, device=device)
        self.at = at
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Do nothing: memory is there from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write ``[batch, kv_heads, tokens, head_dim]`` where the pass says.

        Returns:
            The whole memory; the keys say how much of it is in use.
        """
        index = self.at.slots[:, None, :, None].expand_as(key_states)
        self.keys.scatter_(2, index, key_states)
        self.values.scatter_(2, index, value_states)
        self.keys.adaptive_lengths = self.at.lengths  # type: ignore[attr-defined]
        return self.keys, self.values

    def load(self, keys: Tensor, values: Tensor, order: Tensor | None) -> None:
        """Take over a prompt, ``[batch, kv_heads, tokens, head_dim]``.

        Args:
            keys: Of the prompt.
            values: Of the prompt.
            order: Which of its slots come first, ``[batch, tokens]``; None: as they are.
        """
        for held, new in ((self.keys, keys), (self.values, values)):
            if order is not None:
                new = new.gather(2, order[:, None, :, None].expand_as(new))
            held[:, :, : new.shape[2]].copy_(new)

    def get_seq_length(self, *_: Any) -> int:
        """0: the host does not know, and masks and positions are given."""
        return 0

    def get_mask_sizes(self, query: Tensor | int) -> tuple[int, int]:
        """The capacity, from slot 0 on."""
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        """The capacity."""
        return self.keys.shape[2]

    def get_max_cache_shape(self) -> int:
        """`get_max_length` under its older name."""
        return self.keys.shape[2]

    def held_bytes(self) -> int:
        """Bytes of the memory."""
        return self.keys.nbytes + self.values.nbytes

    used_bytes = held_bytes


def load_prompt(cache: Cache, prompt: Cache, mask: Tensor | None) -> None:
    """Move what a prompt left in its own cache into a static one, padding left out.

    Args:
        cache: Of StaticCacheLayers.
        prompt: Filled by the prompt; emptied layer by layer, so that few tokens are held twice.
        mask: Which slots of it hold tokens, ``[batch, slots]``; None: all do.
    """
    order = None if mask is None else mask.bool().logical_not().byte().argsort(dim=1, stable=True)
    layers: Sequence[Any] = cache.layers
    filled: Sequence[Any] = prompt.layers
    for layer, source in zip(layers, filled, strict=True):
        layer.load(source.keys, source.values, order)
        source.reset()
