"""Reads what mask functions of transformers mean, from the functions that they are composed of.

transformers describes a mask by a function of row, head, query and key position, composed from a
few known ones. What is not known here, such as a function of the user's, has no pattern.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from adaptive.layers.pattern import Pattern, cut_at

MaskFunction = Callable[..., Any]


@dataclass(frozen=True)
class Span:
    """Positions that follow each other: ``start``, ``start + 1`` and so on, ``count`` of them."""

    start: int
    count: int


@dataclass
class _Found:
    """What a composed mask function consists of.

    Attributes:
        causal: Whether no query sees a later key.
        window: Keys less than this away are seen; None: all.
        both_ways: Whether that holds for later keys, too.
        chunks: Size, padding on the left of each row, and the positions that are counted.
        packed: Numbers of sequences, ``[batch, tokens]``.
        positions: Positions within packed sequences, ``[batch, tokens]``.
    """

    causal: bool = False
    window: int | None = None
    both_ways: bool = False
    chunks: list[tuple[int, Tensor, Tensor | None]] = field(default_factory=list)
    packed: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)


def read_pattern(
    function: MaskFunction, padding: Tensor | None, batch: int, queries: Span, keys: Span
) -> Pattern | None:
    """Say what a mask function of transformers lets the queries see; None if that is not known.

    Args:
        function: As composed by `transformers.masking_utils`, without the padding.
        padding: Which tokens are not padding, ``[batch, tokens]``, bool, from position 0 on; what
            it does not reach is padding. None: there is none.
        batch: Rows.
        queries: Positions of the queries.
        keys: Positions of the keys.
    """
    found = _Found()
    tokens = queries.start + queries.count - keys.start
    if not 1 <= queries.count <= tokens <= keys.count or not _read(function, found, None):
        return None
    if not found.causal and (tokens < keys.count or (found.window and not found.both_ways)):
        return None
    if padding is not None and (padding.dtype != torch.bool or len(padding) != batch):
        return None
    cuts = _cuts(found, batch, keys.start, tokens)
    if cuts is None:
        return None
    visible = None
    if padding is not None:
        visible = padding[:, keys.start : keys.start + tokens]
        visible = torch.nn.functional.pad(visible, (0, tokens - visible.shape[1]))
    known, offsets = cut_at(visible, cuts if cuts.numel() else None)
    return Pattern(tokens, found.window, offsets, found.causal) if known else None


def _read(function: MaskFunction, found: _Found, positions: Tensor | None) -> bool:
    """Add what a function means to what was found; False if that is not known."""
    if function is masking_utils.causal_mask_function:
        found.causal = True
        return True
    if function is getattr(masking_utils, "bidirectional_mask_function", None):
        return True
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return False
    maker = function.__qualname__.partition(".<locals>.")[0]
    cells = function.__closure__ or ()
    held = {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True)
    }
    if maker == "and_masks":
        return all(_read(each, found, positions) for each in held["mask_functions"])
    if maker == "remap_positions_for_packed_sequence" and positions is None:
        found.positions.append(held["position_ids"])
        return _read(held["mask_function"], found, held["position_ids"])
    if maker == "sliding_window_overlay":
        found.window = min(held["sliding_window"], found.window or held["sliding_window"])
    elif maker == "sliding_window_bidirectional_overlay" and found.window is None:
        found.window, found.both_ways = held["sliding_window"] + 1, True
    elif maker == "chunked_overlay":
        found.chunks.append((held["chunk_size"], held["left_padding"], positions))
    elif maker == "packed_sequence_mask_function":
        found.packed.append(held["packed_sequence_mask"])
    else:
        return False
    return isinstance(found.window, int | None) and (found.window is None or found.window > 0)


def _cuts(found: _Found, batch: int, start: int, tokens: int) -> Tensor | None:
    """Which keys are the first of a packed sequence or a chunk, ``[batch, tokens]``.

    Returns:
        Nothing, ``[batch, 0]``, where there is neither; None where it is not what it seems.
    """
    numbers = []
    for packed in found.packed:
        if start or packed.shape != (batch, tokens):
            return None
        numbers.append(packed)
    for size, left, positions in found.chunks:
        if positions is None:
            positions = torch.arange(start, start + tokens, device=left.device)[None]
        numbers.append((positions - left[:, None]) // size)
    if not numbers:
        return None if found.positions else torch.zeros(batch, 0, dtype=torch.bool)
    changes = [torch.zeros(batch, 1, dtype=torch.bool, device=numbers[0].device)]
    steps = [number.diff(dim=1) for number in numbers]
    changed = torch.stack([(step != 0).expand(batch, -1) for step in steps]).any(0)
    # A sequence is one run of tokens, and its positions follow each other.
    if any(bool((packed.diff(dim=1) < 0).any()) for packed in found.packed):
        return None
    for positions in found.positions:
        cut = torch.stack([packed.diff(dim=1) != 0 for packed in found.packed]).any(0)
        if not bool((cut | (positions.diff(dim=1) == 1)).all()):
            return None
    return torch.cat([*changes, changed], dim=1)
