"""The clock of decisions: it does not run while others do."""

import time
from time import perf_counter

import torch

from adaptive.layers.clock import clock_for


def test_waiting_is_no_time_on_a_cpu():
    clock = clock_for(torch.device("cpu"))
    start = clock()
    time.sleep(0.05)
    assert clock() - start < 0.02


def test_work_is():
    clock = clock_for(torch.device("cpu"))
    start = clock()
    while clock() - start < 0.01:  # ends only if it runs
        pass


def test_of_other_devices_it_is_the_time_of_day():
    assert clock_for(torch.device("cuda", 0)) is perf_counter
