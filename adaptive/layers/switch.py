"""What a module may hold of the patch that it belongs to, without reaching the whole model."""

from dataclasses import dataclass

from adaptive.layers.expert_log import ExpertLog
from adaptive.layers.sparse_ffn import SparseFfnLog


@dataclass
class Switch:
    """Whether a patch is at work, and what modules that know no more of it count.

    Attributes:
        on: Off inside `Patched.disabled()`.
        in_graph: Whether torch.compile is at work on the pass now running, if not on every call.
        sparse_ffn: What FFNs of few active neurons did; None without one.
        experts: What the experts of FFNs did; None without any.
    """

    on: bool = True
    in_graph: bool = False
    sparse_ffn: SparseFfnLog | None = None
    experts: ExpertLog | None = None

    def reset(self) -> None:
        """Set the counters to zero."""
        if self.sparse_ffn is not None:
            self.sparse_ffn = SparseFfnLog(layers=self.sparse_ffn.layers)
        if self.experts is not None:
            self.experts = self.experts.reset()
