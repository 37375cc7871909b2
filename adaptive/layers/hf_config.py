"""Lets a transformers model ask for another attention function, undoably."""

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from adaptive.layers import hf_attention
from adaptive.layers.changes import AttributeChange, ChangeLog

_IMPLEMENTATION = "_attn_implementation_internal"
_MISSING = object()


@dataclass
class ConfigChange(AttributeChange):
    """A module's ``config`` was swapped for a copy that asks for our attention.

    What the user sets on the copy while the model is patched goes back to the original: undoing
    takes back what patch() did, nothing else.
    """

    at_patch: dict[str, Any] = field(default_factory=dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in a copy, perhaps in a process that has patched nothing yet."""
        self.__dict__.update(state)
        hf_attention.register()

    def undo(self, module: nn.Module) -> None:
        """Put the original back, with what was set on the copy since."""
        ours = self.at_patch[_IMPLEMENTATION]
        for key, value in self.after.__dict__.items():
            if value is not self.at_patch.get(key, _MISSING) and value != ours:
                self.before.__dict__[key] = value
        super().undo(module)


def ask_for(root: nn.Module, log: ChangeLog, name: str) -> None:
    """Swap each config of the modules below ``root`` for a copy that asks for attention ``name``.

    Modules that shared one share one copy.
    """
    copies: dict[int, Any] = {}
    for module_name, module in root.named_modules():
        config = module.__dict__.get("config")
        if _IMPLEMENTATION not in getattr(config, "__dict__", {}):
            continue
        if id(config) not in copies:
            copied = copies[id(config)] = copy.copy(config)
            copied.__dict__[_IMPLEMENTATION] = name
        after = copies[id(config)]
        log.make(root, ConfigChange(module_name, "config", True, config, after, {**vars(after)}))
