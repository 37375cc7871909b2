"""Every instruction set that this CPU runs gives right results, and can be chosen by name."""

import os
import subprocess
import sys

import pytest
import torch
from decode_cases import BF16, EDGES, F16, assert_accurate
from levels import EVERY, LEVELS

import adaptive
from adaptive import _native
from adaptive.ops import decode_attention

pytestmark = pytest.mark.usefixtures("_restored")


@pytest.fixture
def _restored():
    before = adaptive.cpu_level()
    with torch.no_grad():
        yield
    adaptive.set_cpu_level(before)


@pytest.mark.parametrize("level", EVERY)
@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES)
def test_edges(case, level):
    adaptive.set_cpu_level(level)
    assert_accurate(decode_attention, case.arguments())


@pytest.mark.parametrize("level", EVERY)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_every_16_bit_value_is_converted_exactly(level, dtype):
    adaptive.set_cpu_level(level)
    value = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(256, 1, 1, 256)
    out, _ = decode_attention(torch.zeros_like(value), torch.zeros_like(value), value)
    torch.testing.assert_close(out, value.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("level", EVERY)
def test_a_level_stays_until_it_is_changed(level):
    adaptive.set_cpu_level(level)
    assert adaptive.cpu_level() == level
    adaptive.set_cpu_level(None)
    assert adaptive.cpu_level() == _native.best_cpu_level()


@pytest.mark.parametrize("name", ["sse9", "", "AVX2", "avx512 "])
def test_nonsense_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"baseline, avx2, avx512 or avx512_bf16, got {name}"):
        adaptive.set_cpu_level(name)


@pytest.mark.skipif(EVERY == LEVELS, reason="this CPU has every level")
def test_a_level_above_the_best_is_refused():
    with pytest.raises(ValueError, match=f"at most {EVERY[-1]} on this CPU"):
        adaptive.set_cpu_level(LEVELS[len(EVERY)])


@pytest.mark.parametrize(
    ("value", "expected"),
    [("baseline", "baseline"), ("", EVERY[-1]), ("avx3", "ADAPTIVE_CPU_LEVEL must be base")],
)
def test_the_environment_sets_the_first_level(value, expected):
    done = subprocess.run(
        [sys.executable, "-c", "import adaptive; print(adaptive.cpu_level())"],
        env={**os.environ, "ADAPTIVE_CPU_LEVEL": value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert expected in done.stdout + done.stderr
    assert (done.returncode == 0) == (expected in LEVELS)
