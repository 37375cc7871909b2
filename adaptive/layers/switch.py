"""What a module may hold of the patch that it belongs to, without reaching the whole model."""

from dataclasses import dataclass

from adaptive.layers.expert_log import ExpertLog
from adaptive.layers.head_choice import HeadPass
from adaptive.layers.head_log import HeadLog
from adaptive.layers.refill_log import RefillLog
from adaptive.layers.sparse_ffn import SparseFfnLog
from adaptive.layers.width_choice import WidthPass
from adaptive.layers.width_log import WidthLog


@dataclass
class Switch:
    """Whether a patch is at work, and what modules that know no more of it count.

    Attributes:
        on: Off inside `Patched.disabled()`.
        in_graph: Whether torch.compile is at work on the pass now running, if not on every call.
        sparse_ffn: What FFNs of few active neurons did; None without one.
        widths: What FFNs of a part of their neurons did; None where no policy narrows them.
        width_pass: What these FFNs, experts and routed heads share in a pass; None without any.
        refill: What `Patched.generate_many` did; None before its first call.
        experts: What the experts of FFNs did; None without any.
        heads: What routed heads did; None without any.
        head_pass: Which heads the tokens of calls now running chose; None likewise.
    """

    on: bool = True
    in_graph: bool = False
    sparse_ffn: SparseFfnLog | None = None
    widths: WidthLog | None = None
    width_pass: WidthPass | None = None
    refill: RefillLog | None = None
    experts: ExpertLog | None = None
    heads: HeadLog | None = None
    head_pass: HeadPass | None = None

    def reset(self) -> None:
        """Set the counters to zero."""
        self.refill = None
        if self.sparse_ffn is not None:
            self.sparse_ffn = SparseFfnLog(layers=self.sparse_ffn.layers)
        self.widths = self.widths and WidthLog()
        self.experts = self.experts and self.experts.reset()
        self.heads = self.heads and self.heads.reset()

    def restore(self, saved: "Switch") -> None:
        """Set the counters to those of ``saved``."""
        for name in ("sparse_ffn", "widths", "refill", "experts", "heads"):
            setattr(self, name, getattr(saved, name))
