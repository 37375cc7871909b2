"""Whole passes of an encoder of transformers in which tokens merge or go: before and after."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.layers.encoder_passes import unsupported
from adaptive.layers.hf_encoder_passes import (
    PER_TOKEN,
    argument,
    not_per_token,
    runs_again,
)
from adaptive.layers.state import PatchRecord
from adaptive.layers.token_reduction import TokenReduction
from adaptive.layers.token_reduction_passes import finish, refuse_tracing
from adaptive.policy import Policy


def begin(
    base: nn.Module, record: PatchRecord, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Before a pass of the base module.

    Raises:
        NotImplementedError: torch.jit.trace is at work; or the pass must return attention weights
            or the states of every layer, which have no rows for tokens that went; or some heads are
            masked; or layers are to run again for the gradients.
        ValueError: The mask does not say which tokens at the start of a row are real.
    """
    reduction: TokenReduction | None = record.token_reduction
    if reduction is None:
        return
    if record.in_graph:
        reduction.in_graph = True
        return
    policy = reduction.policy
    refuse_tracing(reduction)
    wanted = argument(base, "output_hidden_states", args, kwargs)
    config: Any = base.config
    states = config.output_hidden_states if wanted is None else wanted
    for name, asked in (("attentions", record.want_weights), ("hidden_states", states)):
        if asked:
            why = f"tokens that were {reduction.verb}d have none of their own"
            raise unsupported(f"output_{name}", policy, why)
    if argument(base, "head_mask", args, kwargs) is not None:
        raise unsupported("head_mask", policy, reduction.mask_gone)
    if runs_again(base):
        why = "layers would run again and not know what tokens they ran on; call "
        raise unsupported(
            "gradient checkpointing", policy, why + "gradient_checkpointing_disable()"
        )
    reduction.begin(_lengths(argument(base, "attention_mask", args, kwargs), policy))


def end(
    base: nn.Module,
    record: PatchRecord,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    seconds: float,
) -> None:
    """After a pass of the base module: count it, and audit it if it is its turn."""
    if record.token_reduction is None or not record.token_reduction.active:
        return
    full = functools.partial(base.forward, *args, **kwargs)
    mask = argument(base, "attention_mask", args, kwargs)
    finish(base, record, output[0], full, mask, seconds)


def _lengths(mask: Any, policy: Policy) -> Tensor | None:
    """How many tokens of each row are real, ``[batch]``, int32; None: all.

    Raises:
        ValueError: Padding lies elsewhere than behind the tokens.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != PER_TOKEN:
        raise not_per_token(mask, policy)
    real = mask != 0
    lengths = real.sum(1, dtype=torch.int32)
    if bool(real.all()):
        return None
    if not bool((real[:, :-1] >= real[:, 1:]).all()):
        raise ValueError(
            "adaptive: attention_mask must have all padding behind the tokens of its row with "
            f"{type(policy).__name__} (padding_side='right'), got padding before or between them"
        )
    return lengths


def protected(config: Any) -> int:
    """Tokens at the start of a sequence that heads read by their place, and that always stay."""
    kind = config.model_type
    if kind.startswith("siglip"):
        return 0
    if kind == "deit":
        return 2
    return 1 + getattr(config, "num_register_tokens", 0)
