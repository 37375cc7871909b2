"""Which instruction set the CPU kernels use: chosen by what the CPU can, or forced."""

from adaptive import _native

LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")
"""Known levels, from the one that every x86-64 CPU has to the fastest."""


def cpu_level() -> str:
    """The level in use, one of :data:`LEVELS`."""
    return str(_native.cpu_level())


def set_cpu_level(level: str | None) -> None:
    """Force the instruction set of all CPU kernels in this process, for tests and measurements.

    The environment variable ``ADAPTIVE_CPU_LEVEL`` does the same from the start.

    Args:
        level: One of :data:`LEVELS`; None goes back to the best that this CPU has.

    Raises:
        ValueError: The level is unknown, or above what this CPU has.
    """
    _native.set_cpu_level(_native.best_cpu_level() if level is None else level)
