"""One pass at a time: layers that share the state of a pass must not see that of another thread."""

import threading
from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch
from torch import nn

from adaptive.layers.state import PatchRecord
from adaptive.layers.switch import Switch
from adaptive.policy import EncoderExit, MixtureOfDepths, TokenMerging, TokenPruning

_SHARE = MixtureOfDepths | EncoderExit | TokenMerging | TokenPruning
"""Policies whose layers decide together what of a pass goes on."""
_NOW = "now"
PASSES = "_adaptive_passes"
"""Key of the OnePass in the ``__dict__`` of the base module."""


class OnePass:
    """Which thread runs a pass of a model; copies belong to nobody."""

    def __init__(self, policy: str, switch: Switch) -> None:
        """Know the name of the policy whose layers share the state, and the patch's switch."""
        self.policy, self.switch = policy, switch
        self._thread: dict[str, int] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return OnePass, (self.policy, self.switch)

    def enter(self) -> None:
        """Let the pass that begins now be this thread's; off, see that none of another is running.

        Raises:
            RuntimeError: Another thread's pass is running.
        """
        mine = get_ident()
        # One step, so that of two threads that begin at once one alone is first.
        on = self.switch.on
        owner = self._thread.setdefault(_NOW, mine) if on else self._thread.get(_NOW, mine)
        if owner == mine:
            return
        if any(thread.ident == owner for thread in threading.enumerate()):
            raise RuntimeError(
                f"adaptive: {self.policy}: another thread is running a pass of this model, whose "
                "layers share its state; call it after that, or call a copy.deepcopy of the model"
            )
        self._thread[_NOW] = mine  # that thread is gone

    def leave(self) -> None:
        """Let other threads begin, if the pass is this thread's."""
        if self._thread.get(_NOW) == get_ident():
            self._thread.clear()


def install(
    root: nn.Module,
    base: str,
    record: PatchRecord,
    before: Callable[..., Any],
    after: Callable[..., Any],
) -> None:
    """Hook ``before`` and ``after`` to the base module, and around them what guards its passes."""
    policy = next((p for p in record.policies if isinstance(p, _SHARE)), None)
    if policy is not None:
        record.log.set(root, base, PASSES, OnePass(type(policy).__name__, record.switch))
        record.log.hook(root, base, "_forward_pre_hooks", enter_pass)
    record.log.hook(root, base, "_forward_pre_hooks", before)
    record.log.hook(root, base, "_forward_hooks", after)
    if policy is not None:
        record.log.hook(root, base, "_forward_hooks", leave_pass, always=True)


def enter_pass(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a pass of the base module."""
    if not torch.compiler.is_compiling():
        base.__dict__[PASSES].enter()


def leave_pass(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
) -> None:
    """After a pass of the base module, even one that an exception ended."""
    if not torch.compiler.is_compiling():
        base.__dict__[PASSES].leave()
