"""What a patch changed on a model, kept as plain data, and how to put it back.

A change names its module by the dotted name below the patched model, never by reference. So the log
travels with `copy.deepcopy` and pickling, a copy can be unpatched on its own, and no reference
cycle keeps weights alive.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import nn

HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks")
_ADAPTED = "base_layer"  # where a PEFT layer keeps the module that it replaced
_HOOK_FLAGS = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}


@dataclass
class AttributeChange:
    """``module.__dict__[key]`` was ``before`` (absent if not ``had``) and is now ``after``."""

    name: str
    key: str
    had: bool
    before: Any
    after: Any

    def apply(self, module: nn.Module) -> None:
        """Make the change."""
        module.__dict__[self.key] = self.after

    def conflict(self, module: nn.Module) -> str | None:
        """Say what someone else did to the attribute since, if anything."""
        if _same(module.__dict__.get(self.key), self.after):
            return None
        return f"{self.key!r} of {self.name or 'the model'!r} was replaced"

    def undo(self, module: nn.Module) -> None:
        """Put the attribute back, whether or not the change was completed."""
        if self.had:
            module.__dict__[self.key] = self.before
        else:
            module.__dict__.pop(self.key, None)


@dataclass
class HookChange:
    """``function`` was added to a hook table of the module. It is found again by identity."""

    name: str
    table: str
    function: Callable[..., Any]
    always: bool = False

    def apply(self, module: nn.Module) -> None:
        """Make the change."""
        if self.table == "_forward_pre_hooks":
            module.register_forward_pre_hook(self.function, with_kwargs=True)
        else:
            module.register_forward_hook(self.function, with_kwargs=True, always_call=self.always)

    def conflict(self, module: nn.Module) -> str | None:
        """Say what someone else did to the hook since, if anything."""
        if any(hook is self.function for hook in getattr(module, self.table).values()):
            return None
        return f"the hook {self.function.__name__!r} of {self.name or 'the model'!r} was removed"

    def undo(self, module: nn.Module) -> None:
        """Remove the hook, whether or not the change was completed."""
        hooks = getattr(module, self.table)
        for number in [n for n, hook in hooks.items() if hook is self.function]:
            del hooks[number]
            for flags in _HOOK_FLAGS[self.table]:
                getattr(module, flags).pop(number, None)


@dataclass
class ChangeLog:
    """Changes in the order they were made. An entry is written *before* its change is made."""

    entries: list[AttributeChange | HookChange] = field(default_factory=list)
    witnesses: dict[str, tuple[type, Any]] = field(default_factory=dict)
    """For each module touched: its type and its instance-level ``forward`` (None: the class's)."""

    def set(self, root: nn.Module, name: str, key: str, value: object) -> None:
        """Set ``key`` in the ``__dict__`` of the module called ``name``, undoably.

        Use it for an instance-level ``forward`` too, with a `types.MethodType` of a module-level
        function: a closure would run the original's weights in a deepcopy.
        """
        values = root.get_submodule(name).__dict__
        self.make(root, AttributeChange(name, key, key in values, values.get(key), value))

    def hook(
        self,
        root: nn.Module,
        name: str,
        table: str,
        function: Callable[..., Any],
        *,
        always: bool = False,
    ) -> None:
        """Add a module-level function to a hook table of the module, undoably.

        Args:
            root: The patched model.
            name: Dotted name of the module.
            table: One of HOOK_TABLES.
            function: Called with keyword arguments: ``(module, args, kwargs)`` before a forward,
                ``(module, args, kwargs, output)`` after one. Not a closure.
            always: Whether one after a forward runs after an exception, too, with no output.
        """
        self.make(root, HookChange(name, table, function, always))

    def make(self, root: nn.Module, change: AttributeChange | HookChange) -> None:
        """Make ``change``, undoably."""
        module = root.get_submodule(change.name)
        self.witnesses.setdefault(change.name, (type(module), own_forward(module)))
        self.entries.append(change)
        change.apply(module)
        if isinstance(change, AttributeChange) and change.key == "forward":
            self.witnesses[change.name] = (type(module), change.after)

    def conflicts(self, root: nn.Module) -> list[str]:
        """Say, naming the module, what someone else changed since. Empty: all can be put back."""
        found = []
        for name, (kind, forward) in self.witnesses.items():
            try:
                module = self._find(root, name)
            except AttributeError:
                found.append(f"module {name!r} is gone")
                continue
            if type(module) is not kind:
                found.append(f"module {name!r} was replaced by a {type(module).__name__}")
            elif not _same(own_forward(module), forward):
                found.append(f"'forward' of {name or 'the model'!r} was wrapped")
        if not found:
            checks = (entry.conflict(self._find(root, entry.name)) for entry in self.entries)
            found = [text for text in checks if text is not None]
        return found

    def undo(self, root: nn.Module) -> None:
        """Put everything back, last change first. Can be called again after an interruption."""
        while self.entries:
            entry = self.entries[-1]
            entry.undo(self._find(root, entry.name))
            self.entries.pop()
        self.witnesses.clear()

    def modules(self, root: nn.Module) -> list[nn.Module]:
        """Return the modules that were touched."""
        return [self._find(root, name) for name in self.witnesses]

    def _find(self, root: nn.Module, name: str) -> nn.Module:
        """Return the module that was touched; an adapter of PEFT may stand around it by now."""
        module = root.get_submodule(name)
        kind = self.witnesses[name][0]
        inner = module._modules.get(_ADAPTED)
        if inner is None or type(module) is kind or type(inner) is not kind:
            return module
        return inner


def own_forward(module: nn.Module) -> object:
    """Return the forward set on the instance; None if there is none or it is the class's own.

    transformers before 5.0 leaves the class's own there after it recorded hidden states.
    """
    forward = module.__dict__.get("forward")
    if getattr(forward, "__func__", None) is type(module).forward:
        return None
    return forward


def _same(found: object, installed: object) -> bool:
    """Whether nobody replaced ``installed``; deepcopy makes bound methods anew in each place."""
    return found is installed or (isinstance(found, MethodType) and found == installed)
