"""What a call costs before any work is done: each op on its smallest inputs, called every way."""

import inspect
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from adaptive import _native
from adaptive.ops import OPS
from bench.stock import smallest


def _nothing(*_: object, **__: object) -> None:
    return None


def _cost_ns(
    function: Callable[..., Any], named: dict[str, Any], given: Sequence[object], calls: int
) -> float:
    start = time.thread_time_ns()
    for _ in range(calls):
        function(*given, **named)
    return (time.thread_time_ns() - start) / calls


def call_overhead(calls: int = 1000, rounds: int = 15) -> dict[str, dict[str, float]]:
    """Nanoseconds of CPU time per call of every op, median of interleaved rounds.

    ``empty function``: what Python takes for a call with these arguments. ``native``: the kernel
    with outputs that exist already; ``into``: the same by name, through the op. ``op``: as users
    call it, which allocates the outputs. ``torch.ops``: through the dispatcher, as compiled code.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for name, op in sorted(OPS.items()):
        given = op.make_inputs(**smallest(op), dtype=torch.float32, device="cpu")
        outputs = op.outputs(*given)
        named = dict(zip(inspect.signature(op.outputs).parameters, given, strict=False))
        filled = (*outputs, None, *given)
        ways: dict[str, tuple[Callable[..., Any], dict[str, Any], Any]] = {
            "empty function": (_nothing, {}, filled),
            "native": (getattr(_native, name), {}, filled),
            "into": (op.into, named, outputs),
            "op": (op, {}, given),
            "torch.ops": (getattr(torch.ops.adaptive, name).default, {}, given),
        }
        costs: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, call in ways.items():
                costs[way].append(_cost_ns(*call, calls))
        found[name] = {way: round(median(ns), 1) for way, ns in costs.items()}
    torch.set_num_threads(threads)
    return found
