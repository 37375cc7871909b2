"""Fixtures that compile CUDA sources for the CPU."""

import platform
import shutil

import pytest
from simulated import ROOT, Builder, Simulated

CUDA = [ROOT / "csrc/cuda/decode_attention.cu", ROOT / "csrc/cuda/decode_attention_mma.cu"]
SHIM = ROOT / "tests/cuda_on_cpu/decode_attention_shim.cpp"


@pytest.fixture(scope="session")
def builder(request):
    """A compiler whose results are kept between test runs."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the simulator switches stacks on x86-64 only")
    builder = Builder(request.config.cache.mkdir("simt"))
    if builder.compiler is None or not shutil.which(builder.compiler):
        pytest.skip("needs a C++ compiler (g++)")
    return builder


@pytest.fixture(scope="session")
def _library(builder):
    return builder.build([*CUDA, SHIM])


@pytest.fixture
def decode(_library):
    """decode_attention as CUDA would run it, on a device of 4 multiprocessors."""
    return Simulated(_library)
