"""The CUDA kernels on the CPU under the sanitizers, on random inputs in buffers without slack."""

import os
import subprocess

import pytest
from simulated import ROOT, SOURCES
from simulated_local import LOCAL_SOURCES
from simulated_sparse import SPARSE_SOURCES

HERE = ROOT / "tests/cuda_on_cpu"
PROGRAMS = {
    "decode_attention": (SOURCES, [HERE / "cuda_as_cpu.cpp", ROOT / "tests/native/driver.cpp"]),
    "sparse selection": ([*SOURCES, *SPARSE_SOURCES], [HERE / "sparse_driver.cpp"]),
    "local attention": (LOCAL_SOURCES, [HERE / "local_driver.cpp"]),
}
"""Where the kernels lie, and the program that feeds them."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_random_inputs_are_right_and_clean(builder, sanitizers, name):
    sources, driver = PROGRAMS[name]
    kernels = [source for source in sources if source.suffix == ".cu"]
    program = builder.program(*kernels, *driver, flags=("-g1", "-O0", *sanitizers))
    done = subprocess.run(
        [program, "1", "10"],
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "ADAPTIVE_SIMT_SEED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "0 wrong" in done.stdout
