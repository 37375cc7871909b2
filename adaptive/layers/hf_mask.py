"""A mask of transformers that exists as soon as someone looks at it, and not before.

transformers makes one mask for all layers of a kind, ``query_tokens x tokens`` and dense, before
the first of them runs. Where our attention needs no more than its pattern, it is never made.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from adaptive.layers.hf_mask_pattern import Span, read_pattern
from adaptive.layers.pattern import Pattern
from adaptive.ops import recorded

_OWN_MODULE = "transformers.masking_utils"
_METADATA = frozenset(
    {
        Tensor.dim,
        Tensor.is_floating_point,
        Tensor.numel,
        Tensor.size,
        *(
            getattr(Tensor, name).__get__
            for name in ("device", "dtype", "is_cpu", "is_cuda", "is_nested", "layout")
        ),
        *(getattr(Tensor, name).__get__ for name in ("ndim", "requires_grad", "shape")),
    }
)
"""What can be asked without a look at the elements."""


_PLACES = ("q_offset", "kv_offset", "q_length", "kv_length")
"""What transformers says of queries and keys in numbers, or in tensors of one."""


class LazyMask(Tensor):
    """What stock attention of a kind would get, ``[batch, 1, query_tokens, tokens]``.

    Any operation on it runs on the stock mask instead, which is then made. From then on it may
    have been written to, so it has no `pattern` any more.

    Attributes:
        pattern: What it lets the queries see; None once someone has looked at it.
    """

    pattern: Pattern | None

    @staticmethod
    def __new__(
        cls: type, shape: Sequence[int], dtype: torch.dtype, device: Any, *_: object
    ) -> "LazyMask":
        """Make a tensor that has a shape and no memory."""
        made: LazyMask = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        return made

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: Any,
        make: Callable[..., Tensor],
        arguments: dict[str, Any],
        pattern: Pattern,
    ) -> None:
        """Keep what makes the mask, and what it means."""
        self._make, self._arguments = make, arguments
        self._dense: Tensor | None = None
        self.pattern = pattern

    def dense(self) -> Tensor:
        """The stock mask, to be read and not written to."""
        if self._dense is None:
            self._dense = self._make(**self._arguments)
        return self._dense

    def rows(self, rows: slice) -> Tensor:
        """The stock mask of some queries alone."""
        given = {**self._arguments, "allow_is_causal_skip": False}
        if "cache_position" in given:
            given["cache_position"] = given["cache_position"][rows]
        else:
            given["q_offset"] = given.get("q_offset", 0) + rows.start
            given["q_length"] = rows.stop - rows.start
        return self._make(**given)

    def of_batch(self, rows: Tensor) -> Tensor:
        """The mask of some rows of the batch alone, ``[rows]``: lazy, unless someone has looked."""
        if self.pattern is None:
            return self.dense().index_select(0, rows)
        return _SomeRows(self, self.pattern, rows)

    def _touched(self) -> Tensor:
        self.pattern = None
        return self.dense()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer questions about the shape; run all else on the stock mask."""
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator on the stock mask."""
        args, kwargs = tree_map_only(LazyMask, LazyMask._touched, (args, kwargs or {}))
        return func(*args, **kwargs)


class _SomeRows(LazyMask):
    """Some rows of the batch of another mask."""

    @staticmethod
    def __new__(cls: type, mask: LazyMask, pattern: Pattern, rows: Tensor) -> "_SomeRows":
        """Make a tensor that has a shape and no memory."""
        shape = (len(rows), *mask.shape[1:])
        made: _SomeRows = Tensor._make_wrapper_subclass(
            cls, shape, dtype=mask.dtype, device=mask.device
        )
        return made

    def __init__(self, mask: LazyMask, pattern: Pattern, rows: Tensor) -> None:
        """Keep the whole mask, and what its rows mean."""
        self._whole, self._rows = mask, rows
        self._dense = None
        offsets = pattern.offsets
        kept = None if offsets is None else offsets.index_select(0, rows.to(offsets.device))
        self.pattern = replace(pattern, offsets=kept)

    def dense(self) -> Tensor:
        """The stock mask, to be read and not written to."""
        if self._dense is None:
            self._dense = self._whole.dense().index_select(0, self._rows)
        return self._dense

    def rows(self, rows: slice) -> Tensor:
        """The stock mask of some queries alone."""
        return self._whole.rows(rows).index_select(0, self._rows)


def make_mask(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer transformers' request for a mask as its function for ``kind`` would.

    Args:
        kind: "sdpa" or "eager".
        args: What transformers hands over by position; in no version anything.
        kwargs: And by name.

    Returns:
        None where stock makes none; a LazyMask where its pattern is known; else stock's mask.
    """
    make = ALL_MASK_ATTENTION_FUNCTIONS[kind]
    if args or torch.compiler.is_compiling() or recorded() or make.__module__ != _OWN_MODULE:
        return make(*args, **kwargs)
    if kwargs.get("use_vmap") or _makes_none(make, kwargs):
        return make(**kwargs)
    # A static cache counts in a tensor that it writes to before someone may look at the mask.
    now = {name: int(kwargs[name]) for name in _PLACES if isinstance(kwargs.get(name), Tensor)}
    kwargs = {**kwargs, **now}
    queries, device = _queries(kwargs)
    keys = Span(int(kwargs.get("kv_offset", 0)), int(kwargs["kv_length"]))
    batch = kwargs["batch_size"]
    padding = kwargs.get("attention_mask")
    if queries is None or (padding is not None and type(padding) is not Tensor):
        return make(**kwargs)
    function = kwargs.get("mask_function", causal_mask_function)
    pattern = read_pattern(function, padding, batch, queries, keys)
    if pattern is None:
        return make(**kwargs)
    dtype = torch.bool if kind == "sdpa" else kwargs.get("dtype", torch.float32)
    shape = (batch, 1, queries.count, keys.count)
    return LazyMask(shape, dtype, device, make, kwargs, pattern)


def _queries(kwargs: dict[str, Any]) -> tuple[Span | None, Any]:
    """Positions of the queries, None if they do not follow each other, and the mask's device."""
    places = kwargs.get("cache_position")  # before 5.4
    if places is None:
        start, count = int(kwargs.get("q_offset", 0)), int(kwargs["q_length"])
        return Span(start, count), kwargs.get("device", "cpu")
    one_by_one = len(places) > 0 and bool((places.diff() == 1).all())
    return (Span(int(places[0]), len(places)) if one_by_one else None), places.device


class _AskedError(Exception):
    """Stock has begun to make a mask."""


def _asked(*_: object) -> Any:
    raise _AskedError


def _makes_none(make: Callable[..., Tensor | None], kwargs: dict[str, Any]) -> bool:
    """Whether stock does without a mask: then it never asks the mask function anything."""
    try:
        return make(**{**kwargs, "mask_function": _asked}) is None
    except _AskedError:
        return False
