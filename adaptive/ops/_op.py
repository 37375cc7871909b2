"""Declares operators. The only module that talks to torch.library and to the native module.

An op is declared once, as a typed PyTorch function: the *reference*. From it come the schema and
the oracle that native kernels are tested against. The op's ``outputs`` function allocates what the
kernel fills; on fake tensors it is what torch.compile needs to know, and on meta tensors it is all
there is to do. A kernel is found by name: ``adaptive._native.<name>``, which refuses, by name, the
devices that it does not know.

An eager call outside autograd goes straight to the kernel. Under torch.compile, under autograd and
for tensor subclasses it goes through the dispatcher. Arguments that are not torch tensors but speak
DLPack (NumPy, CuPy) are viewed as tensors, and the results come back as the caller's kind.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from adaptive import _native
from adaptive.ops import interop

P = ParamSpec("P")
R = TypeVar("R")
Sizes = dict[str, Any]
MakeInputs = Callable[..., tuple[Any, ...]]
Gradient = tuple[Callable[..., None], Callable[..., tuple[Tensor | None, ...]]]

_library = torch.library.Library("adaptive", "DEF")

OPS: dict[str, Any] = {}
"""Every declared op by name. Tests and benchmarks iterate over this."""


class Op(Generic[P, R]):
    """A callable operator, and what its tests and benchmarks need to know about it.

    Attributes:
        name: Name in ``torch.ops.adaptive`` and in ``adaptive._native``.
        reference: Plain PyTorch implementation.
        outputs: Allocates the outputs for the same arguments; what they hold is undefined.
        make_inputs: Builds valid arguments from sizes, ``dtype``, ``device`` and ``seed``.
        edges: Sizes at which implementations tend to break. Tests sweep them.
        models: Sizes found in published models. Benchmarks time them.
        native: Device types that have a native kernel in this build, such as ``("cpu", "cuda")``.
    """

    def __init__(
        self,
        reference: Callable[P, R],
        outputs: Callable[..., Any],
        make_inputs: MakeInputs,
        edges: Sequence[Sizes],
        models: Sequence[Sizes],
        gradient: Gradient | None = None,
    ) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.outputs = outputs
        self.make_inputs = make_inputs
        self.edges = edges
        self.models = models
        self.__doc__ = reference.__doc__
        self._signature = inspect.signature(reference)
        self.native: tuple[str, ...] = ("cpu", "cuda") if _native.cuda else ("cpu",)

        self._kernel = getattr(_native, self.name)
        _library.define(self.name + torch.library.infer_schema(reference, mutates_args=()))
        _library.impl(self.name, self._run, "CompositeExplicitAutograd")
        if gradient is None:
            _library.impl(self.name, self._refuse_gradient, "Autograd")
        torch.library.register_fake(f"adaptive::{self.name}", outputs, lib=_library)
        if gradient is not None:
            setup, backward = gradient
            torch.library.register_autograd(
                f"adaptive::{self.name}", backward, setup_context=setup, lib=_library
            )
        self._overload: Callable[P, R] = getattr(torch.ops.adaptive, self.name).default

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the native kernel of the arguments' device; on meta tensors, say shapes only.

        Raises:
            NotImplementedError: This build has no kernel for the device.
            TypeError: An argument is unknown or missing.
        """
        if torch.compiler.is_compiling():
            return self._overload(*args, **kwargs)
        first = args[0] if args else next(iter(kwargs.values()), None)
        try:
            direct = type(first) is Tensor and not torch.is_grad_enabled() and not first.is_meta
            if direct and not recorded():
                return self._run(*args, **kwargs)
            if isinstance(first, Tensor):
                interop.refuse_arrays(self.reference, args, kwargs)
                return self._overload(*args, **kwargs)
        except (RuntimeError, TypeError):
            self._check_names(args, kwargs)  # its words are better
            raise
        self._check_names(args, kwargs)
        if first is None:
            raise TypeError(f"adaptive::{self.name}: the first argument must be a tensor, got None")
        tensors, named, restore = interop.to_torch(self.reference, args, kwargs)
        with torch.no_grad():
            return restore(self._run(*tensors, **named))  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        """Return the name under which users import this op."""
        return f"adaptive.ops.{self.name}"

    def into(self, *outputs: Tensor, **arguments: Any) -> None:
        """Run the native kernel into ``outputs``, which the caller allocated like ``outputs()``."""
        try:
            self._fill(outputs, (), arguments)
        except TypeError:
            self._check_names((), arguments)
            raise

    def _run(self, *args: P.args, **kwargs: P.kwargs) -> R:
        outputs = self.outputs(*args, **kwargs)
        self._fill(outputs if isinstance(outputs, tuple) else (outputs,), args, kwargs)
        return outputs  # type: ignore[no-any-return]

    def _fill(self, outputs: tuple[Tensor, ...], args: Any, kwargs: Any) -> None:
        # OpenMP counts threads per calling thread. Asking makes torch set that of a new one, which
        # its own ops do and the kernel, that knows no torch, cannot.
        torch.get_num_threads()
        wanted = self._kernel(*outputs, None, *args, **kwargs)
        if wanted:  # bytes of workspace, without which nothing ran
            workspace = torch.empty(wanted, dtype=torch.uint8, device=outputs[0].device)
            self._kernel(*outputs, workspace, *args, **kwargs)

    def _check_names(self, args: Any, kwargs: Any) -> None:
        """Raise TypeError unless the arguments are those of the reference, whatever they hold."""
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            names = ", ".join(self._signature.parameters)
            raise TypeError(f"adaptive::{self.name}: arguments must be {names}: {error}") from None

    def _refuse_gradient(self, *args: P.args, **kwargs: P.kwargs) -> R:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise NotImplementedError(
                f"adaptive::{self.name}: has no backward, but an argument requires a gradient. "
                "Call it under torch.no_grad(), or use its .reference, which is differentiable."
            )
        with torch._C._AutoDispatchBelowAutograd():
            return self._overload(*args, **kwargs)


def recorded() -> bool:
    """Whether someone records operations, or gives tensors another meaning than their memory.

    `torch.jit.trace`, dispatch modes, `torch.func` and forward-mode derivatives must see the op;
    a kernel that is called directly is invisible to them.
    """
    return (
        torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def op(
    *,
    outputs: Callable[..., Any],
    inputs: MakeInputs,
    edges: Sequence[Sizes],
    models: Sequence[Sizes],
    gradient: Gradient | None = None,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Turn a reference function into an operator of the same name.

    Args:
        outputs: Allocates the outputs for given arguments; see :class:`Op`.
        inputs: Builds valid arguments; ``make_inputs`` of :class:`Op`.
        edges: See :class:`Op`.
        models: See :class:`Op`.
        gradient: ``setup_context`` and ``backward`` as `torch.library.register_autograd` takes
            them; None: the op refuses arguments that require a gradient.
    """

    def declare(reference: Callable[P, R]) -> Op[P, R]:
        declared: Op[P, R] = Op(reference, outputs, inputs, edges, models, gradient)
        OPS[reference.__name__] = declared
        return declared

    return declare
