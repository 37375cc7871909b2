"""Replaying a step on CUDA without the host: a captured graph, and its end seen one step late."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 2
"""Steps before the capture, in which libraries allocate what they keep."""


class Captured:
    """A step in a CUDA graph. Calling it enqueues the step.

    The graph reads and writes the memory that the step did when it was captured, weights included.
    """

    def __init__(self, step: Callable[[], None], cuda: Any = torch.cuda) -> None:
        """Run the step a few times, then capture it. What it writes must not matter yet."""
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
        cuda.current_stream().wait_stream(side)
        self._graph = cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
            step()

    def __call__(self) -> None:
        """Enqueue the step on the current stream."""
        self._graph.replay()


class Ending:
    """Whether to go on, where the host may look at the device after each step."""

    def __init__(self) -> None:
        """Go on."""
        self._going = True

    def note(self, going: Tensor) -> None:
        """Note ``going``, ``[1]``, bool, after a step or before the first."""
        self._going = bool(going)

    def over(self) -> bool:
        """Whether nothing is left to do."""
        return not self._going


class LateEnding(Ending):
    """The same without waiting for the step that was enqueued last: that before it is asked.

    So the device always has a step to do, and does one in vain at the end.
    """

    def __init__(self, cuda: Any = torch.cuda, pinned: bool = True) -> None:
        """Have two places in memory that the device can write to, used in turn."""
        super().__init__()
        self._flags = [torch.ones(1, dtype=torch.bool, pin_memory=pinned) for _ in range(2)]
        self._events = [cuda.Event() for _ in self._flags]
        self._noted = 0

    def note(self, going: Tensor) -> None:
        """As `Ending.note`, by a copy that is enqueued behind the step."""
        place = self._noted % 2
        self._flags[place].copy_(going, non_blocking=True)
        self._events[place].record()
        self._noted += 1

    def over(self) -> bool:
        """Whether nothing was left to do before the last step."""
        if self._noted < len(self._flags):
            return False
        place = self._noted % 2
        self._events[place].synchronize()
        return not bool(self._flags[place])
