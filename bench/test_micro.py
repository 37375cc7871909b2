"""Small, quick timings for catching regressions: pytest bench/test_micro.py --benchmark-compare."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from adaptive.ops import OPS, Op
from bench.stock import first, smallest, suite_for
from bench.timing import TOLERANCE, prove

CAPACITY = 2048
DTYPES = ("bfloat16", "float32")

pytestmark = pytest.mark.benchmark(timer=time.thread_time)  # CPU time: see timing.py


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads are other benchmarks' business; here one is steadier."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def forms(op: Op[..., Any], dtype: str) -> dict[str, Callable[[], torch.Tensor]]:
    """The op and its stock forms on its first published size, made short; all of them proved."""
    suite = suite_for(op)
    sizes = dict(op.models[0])
    for tokens in ("capacity", "tokens"):
        if tokens in sizes:
            sizes[tokens] = CAPACITY
    arguments = op.make_inputs(**sizes, dtype=getattr(torch, dtype), device="cpu")
    found: dict[str, Callable[[], torch.Tensor]] = {"adaptive": lambda: first(op(*arguments))}
    for name, form in suite.forms.items():
        found[name] = lambda form=form: form(*arguments)
    prove(found, suite.truth(*arguments), TOLERANCE[dtype])
    return found


CASES = [
    (op, dtype, form)
    for op in OPS.values()
    for dtype in DTYPES
    for form in ("adaptive", *suite_for(op).forms)
]


@pytest.mark.parametrize(("op", "dtype", "form"), CASES, ids=str)
def test_op(benchmark: Any, op: Op[..., Any], dtype: str, form: str) -> None:
    """One form of one op, warm."""
    benchmark.group = f"{op.name} {dtype}"
    benchmark(forms(op, dtype)[form])


@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_call_overhead(benchmark: Any, op: Op[..., Any]) -> None:
    """An op on its smallest inputs: what a call costs."""
    arguments = op.make_inputs(**smallest(op), dtype=torch.float32, device="cpu")
    benchmark.group = "call overhead"
    benchmark(op, *arguments)
