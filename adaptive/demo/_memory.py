"""Peak memory of decoding one variant, measured in a process of its own (Linux).

``python -m adaptive.demo._memory`` reads its job as JSON on stdin and prints bytes as JSON. A
process of its own, because memory that another variant has freed would hide what this one needs.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FIRST_TOKEN = 2
"""The streamer's second call: the first brings the prompt."""

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def available() -> bool:
    """Whether this system can tell and reset a process's peak memory."""
    return _CLEAR.exists()


def measure(
    model: Path, dtype: str, threads: int, prompt: Sequence[int], new_tokens: int, patch: bool
) -> int:
    """Return the peak bytes of decoding above the loaded model: cache, copies and scratch."""
    job = {
        "model": str(model),
        "dtype": dtype,
        "threads": threads,
        "prompt": list(prompt),
        "new_tokens": new_tokens,
        "patch": patch,
    }
    done = subprocess.run(
        [sys.executable, "-m", "adaptive.demo._memory"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the memory measurement failed:\n{done.stderr}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


class _ResetAtFirstToken:
    """A streamer that forgets the peak of the prefill when decoding starts."""

    def __init__(self) -> None:
        self._seen = 0

    def put(self, value: Any) -> None:
        """Count the prompt and the tokens; act on the first token."""
        self._seen += 1
        if self._seen == FIRST_TOKEN:
            _settle()
            _CLEAR.write_text("5")

    def end(self) -> None:
        """Take the end of the text."""


def _settle() -> None:
    """Give freed memory back to the system, so that it is not counted as used."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _bytes(field: str) -> int:
    """Read a size of this process, such as VmRSS or VmHWM."""
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def _main() -> None:
    """Do the job on stdin."""
    import torch
    from transformers import AutoModelForCausalLM

    import adaptive
    from adaptive.demo._generate import Clock, generate

    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    dtype = getattr(torch, job["dtype"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).eval()
    if job["patch"]:
        adaptive.patch(model)
    generate(model, job["prompt"][:64], 8, Clock())  # what any first call allocates
    _settle()
    before = _bytes("VmRSS")
    generate(model, job["prompt"], job["new_tokens"], _ResetAtFirstToken())
    print(json.dumps({"peak_bytes": _bytes("VmHWM") - before}))


if __name__ == "__main__":
    _main()
