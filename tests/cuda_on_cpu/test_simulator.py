"""The simulator itself: it runs right code right, and it catches the bugs it promises to catch."""

import ctypes
import os
import re
import subprocess
import sys

import pytest
import torch
from simulated import ROOT

HERE = ROOT / "tests/cuda_on_cpu"


@pytest.fixture(scope="module")
def library(builder):
    return builder.library(*builder.objects(HERE / "simulator_kernels.cpp"))


@pytest.fixture(params=[0, 1, 2, 3])
def run(request, library):
    """Runs a tiny kernel under one order of threads; raises what the simulator raises."""
    library.set_seed(request.param)

    def run(kernel, values, size=64):
        out = torch.full((size,), -1.0)
        message = ctypes.create_string_buffer(1000)
        pointers = (ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        if library.run(kernel.encode(), *pointers, message, ctypes.c_int64(1000)):
            raise RuntimeError(message.value.decode())
        return out

    return run


VALUES = torch.linspace(-3.0, 5.0, 64)
HALVES = VALUES.view(2, 2, 16)
RIGHT = {
    "reverse": VALUES.flip(0),
    "reverse_lanes": VALUES.view(2, 32).flip(1).flatten(),
    "copy": VALUES,
    "copy_nothing": torch.zeros(64),
    "sum_lanes": VALUES.view(2, 32).sum(1, keepdim=True).expand(2, 32).flatten(),
    "broadcast": VALUES[[5, 37]].repeat_interleave(32),
    "halves": torch.stack(
        [HALVES[:, 0].sum(1, keepdim=True).expand(2, 16), HALVES[:, 1, 15:].expand(2, 16)], 1
    ).flatten(),
    "vote": torch.tensor([0.0, 65535.0]).repeat_interleave(32),
}


@pytest.mark.parametrize("kernel", RIGHT)
def test_right_kernels_run_right(run, kernel):
    torch.testing.assert_close(run(kernel, VALUES), RIGHT[kernel])


def test_coordinates_cover_the_grid(run):
    x, y, z = torch.arange(4), torch.arange(2) * 10, torch.arange(2) * 100
    thread = z[:, None, None] + y[:, None] + x
    block = torch.arange(3)[:, None] * 10000 + torch.arange(2) * 1000
    expected = block.flatten()[:, None] + thread.flatten()
    assert torch.equal(run("coordinates", VALUES, 96), expected.flatten().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matrix_instructions_multiply(run, dtype):
    values = torch.randn(384, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    product = values[:256].view(16, 16) @ values[256:].view(16, 8)
    out = run(f"multiply {str(dtype).removeprefix('torch.')}", values, 128).view(16, 8)
    torch.testing.assert_close(out, product)


SILENT = [
    "reverse without __syncthreads",
    "reverse_lanes without __syncwarp",
    "copy that waits for too few",
    "leftovers",
]


@pytest.mark.parametrize("kernel", SILENT)
def test_a_missing_wait_reads_nan(run, kernel):
    """A GPU would return plausible numbers, most of the time the right ones."""
    assert run(kernel, VALUES).isnan().any()


LOUD = {
    "copy_in_flight": r"returned with a copy in flight: cp_async16 at .*simulator_kernels.cpp:\d+",
    "copy_unaligned": r"the source must be aligned",
    "copy beyond shared memory": r"the destination must be 16 aligned bytes of shared memory",
    "shuffle_from_outside": r"a shuffle reads a lane that is not in its mask",
    "shuffle_without_others": r"deadlock: __shfl_xor_sync at .*simulator_kernels.cpp:\d+ "
    r"\(thread \d+\) waits for thread \d+, which returned in block \(0,0,0\)",
    "shuffle_outside_mask": r"__shfl_xor_sync at .* \(thread \d+\) is not in its own mask",
    "diverged": r"warp diverged: __\w+ at .*:\d+ \(thread \d+\) waits for __\w+ at .*:\d+",
    "two_barriers": r"different barriers: __syncthreads at .*:(\d+) .* waits for __syncthreads",
    "early_return": r"deadlock: __syncthreads at .* waits for thread 7, which returned",
    "half a warp multiplies": r"a matrix instruction needs all 32 lanes",
    "too much shared memory": r"launch failed: shared memory",
    "too many threads": r"launch failed: block size",
    "no blocks": r"launch failed: grid size",
}


@pytest.mark.parametrize("kernel", LOUD)
def test_bugs_are_reported(run, kernel):
    with pytest.raises(RuntimeError, match=LOUD[kernel]):
        run(kernel, VALUES)


def test_two_barriers_are_named_by_their_lines(run):
    with pytest.raises(RuntimeError, match="different barriers") as caught:
        run("two_barriers", VALUES)
    lines = re.findall(r"simulator_kernels.cpp:(\d+)", str(caught.value))
    assert len(set(lines)) == 2


def test_a_failed_kernel_leaves_the_simulator_usable(run):
    with pytest.raises(RuntimeError, match="deadlock"):
        run("early_return", VALUES)
    assert torch.equal(run("reverse", VALUES), VALUES.flip(0))


def test_the_environment_sets_the_first_seed(library):
    code = f"import ctypes; print(ctypes.CDLL({library._name!r}).get_seed())"
    environment = {**os.environ, "ADAPTIVE_SIMT_SEED": "41"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "41"


@pytest.fixture(scope="module")
def sanitized(builder, sanitizers):  # `sanitizers` skips where the library is missing
    return builder.program(HERE / "out_of_bounds.cpp", flags=("-g", "-fsanitize=address"))


@pytest.mark.parametrize("where", ["none", "shared", "dynamic", "global"])
def test_the_address_sanitizer_sees_through_fibers(sanitized, where):
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [str(sanitized), where], capture_output=True, text=True, check=False, env=environment
    )
    if where == "none":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert "heap-buffer-overflow" in done.stderr
        assert "out_of_bounds.cpp" in done.stderr
