"""The CUDA kernels on the CPU under the sanitizers, on random inputs in buffers without slack."""

import os
import subprocess

import pytest
from simulated import ROOT, SOURCES

KERNELS = [source for source in SOURCES if source.suffix == ".cu"]


@pytest.mark.slow
def test_random_inputs_are_right_and_clean(builder, sanitizers):
    program = builder.program(
        *KERNELS,
        ROOT / "tests/cuda_on_cpu/cuda_as_cpu.cpp",
        ROOT / "tests/native/driver.cpp",
        flags=("-g1", *sanitizers),
    )
    done = subprocess.run(
        [program, "1", "10"],
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "ADAPTIVE_SIMT_SEED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "0 wrong rows" in done.stdout
