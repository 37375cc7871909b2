"""Interleaved timing of variants of one computation, after a proof that each of them is right.

On a machine shared with other work a wall clock mostly measures the neighbours. Therefore:

* one thread: the CPU time of the calling thread, which preemption does not touch;
* several threads: wall time, counting the repetitions in which no thread of this process was
  preempted (``ru_nivcsw`` did not move) as clean, and using only those where there are enough;
* variants take turns within one process, so a slow minute is slow for all of them, and ratios are
  taken within a round.
"""

import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

Call = Callable[[], object]

ENOUGH_CLEAN = 3
"""Clean repetitions from which on the dirty ones are left out."""

TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
"""Largest relative error at which an op is still the same computation. The errors are printed."""


class WrongResultError(RuntimeError):
    """A variant disagrees with the truth, so its speed means nothing."""


@dataclass(frozen=True)
class Timing:
    """Repetitions of one variant.

    Attributes:
        rounds: Microseconds of each repetition that counts, by the round it ran in.
        clean: Repetitions during which no thread of the process was preempted.
        dropped: Preempted repetitions that were left out. Where fewer than ``ENOUGH_CLEAN`` were
            clean none is left out, and ``clean < len(rounds)`` says so.
    """

    rounds: Mapping[int, float]
    clean: int
    dropped: int

    @property
    def median_us(self) -> float:
        """Median of the repetitions that count."""
        return median(self.rounds.values())

    @property
    def minimum_us(self) -> float:
        """Fastest of the repetitions that count."""
        return min(self.rounds.values())

    def to_dict(self) -> dict[str, float | int]:
        """Return the fields of a result file."""
        return {
            "us": round(self.median_us, 3),
            "us_min": round(self.minimum_us, 3),
            "clean": self.clean,
            "dropped": self.dropped,
        }


def speedup(baseline: Timing, candidate: Timing) -> float:
    """How many times faster ``candidate`` is: median over rounds of baseline / candidate.

    Rounds in which only one of the two counts are left out; with no round in common, it is the
    ratio of the medians.
    """
    common = baseline.rounds.keys() & candidate.rounds.keys()
    if not common:
        return baseline.median_us / candidate.median_us
    return median(baseline.rounds[i] / candidate.rounds[i] for i in common)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute error over the largest absolute value of ``truth``; NaN is infinite."""
    if value.shape != truth.shape:
        raise WrongResultError(
            f"bench: shape must be {tuple(truth.shape)}, got {tuple(value.shape)}"
        )
    error = (value.double() - truth.double()).abs().max() / truth.double().abs().max()
    return float(error) if error.isfinite() else float("inf")


def prove(
    variants: Mapping[str, Callable[[], Tensor]], truth: Tensor, tolerance: float
) -> dict[str, float]:
    """Run each variant once and return its relative error; this also warms them up.

    Raises:
        WrongResultError: A variant is off by more than ``tolerance``. Nothing wrong gets timed.
    """
    errors = {}
    for name, run in variants.items():
        errors[name] = relative_error(run(), truth)
        if errors[name] > tolerance:
            raise WrongResultError(
                f"bench: the relative error of {name!r} must be at most {tolerance:g} for it to "
                f"be timed, got {errors[name]:.3g}"
            )
    return errors


def cache_flusher(size_bytes: int) -> Call:
    """Return a function that evicts every cache by reading ``size_bytes``: take twice the L3."""
    buffer = torch.ones(size_bytes // 4)
    return lambda: buffer.sum()


def interleave(
    variants: Mapping[str, Call],
    *,
    threads: int,
    repetitions: int = 11,
    at_least: int = 3,
    at_most: int = 40,
    budget_s: float = 10.0,
    before: Call | None = None,
) -> dict[str, Timing]:
    """Time ``variants`` in turn.

    Args:
        variants: What to time, warmed up already (see :func:`prove`).
        threads: Threads the variants use. 1: CPU time of this thread; more: wall time.
        repetitions: Counted repetitions after which a variant is done.
        at_least: Repetitions each variant gets even when the budget is spent.
        at_most: Repetitions, counted or dropped, after which a variant is done anyway.
        budget_s: Wall time to spend, shared equally: a slow variant leaves the rounds early and
            cannot starve a fast one.
        before: Runs before every repetition, outside the clock; a cache flusher, for example.
    """
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    clean: dict[str, dict[int, float]] = {name: {} for name in variants}
    dirty: dict[str, dict[int, float]] = {name: {} for name in variants}
    spent = dict.fromkeys(variants, 0.0)
    share = budget_s / max(1, len(variants))
    waiting = list(variants)
    turn = 0
    while waiting:
        for name in tuple(waiting):
            began = time.perf_counter()
            if before is not None:
                before()
            preempted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
            start = clock()
            variants[name]()
            elapsed = clock() - start
            preempted -= resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
            kept = clean if threads == 1 or preempted == 0 else dirty
            kept[name][turn] = elapsed / 1e3
            spent[name] += time.perf_counter() - began
            ran = turn + 1
            enough = len(clean[name]) >= repetitions or ran >= at_most
            if enough or (ran >= at_least and spent[name] >= share):
                waiting.remove(name)
        turn += 1
    return {name: _counted(clean[name], dirty[name]) for name in variants}


def _counted(clean: dict[int, float], dirty: dict[int, float]) -> Timing:
    if len(clean) >= ENOUGH_CLEAN:
        return Timing(clean, len(clean), len(dirty))
    return Timing({**clean, **dirty}, len(clean), 0)
