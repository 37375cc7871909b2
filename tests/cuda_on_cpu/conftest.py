"""Fixtures that compile CUDA sources for the CPU."""

import platform
import shutil

import pytest
from simulated import ROOT, Builder, Simulated

SOURCES = [
    ROOT / "csrc/cuda/decode_attention_mma.cu",
    ROOT / "csrc/cuda/decode_attention.cu",
    ROOT / "tests/cuda_on_cpu/decode_attention_shim.cpp",
]


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
def objects(builder):
    """The compiled sources of decode_attention, in the order of SOURCES."""
    return builder.objects(*SOURCES)


@pytest.fixture
def decode(builder, objects):
    """decode_attention as CUDA would run it, on a device of 4 multiprocessors."""
    return Simulated(builder.library(*objects))
