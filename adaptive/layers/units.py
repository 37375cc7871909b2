"""Amounts in the units that people read."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_STEP = 1024


def in_bytes(count: float) -> str:
    """Return ``count`` bytes as text."""
    for unit in _UNITS[:-1]:
        if count < _STEP:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= _STEP
    return f"{count:.1f} {_UNITS[-1]}"
