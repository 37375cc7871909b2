"""DLPack interop: lets ops take NumPy, CuPy and other arrays, and answer in the caller's kind.

Nothing is copied on the way in or out. Arguments must be of one kind; an array that cannot be
viewed as a tensor is refused by the argument's name, because a silent copy of a KV cache would cost
more than the op.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Restore = Callable[[Any], Any]


def to_torch(
    reference: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Restore]:
    """View the arrays among an op's arguments as tensors.

    The first argument decides the kind; None, numbers and flags pass through. On a GPU the
    protocol orders the streams: torch's current stream waits for the producer of each array, and
    the caller's for torch when it takes the result.

    Args:
        reference: The op's reference; its parameters name the arguments.
        args: Positional arguments of the call.
        kwargs: Named arguments of the call.

    Returns:
        ``(args, kwargs, restore)``: the arguments with tensors in place of arrays, and the function
        that turns the op's tensor, or tuple of tensors, back into arrays of the caller's kind. Both
        directions share memory.

    Raises:
        TypeError: An argument is of another kind than the first, its dtype has no counterpart in
            torch, or the first is no array.
        ValueError: An array has a layout or byte order that no tensor can have.
    """
    arguments = [*zip(_names(reference), args, strict=False), *kwargs.items()]
    first_name, first = arguments[0]
    if not hasattr(first, "__dlpack__"):
        raise TypeError(
            f"adaptive::{reference.__name__}: {first_name} must be a torch.Tensor or speak DLPack, "
            f"got {_kind(first)}"
        )
    viewed = []
    for name, value in arguments:
        if not hasattr(value, "__dlpack__"):
            viewed.append(value)
            continue
        where = f"adaptive::{reference.__name__}: {name} must"
        if _package(value) != _package(first):
            raise TypeError(f"{where} be a {_kind(first)} like {first_name}, got {_kind(value)}")
        viewed.append(_view(value, where))
    count = len(args)
    names = [name for name, _ in arguments[count:]]
    return tuple(viewed[:count]), dict(zip(names, viewed[count:], strict=True)), _restore(first)


def refuse_arrays(
    reference: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Raise TypeError if an argument beside a first tensor is an array that is none."""
    names = _names(reference)
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        if not isinstance(value, Tensor) and hasattr(value, "__dlpack__"):
            raise TypeError(
                f"adaptive::{reference.__name__}: {name} must be a torch.Tensor like {names[0]}, "
                f"got {_kind(value)}"
            )


@lru_cache
def _names(reference: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(reference).parameters)


def _package(value: object) -> str:
    return "numpy" if _is_numpy(value) else type(value).__module__.partition(".")[0]


def _kind(value: object) -> str:
    package, name = _package(value), type(value).__name__
    return name if package == "builtins" else f"{package}.{name}"


def _is_numpy(value: object) -> bool:
    numpy = sys.modules.get("numpy")  # never imported here: who passes an array has done so
    return numpy is not None and isinstance(value, numpy.ndarray)


class _Writable:
    """The memory of a read-only NumPy array, offered as writable; ops never write to arguments."""

    def __init__(self, array: Any) -> None:
        self._keep_alive = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def _view(array: Any, where: str) -> Tensor:
    if not _is_numpy(array):
        try:
            return torch.utils.dlpack.from_dlpack(array)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"{where} be an array that torch can view, got {error}") from error
    numpy = sys.modules["numpy"]
    if isinstance(array, numpy.ma.MaskedArray):
        raise TypeError(f"{where} be an array without a mask of its own, got numpy.MaskedArray")
    if not array.dtype.isnative:
        raise ValueError(f"{where} have the byte order of this machine, got {array.dtype.str}")
    if not array.flags.aligned or any(s < 0 or s % array.itemsize for s in array.strides):
        raise ValueError(
            f"{where} have aligned elements and strides of whole elements, none negative, "
            f"got {list(array.strides)} bytes for elements of {array.itemsize}"
        )
    try:
        return torch.from_numpy(array if array.flags.writeable else numpy.asarray(_Writable(array)))
    except TypeError as error:
        raise TypeError(f"{where} have a dtype that torch knows, got {array.dtype}") from error


def _restore(first: Any) -> Restore:
    back: Restore = Tensor.numpy
    if not _is_numpy(first):
        namespace = getattr(first, "__array_namespace__", None)
        back = (namespace() if namespace else sys.modules[_package(first)]).from_dlpack

    def restore(result: Any) -> Any:
        return tuple(map(back, result)) if isinstance(result, tuple) else back(result)

    return restore
