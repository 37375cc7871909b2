"""Peak memory of decoding, one variant per process: python -m bench.memory VARIANT SHAPE DTYPE ...

The high-water mark of the process while it decodes, less what it held once the weights were loaded
and touched. Filling the cache is not part of it: the mark is reset in between.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

STEPS = 3
STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
"""Takes "5": the high-water mark starts anew."""


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"bench: {STATUS} must have {field}")
    return int(found[1]) * 1024


@contextmanager
def peak_bytes() -> Iterator[Callable[[], int]]:
    """Give a function that tells, after the block, how much more the process held at its peak."""
    RESET.write_text("5")
    before = _status_bytes("VmRSS")
    found = []
    yield lambda: found[0]
    found.append(_status_bytes("VmHWM") - before)


def measure_memory(
    variant: str, shape: str, dtype: str, context: int, threads: int
) -> dict[str, Any]:
    """Run this module for one variant in a new process and return its finding.

    Raises:
        RuntimeError: The process failed; the end of its output says why.
    """
    command = [sys.executable, "-m", "bench.memory", variant, shape, dtype]
    done = subprocess.run(
        [*command, str(context), str(threads)],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"bench.memory {variant} failed: {done.stderr.strip()[-300:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _decode(variant: str, shape: str, dtype: torch.dtype, context: int) -> dict[str, Any]:
    from bench.llama import build, fill, kv_bytes, step
    from bench.models import MAKE_CACHE

    model = build(shape, dtype)
    if variant == "patched":
        import adaptive

        adaptive.patch(model)
    step(model, MAKE_CACHE[variant](model, 16), 1, 0)  # load and allocate what any step needs
    weights = _status_bytes("VmRSS")
    cache = MAKE_CACHE[variant](model, context + STEPS)
    fill({variant: cache}, model.config, context, dtype)
    held = _status_bytes("VmRSS") - weights
    RESET.write_text("5")
    for number in range(STEPS):
        step(model, cache, 1, context + number)
    peak = _status_bytes("VmHWM") - weights
    kv = kv_bytes(model.config, context + STEPS, dtype)
    return {
        "variant": variant,
        "model": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "context": context,
        "weights_bytes": weights,
        "kv_bytes": kv,
        "held_bytes": held,
        "peak_bytes": peak,
        "peak_over_kv": round(peak / kv, 3),
    }


def main() -> None:
    """Print the finding of one variant as one line of JSON."""
    variant, shape, dtype, context, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    with torch.inference_mode():
        print(json.dumps(_decode(variant, shape, getattr(torch, dtype), int(context))))


if __name__ == "__main__":
    main()
