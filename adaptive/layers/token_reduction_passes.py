"""Whole passes of an encoder in which tokens merge or go, whoever wrote the encoder."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.layers.encoder_passes import due, set_forwards
from adaptive.layers.state import PatchRecord
from adaptive.layers.survey import Survey
from adaptive.layers.token_merges import TokenMerges
from adaptive.layers.token_prunes import TokenPrunes
from adaptive.layers.token_reduction import ReducingLayerForward, TokenReduction
from adaptive.layers.token_reduction_log import TokenReductionLog
from adaptive.policy import TokenMerging, TokenPruning

_FEATURES = 8


def problems(survey: Survey, policy: TokenMerging | TokenPruning) -> list[str]:
    """Why tokens of the model cannot merge or go, by its sizes.

    Raises:
        ValueError: Tokens are to merge, and the width of the model is no multiple of 8.
    """
    if isinstance(policy, TokenPruning):
        return [
            "TokenPruning does not fit: this model has no class token, whose attention chooses; "
            "TokenMerging needs none"
        ] * (not survey.class_token)
    if survey.width % _FEATURES:
        raise ValueError(
            f"adaptive: TokenMerging needs a hidden size that is a multiple of {_FEATURES}, got "
            f"{survey.width}"
        )
    return []


def install(root: nn.Module, survey: Survey, record: PatchRecord) -> None:
    """Give each layer a ReducingLayerForward, undoably, if a policy lets tokens go."""
    kinds = TokenMerging | TokenPruning
    policy = next((p for p in record.policies if isinstance(p, kinds)), None)
    if policy is None:
        return
    rest = len(survey.layers), survey.protect, record.switch
    reduction: TokenReduction
    if isinstance(policy, TokenMerging):
        reduction = TokenMerges(policy, *rest)
    else:
        reduction = TokenPrunes(policy, *rest)
    record.token_reduction = reduction
    record.token_reduction_log = TokenReductionLog(verb=reduction.verb)
    set_forwards(root, survey, record, lambda layer, at: ReducingLayerForward(layer, at, reduction))


def refuse_tracing(reduction: TokenReduction) -> None:
    """Let no pass be recorded by torch.jit.trace.

    Raises:
        NotImplementedError: One is.
    """
    if torch._C._is_tracing():
        raise NotImplementedError(
            f"adaptive: {type(reduction.policy).__name__} cannot run under torch.jit.trace: which "
            f"tokens are {reduction.verb}d depends on what they hold"
        )


def finish(
    base: nn.Module,
    record: PatchRecord,
    made: Tensor,
    full: Callable[[], Any],
    mask: Tensor | None,
    seconds: float,
) -> None:
    """Count a pass that has run, and audit it if it is its turn.

    Args:
        base: The module that holds the layers.
        record: Of the patch.
        made: The states of all tokens behind the layers, ``[batch, tokens, width]``.
        full: Makes them with all tokens in all layers; the first of what it returns.
        mask: Which tokens are not padding, ``[batch, tokens]``; None: all.
        seconds: That the pass took.

    Raises:
        RuntimeError: The last layer did not run, so that states of some tokens are missing.
    """
    reduction: TokenReduction = record.token_reduction
    log = record.token_reduction_log
    lost, nan = reduction.groups is not None, reduction.nan
    tokens, reduce_seconds = reduction.end()
    if lost:
        raise RuntimeError(
            f"adaptive: {type(reduction.policy).__name__} must see the last of {reduction.layers} "
            f"layers, behind which all tokens get a state, and {len(tokens)} layers ran; patch() "
            "the model as it runs"
        )
    if log is None or not tokens:
        return
    log.count(tokens, seconds, reduce_seconds, nan)
    if due(log, reduction.policy) and not base.training:  # dropout would differ
        log.audit(made, full, mask, reduction.policy.pool, record.timed)
