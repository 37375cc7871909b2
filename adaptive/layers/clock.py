"""The clock that decoding is timed by where a decision follows from the time."""

from collections.abc import Callable
from time import get_clock_info, perf_counter, thread_time

import torch

_FINE = 1e-5


def clock_for(device: torch.device) -> Callable[[], float]:
    """Return a function that gives seconds from any start on.

    On a CPU it counts the time in which the calling thread ran: what the machine does for others
    meanwhile says nothing about which way of decoding is faster. Where the system has no such clock
    of use, and on other devices, it is the time of day.
    """
    fine = get_clock_info("thread_time").resolution <= _FINE
    return thread_time if device.type == "cpu" and fine else perf_counter
