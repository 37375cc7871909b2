"""Fixtures that compile CUDA sources for the CPU."""

import platform
import subprocess
from pathlib import Path

import pytest
from simulated import SOURCES, Builder, Simulated
from simulated_local import LOCAL_SOURCES, Local
from simulated_sparse import SPARSE_SOURCES, Sparse


@pytest.fixture(scope="session")
def builder(request):
    """A compiler whose results are kept between test runs."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the simulator switches stacks on x86-64 only")
    builder = Builder(request.config.cache.mkdir("simt"))
    if builder.compiler is None:
        pytest.skip("needs a C++ compiler (g++)")
    return builder


@pytest.fixture(scope="session")
def sanitizers(builder):
    """Flags that turn on the address and undefined-behaviour sanitizers."""
    for library in ("libasan.so", "libubsan.so"):
        command = [builder.compiler, f"-print-file-name={library}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"needs {library}")
    return ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


@pytest.fixture(scope="session")
def objects(builder):
    """The compiled sources of decode_attention, in the order of SOURCES."""
    return builder.objects(*SOURCES)


@pytest.fixture
def decode(builder, objects):
    """decode_attention as CUDA would run it, on a device of 4 multiprocessors."""
    return Simulated(builder.library(*objects))


@pytest.fixture(scope="session")
def sparse_objects(builder):
    """The compiled sources of the ops of sparse selection, in the order of SPARSE_SOURCES."""
    return builder.objects(*SPARSE_SOURCES)


@pytest.fixture
def sparse(builder, objects, sparse_objects):
    """Those ops as CUDA would run them, on a device of 4 multiprocessors."""
    return Sparse(builder.library(*objects, *sparse_objects))


@pytest.fixture(scope="session")
def local_objects(builder):
    """The compiled sources of local_attention, in the order of LOCAL_SOURCES."""
    return builder.objects(*LOCAL_SOURCES)


@pytest.fixture(scope="session")
def local_shared(builder, local_objects):
    """local_attention as CUDA would run it; its settings are those of the test before."""
    return Local(builder.library(*local_objects))


@pytest.fixture
def local(local_shared):
    """local_attention as CUDA would run it, on a device of 4 multiprocessors."""
    local_shared.set_device()
    local_shared.set_seed(0)
    return local_shared
