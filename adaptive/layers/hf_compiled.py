"""Refuses graphs where a model generates by passes of its own: what those do depends on tokens."""

from typing import Any

import torch
from torch import nn

from adaptive.layers.depth import ModuleForward
from adaptive.layers.state import STATE


def in_graph() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is at work on what now runs.

    For code of a broken graph, too, which runs as it is: what that calls, as this, is compiled.
    """
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of a module run compiled: by `module.compile()`, or a compiled forward."""
    own: Any = module
    forwards = module.__dict__.get("forward"), type(module).forward
    return own._compiled_call_impl is not None or any(
        hasattr(forward, "_torchdynamo_orig_callable")
        and not getattr(forward, "_torchdynamo_disable", False)
        for forward in forwards
    )


def refuse_graphs(what: str, model: nn.Module) -> None:
    """Raise if a graph would hold the passes of a call, or of layers in it.

    Args:
        what: Who generates, as errors begin.
        model: A patched model.

    Raises:
        NotImplementedError: The call is compiled or traced, or one of the modules that hold its
            attention is; it is named.
    """
    if in_graph():
        raise NotImplementedError(
            f"{what} cannot run under torch.compile, torch.export or torch.jit.trace: what its "
            "passes do depends on the tokens; call it as it is"
        )
    for name, module in model.named_modules():
        if is_compiled(module) and any(_runs_in_part(part) for part in module.modules()):
            raise NotImplementedError(
                f"{what} cannot run with compiled attention or layers, got a compiled "
                f"{type(module).__name__} at {name!r}; leave it as it is, or use "
                "torch.compile(model), which leaves the model's own calls as they are"
            )


def _runs_in_part(module: nn.Module) -> bool:
    return STATE in module.__dict__ or isinstance(module.__dict__.get("forward"), ModuleForward)
