"""Instruction sets of this CPU that kernels are compiled for, and the dtypes that they take."""

import pytest
import torch

import adaptive
from adaptive import _native
from adaptive.cpu_level import LEVELS

EVERY = LEVELS[: LEVELS.index(_native.best_cpu_level()) + 1]
"""Of this CPU."""

AVAILABLE = tuple(level for level in EVERY if level != "avx512_bf16")
"""Those at which every op has kernels of its own. Linear ones and decoding have them at EVERY."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def set_for_a_test(levels):
    """A fixture: the kernels are those of one of the levels, then of the next."""

    @pytest.fixture(params=levels)
    def level(request):
        adaptive.set_cpu_level(request.param)
        yield request.param
        adaptive.set_cpu_level(None)

    return level


def of_each_number_of_threads(run):
    """What ``run`` returns with one thread and with several, one after another."""
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            made.append(run())
    finally:
        torch.set_num_threads(before)
    return made


def far_apart(tensor, pitch):
    """The same rows, ``pitch`` elements from one to the next, with NaN around them."""
    wide = torch.full((len(tensor), pitch), torch.nan, dtype=tensor.dtype)
    return wide[:, 3 : 3 + tensor.shape[1]].copy_(tensor)
