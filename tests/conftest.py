"""Shared by all tests: devices to run on, and memory that does not forgive."""

import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

# Nothing in the suite needs the network, so nothing may wait for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Uninitialised memory is NaN, so an output element that a kernel forgets to write fails its test.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

# `ci` is the same on every run; HYPOTHESIS_PROFILE=nightly looks further, with fresh seeds.
_SHARED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, max_examples=50, **_SHARED)
settings.register_profile("nightly", max_examples=2000, **_SHARED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run any test that asks for a ``device`` on each device of this machine."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def _no_compiled_code_is_left():
    """Forget what a test compiled: code marked as not to be traced stays so for the process."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
