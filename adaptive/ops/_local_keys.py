"""Which keys the queries of local attention see, all at once or block by block."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


def seen_keys(
    places: Tensor,
    keys: Tensor,
    tokens: int,
    window: int | Tensor | None,
    sinks: int,
    offsets: Tensor | None,
    causal: bool,
) -> Tensor:
    """Which keys queries see, ``[batch or 1, heads or 1, queries, keys]``, bool.

    Args:
        places: Positions of the queries, ``[queries]``.
        keys: Positions of the keys, ``[keys]``.
        tokens: Length of the cache.
        window: One for all heads, one for each, ``[heads]``, or None: no limit.
        sinks: As for ``local_attention``.
        offsets: As for ``local_attention``.
        causal: As for ``local_attention``.
    """
    cuts = torch.tensor([[0, tokens]], device=keys.device) if offsets is None else offsets.long()
    # The sequence of a position: how many cuts are at or before it; 0 and the last are none.
    number = (cuts[:, None, :] <= places[:, None]).sum(2)
    inside = (number > 0) & (number < cuts.shape[1])
    first = cuts.gather(1, (number - 1).clamp(min=0))
    mine = number[..., None] == (cuts[:, None, :] <= keys[:, None]).sum(2)[:, None]
    mine = mine & inside[..., None]
    limit = torch.as_tensor(tokens if window is None else window, device=keys.device)
    away = places[:, None] - keys
    near = (away if causal else away.abs()) < limit.reshape(1, -1, 1, 1)
    seen = mine[:, None] & (near | (keys < first[..., None] + sinks)[:, None])
    return seen & (away >= 0) if causal else seen


class KeyRange(NamedTuple):
    """A block of queries and the keys that it may see.

    Attributes:
        begin: Number of the first query token.
        end: Number after the last.
        pieces: Intervals of positions of keys, ascending.
        seen: As from `seen_keys`, for these queries and keys.
    """

    begin: int
    end: int
    pieces: tuple[tuple[int, int], ...]
    seen: Tensor

    def take(self, cache: Tensor) -> Tensor:
        """The keys or values at these positions."""
        parts = [cache[:, :, low:high] for low, high in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def ranges(
    shape: tuple[int, int, int, int],
    window: int | Tensor | None,
    sinks: int,
    offsets: Tensor | None,
    causal: bool,
    block: int,
    device: torch.device,
) -> Iterator[KeyRange]:
    """Cut queries into blocks, each with the keys that it may see.

    Sinks of sequences that begin anywhere, and windows that differ between heads, stand in tensors
    that are not read here; with either, the keys are all that causality leaves.

    Args:
        shape: Batch, heads, query tokens and tokens.
        window: As for `seen_keys`.
        sinks: As for `seen_keys`.
        offsets: As for `seen_keys`.
        causal: As for `seen_keys`.
        block: Query tokens of a block.
        device: Where to make the masks.
    """
    _, _, queries, tokens = shape
    before = tokens - queries
    reach = window if isinstance(window, int) and (offsets is None or sinks == 0) else tokens
    for begin in range(0, queries, block):
        end = min(begin + block, queries)
        low = max(0, before + begin - reach + 1)
        high = before + end if causal else min(tokens, before + end + reach - 1)
        pieces = [(low, high)]
        if sinks > 0 and low > 0:
            pieces = [(0, high)] if sinks >= low else [(0, sinks), (low, high)]
        keys = torch.cat([torch.arange(*piece, device=device) for piece in pieces])
        places = torch.arange(before + begin, before + end, device=device)
        seen = seen_keys(places, keys, tokens, window, sinks, offsets, causal)
        yield KeyRange(begin, end, tuple(pieces), seen)
