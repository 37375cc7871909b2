"""What passes of an encoder that does less than its work share, whoever wrote the encoder."""

from collections.abc import Callable
from typing import Any

from torch import nn

from adaptive.layers.encoder_exit_log import EncoderExitLog
from adaptive.layers.state import PatchRecord
from adaptive.layers.survey import Survey
from adaptive.layers.token_reduction_log import TokenReductionLog
from adaptive.policy import EncoderExit, Policy, TokenMerging, TokenPruning


def set_forwards(
    root: nn.Module,
    survey: Survey,
    record: PatchRecord,
    make: Callable[[nn.Module, int], Callable[..., Any]],
) -> None:
    """Give each layer the forward that ``make`` makes of it and its number, undoably."""
    for index, name in enumerate(survey.layers):
        record.log.set(root, name, "forward", make(root.get_submodule(name), index))


def due(
    log: EncoderExitLog | TokenReductionLog, policy: EncoderExit | TokenMerging | TokenPruning
) -> bool:
    """Whether the pass that was just counted is one to audit."""
    return policy.audit_every is not None and (log.calls - 1) % policy.audit_every == 0


def unsupported(name: str, policy: Policy, why: str) -> NotImplementedError:
    """The error of a pass that asks for what the policy cannot give."""
    kind = type(policy).__name__
    return NotImplementedError(f"adaptive: {name} is not supported with {kind}: {why}")
