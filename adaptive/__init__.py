"""adaptive: spend a transformer's compute where it matters.

``adaptive.patch(model)`` makes a stock model faster in place; ``Patched.report()`` says what ran,
``Patched.unpatch()`` puts everything back.
"""

import torch  # noqa: F401  (first: its OpenMP runtime is the one that the kernels share)

from adaptive import _native
from adaptive.cpu_level import cpu_level, set_cpu_level

__version__ = "0.1.0"

__all__ = ["__version__", "_native", "cpu_level", "set_cpu_level"]
