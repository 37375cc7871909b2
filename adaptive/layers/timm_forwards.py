"""What runs in a patched vision transformer of timm: its features, blocks and attention.

All of it is timm's own code. Attention takes what the sizes of merged tokens add to the scores
where it takes masks, and shows queries and keys to the modules that normalise them, or would.
"""

from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.layers.encoder_passes import unsupported
from adaptive.layers.instance_method import InstanceMethod
from adaptive.layers.one_pass import PASSES, OnePass
from adaptive.layers.state import STATE, LayerState, PatchRecord
from adaptive.layers.token_reduction import TokenReduction
from adaptive.layers.token_reduction_passes import finish, refuse_tracing

FORWARD = "_adaptive_encoder"
"""Key of the PatchRecord in the ``__dict__`` of the VisionTransformer."""

REDUCTION = "_adaptive_reduction"
"""Key of the TokenReduction in the ``__dict__`` of the norms of queries and keys."""

_BEHIND_IMAGES = ("attn_mask", "is_causal")


class Features(InstanceMethod):
    """The ``forward_features`` of a model: a pass in which tokens may merge or go."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the states of all tokens behind the blocks and the norm.

        Raises:
            NotImplementedError: Tokens are to merge or go, and a mask is given, or blocks would run
                again for the gradients, or torch.compile or torch.jit.trace is at work.
        """
        base = self.module
        forward = type(base).forward_features
        record: PatchRecord = base.__dict__[FORWARD]
        reduction: TokenReduction | None = record.token_reduction
        if not record.enabled:
            return forward(base, *args, **kwargs)
        if torch.compiler.is_compiling():
            if reduction is not None:
                name = type(reduction.policy).__name__
                # What is raised while a graph is made may be swallowed: this makes none here.
                torch._dynamo.graph_break(f"adaptive: {name} cannot run under torch.compile")
                raise NotImplementedError(f"adaptive: {name} cannot run under torch.compile")
            return forward(base, *args, **kwargs)
        return _counted(base, record, args, kwargs)


class Intermediates(InstanceMethod):
    """The ``forward_intermediates`` of a model whose tokens merge or go."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what it does while the patch is off.

        Raises:
            NotImplementedError: It is on.
        """
        base = self.module
        record: PatchRecord = base.__dict__[FORWARD]
        if record.enabled:
            reduction: TokenReduction = record.token_reduction
            why = f"tokens that were {reduction.verb}d have no states of their own"
            raise unsupported("forward_intermediates", reduction.policy, why)
        return type(base).forward_intermediates(base, *args, **kwargs)


class AttentionForward(InstanceMethod):
    """The forward of one attention module."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Attend, with what the sizes of the tokens add to the scores, and count the call."""
        module = self.module
        forward = type(module).forward
        state: LayerState = module.__dict__[STATE]
        record = state.record
        if not record.enabled or torch.compiler.is_compiling():
            return forward(module, *args, **kwargs)
        states: Tensor = args[0] if args else kwargs["x"]
        bias = _bias(module, states, record)
        if bias is not None:
            kwargs = {**kwargs, "attn_mask": bias}
        record.timed = states.is_cpu
        start = perf_counter()
        made = forward(module, *args, **kwargs)
        seconds = perf_counter() - start if record.timed else 0.0
        reason = "no mask" if kwargs.get("attn_mask") is None else "mask"
        state.count_stock(reason, states.shape[0] * states.shape[1], seconds)
        return made


def keep_query(
    norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], query: Tensor
) -> None:
    """Behind the norm of queries: keep them until the keys are there."""
    reduction: TokenReduction = norm.__dict__[REDUCTION]
    if reduction.active and reduction.switch.on:
        reduction.query = query


def see_key(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], key: Tensor) -> None:
    """Behind the norm of keys: show them."""
    reduction: TokenReduction = norm.__dict__[REDUCTION]
    if reduction.active and reduction.switch.on and reduction.query is not None:
        reduction.see(reduction.query, key, None)
        reduction.query = None


def _counted(base: Any, record: PatchRecord, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a pass, and count and audit what became of its tokens."""
    if record.token_reduction is None:
        return _timed(base, record, args, kwargs)
    guard: OnePass = base.__dict__[PASSES]
    guard.enter()
    try:
        return _reduced(base, record, args, kwargs)
    finally:
        guard.leave()


def _reduced(base: Any, record: PatchRecord, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    forward = type(base).forward_features
    reduction: TokenReduction = record.token_reduction
    _check(base, reduction, dict(zip(_BEHIND_IMAGES, args[1:], strict=False)) | kwargs)
    reduction.begin(None)
    before = record.forward_seconds
    try:
        made = _timed(base, record, args, kwargs)
    except BaseException:
        reduction.end()
        raise
    seconds = record.forward_seconds - before
    finish(base, record, made, lambda: (forward(base, *args, **kwargs),), None, seconds)
    return made


def _timed(base: Any, record: PatchRecord, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    start = perf_counter()
    made = type(base).forward_features(base, *args, **kwargs)
    record.forward_calls += 1
    record.forward_seconds += perf_counter() - start if record.timed else 0.0
    return made


def _check(base: Any, reduction: TokenReduction, given: dict[str, Any]) -> None:
    refuse_tracing(reduction)
    policy = reduction.policy
    for name in _BEHIND_IMAGES:
        if given.get(name) is not None and given[name] is not False:
            raise unsupported(name, policy, reduction.mask_gone)
    if base.grad_checkpointing and torch.is_grad_enabled():
        why = "blocks would run again and not know what tokens they ran on; call "
        raise unsupported("gradient checkpointing", policy, why + "set_grad_checkpointing(False)")


def _bias(module: Any, states: Tensor, record: PatchRecord) -> Tensor | None:
    """What is added to the scores of each key, as the module takes it; None: nothing."""
    reduction: TokenReduction | None = record.token_reduction
    if reduction is None or not reduction.active or reduction.bias is None:
        return None
    # PyTorch's function on a CPU takes float32 beside 16 bits, and timm's own code does not.
    return reduction.bias if states.is_cpu and module.fused_attn else reduction.bias.to(states)
