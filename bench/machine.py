"""What a result was measured on: facts that matter for speed; no name of a machine or user."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.timing import interleave

ROOT = Path(__file__).resolve().parent.parent
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SETTINGS = (
    "ADAPTIVE_CPU_LEVEL",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "THP_MEM_ALLOC_ENABLE",
    "TRANSFORMERS_SDPA_FORCE_GQA",
)
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve")


def _cpu_field(*names: str) -> str:
    """First value of one of these fields of /proc/cpuinfo, or an empty string."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() in names:
            return value.strip()
    return ""


def last_level_cache_bytes(default: int = 32 << 20) -> int:
    """Size of the largest cache of core 0, or ``default`` where the system does not tell."""
    sizes = [
        int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]]
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := file.read_text().strip())[-1] in "KM"
    ]
    return max(sizes, default=default)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """Commit of the working tree, with ``+changes`` where tracked source files differ from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", "adaptive", "csrc", "bench"
    )
    return f"{head}+changes" if head and changed else head or "unknown"


def huge_pages() -> str:
    """The chosen word of the transparent huge page setting: always, madvise or never."""
    text = THP.read_text() if THP.exists() else ""
    return text.partition("[")[2].partition("]")[0] or "unknown"


def facts() -> dict[str, Any]:
    """Processor, memory, versions, commit, settings and load, ready for JSON."""
    flags = set(_cpu_field("flags", "Features").split())
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: dict[str, Any] = {
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "cpu_id": "/".join(_cpu_field(f) for f in ("cpu family", "model", "stepping")),
        "isa": [flag for flag in FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_bytes": memory_bytes,
        "huge_pages": huge_pages(),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {p: _version(p) for p in ("adaptive", "torch", "transformers", "numpy")},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": gpu.name,
            "memory_bytes": gpu.total_memory,
            "multiprocessors": gpu.multi_processor_count,
            "capability": f"{gpu.major}.{gpu.minor}",
            "cuda": torch.version.cuda,
        }
    return found


def read_bandwidth(threads: int, size_bytes: int = 256 << 20, repetitions: int = 7) -> float:
    """Bytes per nanosecond (GB/s) at which ``threads`` threads read memory that is in no cache.

    The faster of summing float32 and summing int64 of the same buffer, measured like everything
    else here. Both are plain streams; a kernel with good prefetching can come close, not beyond.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        buffer = torch.ones(size_bytes // 4)
        words = buffer.view(torch.int64)
        streams = {"float32": buffer.sum, "int64": words.sum}
        for run in streams.values():
            run()
        timings = interleave(streams, threads=threads, repetitions=repetitions, budget_s=5.0)
        return max(size_bytes / (median(t.rounds.values()) * 1e3) for t in timings.values())
    finally:
        torch.set_num_threads(before)
