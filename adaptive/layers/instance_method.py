"""A method that patch() sets on one module, in place of its class's."""

import weakref
from typing import Any

from torch import nn


class InstanceMethod:
    """Knows its module, whose class's own method it may call.

    An object and no bound method, because it must survive pickling; and without a strong reference,
    which would be a cycle that keeps the module's weights alive. Copies and pickles arrive with the
    copy of the module.
    """

    def __init__(self, module: nn.Module) -> None:
        """Know the module."""
        self._module = weakref.ref(module)

    @property
    def module(self) -> Any:
        """The module that it is set on."""
        return self._module()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": self._module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _module=weakref.ref(state["_module"]))
