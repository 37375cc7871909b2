"""What a call costs before any work is done: each op on its smallest inputs, called every way."""

import inspect
import time
from collections.abc import Callable, Sequence
from itertools import product
from statistics import median
from typing import Any

import torch

from adaptive import _native
from adaptive.ops import OPS, Op
from bench.stock import empty, smallest


def _nothing(*_: object, **__: object) -> None:
    return None


def _cost_ns(
    function: Callable[..., Any], named: dict[str, Any], given: Sequence[object], calls: int
) -> float:
    start = time.thread_time_ns()
    for _ in range(calls):
        function(*given, **named)
    return (time.thread_time_ns() - start) / calls


def call_overhead(calls: int = 500, rounds: int = 15) -> dict[str, dict[str, dict[str, float]]]:
    """Nanoseconds of CPU time per call of every op, median of interleaved rounds.

    By op, then by input: ``empty`` has nothing to compute, so that only the call is left;
    ``smallest`` has one element of work. Then by way to call. ``empty function``: what Python takes
    for a call with these arguments. ``native``: the kernel with outputs that exist already;
    ``into``: the same by name, through the op. ``op``: as users call it, which allocates the
    outputs. ``torch.ops``: through the dispatcher, as compiled code.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, op in sorted(OPS.items()):
        found[name] = {}
        for label, sizes in (("empty", empty(op)), ("smallest", smallest(op))):
            if sizes is None:
                continue
            costs: dict[str, list[float]] = {}
            for _, (way, call) in product(range(rounds), _ways(op, sizes).items()):
                costs.setdefault(way, []).append(_cost_ns(*call, calls))
            found[name][label] = {way: round(median(ns), 1) for way, ns in costs.items()}
    torch.set_num_threads(threads)
    return found


def _ways(
    op: Op[..., Any], sizes: dict[str, Any]
) -> dict[str, tuple[Callable[..., Any], dict[str, Any], Sequence[Any]]]:
    given = op.make_inputs(**sizes, dtype=torch.float32, device="cpu")
    outputs = op.outputs(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = dict(zip(inspect.signature(op.outputs).parameters, given, strict=False))
    filled = (*outputs, None, *given)
    return {
        "empty function": (_nothing, {}, filled),
        "native": (getattr(_native, op.name), {}, filled),
        "into": (op.into, named, outputs),
        "op": (op, {}, given),
        "torch.ops": (getattr(torch.ops.adaptive, op.name).default, {}, given),
    }
