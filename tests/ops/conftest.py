"""Runs tests of kernels with each instruction set that this CPU has."""

import pytest
from levels import AVAILABLE

import adaptive


@pytest.fixture(params=AVAILABLE)
def level(request):
    """The kernels are those of this level until the test ends."""
    adaptive.set_cpu_level(request.param)
    yield request.param
    adaptive.set_cpu_level(None)
