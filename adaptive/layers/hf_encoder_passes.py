"""Whole passes of an encoder that sequences may leave early: before, after, and the audits."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.layers.encoder_exit_log import EncoderExitLog
from adaptive.layers.encoder_passes import due, set_forwards, unsupported
from adaptive.layers.hf_encoder_exit import EncoderExits, EncoderLayerForward
from adaptive.layers.state import PatchRecord
from adaptive.layers.survey import Survey
from adaptive.policy import EncoderExit, Policy

PER_TOKEN = 2
"""Axes of a mask that says of each token whether it is padding."""


def check_fit(root: nn.Module, survey: Survey, policy: EncoderExit) -> None:
    """Look, before anything is changed, whether the gate of the policy fits this model.

    Raises:
        ValueError: It is for states of another width.
    """
    config: Any = root.get_submodule(survey.base).config
    width = config.hidden_size
    if policy.gate is not None and policy.gate.width != width:
        raise ValueError(
            f"adaptive: EncoderExit.gate must be for states of width {width}, "
            f"got {policy.gate.width}"
        )


def install(root: nn.Module, survey: Survey, record: PatchRecord) -> None:
    """Give each layer an EncoderLayerForward, undoably, if a policy lets sequences leave."""
    policy = next((p for p in record.policies if isinstance(p, EncoderExit)), None)
    if policy is None:
        return
    exits = EncoderExits(policy, len(survey.layers), record.switch)
    record.encoder_exits = exits
    record.encoder_exit_log = EncoderExitLog(layers=exits.layers)
    set_forwards(root, survey, record, lambda layer, at: EncoderLayerForward(layer, at, exits))


def begin(
    base: nn.Module, record: PatchRecord, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Before a pass of the base module.

    Raises:
        NotImplementedError: torch.jit.trace is at work, the model trains, or the pass must return
            attention weights, which have no rows for sequences that left.
        ValueError: The mask does not tell which tokens are padding, and that must be known.
    """
    exits: EncoderExits | None = record.encoder_exits
    if exits is None:
        return
    if record.in_graph:
        exits.in_graph = True
        return
    if exits.policy.layer is None and torch._C._is_tracing():
        raise NotImplementedError(
            "adaptive: EncoderExit cannot run under torch.jit.trace: where sequences leave depends "
            "on what they hold"
        )
    if base.training and torch.is_grad_enabled():
        raise NotImplementedError(
            "adaptive: EncoderExit is for inference: call model.eval(), or unpatch() it to train"
        )
    if record.want_weights:
        why = "sequences that left have no attention weights"
        raise unsupported("output_attentions", exits.policy, why)
    mask = argument(base, "attention_mask", args, kwargs)
    reads = exits.policy.layer is None or exits.policy.audit_every is not None
    if reads and isinstance(mask, Tensor) and mask.dim() != PER_TOKEN:
        raise not_per_token(mask, exits.policy)
    exits.begin(mask if isinstance(mask, Tensor) else None)


def end(
    base: nn.Module,
    record: PatchRecord,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    seconds: float,
) -> None:
    """After a pass of the base module: count it, and audit it if it is its turn."""
    exits: EncoderExits | None = record.encoder_exits
    log = record.encoder_exit_log
    if exits is None or log is None or not exits.active:
        return
    mask = exits.mask
    log.count(exits.end(), seconds)
    if due(log, exits.policy):
        full = functools.partial(base.forward, *args, **kwargs)
        log.audit(output[0], full, mask, exits.policy.pool, record.timed)


def runs_again(base: nn.Module) -> bool:
    """Whether layers are to run once more after the pass, for the gradients."""
    if not base.training or not torch.is_grad_enabled():
        return False
    return any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


def not_per_token(mask: object, policy: Policy) -> ValueError:
    """The error of a mask that does not tell which tokens are padding."""
    got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    return ValueError(
        f"adaptive: attention_mask must be [batch, tokens] with {type(policy).__name__}, to tell "
        f"padding from tokens, got {got}"
    )


def argument(base: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the base module was given for an argument, by name or by position."""
    if name in kwargs or not args:
        return kwargs.get(name)
    names = list(inspect.signature(type(base).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)).get(name)
