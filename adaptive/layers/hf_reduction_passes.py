"""Whole passes of an encoder in which tokens merge or go: before, after, and the audits."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.layers.hf_encoder_passes import (
    PER_TOKEN,
    argument,
    due,
    not_per_token,
    runs_again,
    set_forwards,
    unsupported,
)
from adaptive.layers.hf_token_merging import TokenMerges
from adaptive.layers.hf_token_pruning import TokenPrunes
from adaptive.layers.hf_token_reduction import ReducingLayerForward, TokenReduction
from adaptive.layers.state import PatchRecord
from adaptive.layers.survey import Survey
from adaptive.layers.token_reduction_log import TokenReductionLog
from adaptive.policy import Policy, TokenMerging, TokenPruning

_FEATURES = 8


def check_width(root: nn.Module, survey: Survey) -> None:
    """Look, before anything is changed, whether tokens of this model can merge.

    Raises:
        ValueError: The width of the model is no multiple of 8.
    """
    config: Any = root.get_submodule(survey.base).config
    if config.hidden_size % _FEATURES:
        raise ValueError(
            f"adaptive: TokenMerging needs a hidden size that is a multiple of {_FEATURES}, got "
            f"{config.hidden_size}"
        )


def has_class_token(root: nn.Module, survey: Survey) -> bool:
    """Whether the first token of the model stands for all of them."""
    return _protected(root.get_submodule(survey.base).config) > 0


def install(root: nn.Module, survey: Survey, record: PatchRecord) -> None:
    """Give each layer a ReducingLayerForward, undoably, if a policy lets tokens go."""
    kinds = TokenMerging | TokenPruning
    policy = next((p for p in record.policies if isinstance(p, kinds)), None)
    if policy is None:
        return
    config: Any = root.get_submodule(survey.base).config
    rest = len(survey.layers), _protected(config), record.switch
    reduction: TokenReduction
    if isinstance(policy, TokenMerging):
        reduction = TokenMerges(policy, *rest)
    else:
        reduction = TokenPrunes(policy, *rest)
    record.token_reduction = reduction
    record.token_reduction_log = TokenReductionLog(verb=reduction.verb)
    set_forwards(root, survey, record, lambda layer, at: ReducingLayerForward(layer, at, reduction))


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
    if torch._C._is_tracing():
        raise NotImplementedError(
            f"adaptive: {type(policy).__name__} cannot run under torch.jit.trace: which tokens are "
            f"{reduction.verb}d depends on what they hold"
        )
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
    reduction: TokenReduction | None = record.token_reduction
    log = record.token_reduction_log
    if reduction is None or log is None or not reduction.active:
        return
    nan = reduction.nan
    tokens, reduce_seconds = reduction.end()
    if not tokens:
        return
    log.count(tokens, seconds, reduce_seconds, nan)
    if not due(log, reduction.policy) or base.training:  # dropout would differ
        return
    full = functools.partial(base.forward, *args, **kwargs)
    mask = argument(base, "attention_mask", args, kwargs)
    log.audit(output[0], full, mask, reduction.policy.pool, record.timed)


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


def _protected(config: Any) -> int:
    """Tokens at the start of a sequence that heads read by their place, and that always stay."""
    kind = config.model_type
    if kind.startswith("siglip"):
        return 0
    if kind == "deit":
        return 2
    return 1 + getattr(config, "num_register_tokens", 0)
