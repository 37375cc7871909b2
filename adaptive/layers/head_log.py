"""What routed heads did: how many of which layer ran, and how far it was from all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from adaptive.layers.expert_log import ExpertLog


@dataclass(kw_only=True)
class HeadLog(ExpertLog):
    """Counters of one patched model since they were reset; its experts are KV heads.

    Errors and cosines are those of what attention returns, against that with all heads.
    """

    def reset(self) -> HeadLog:
        """A log of the same layers with nothing in it."""
        return HeadLog(experts=self.experts)

    def copy(self) -> HeadLog:
        """A copy that counts no further."""
        layers = {n: replace(layer, runs=[*layer.runs]) for n, layer in self.layers.items()}
        return HeadLog(experts=self.experts, layers=layers)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        values = super().to_dict()
        values.pop("copied_bytes")
        return {"kv_heads": values.pop("experts"), **values}

    def __str__(self) -> str:
        """Return a few lines for the report."""
        if self.share is None:
            return "routed heads: no call yet"
        text = f"routed heads: {self.share:.1%} of heads ran, {self.read_share:.1%} read"
        if self.error is None or self.cosine is None:
            return text + "\nnone audited"
        audited = sum(layer.audited for layer in self.layers.values())
        return (
            f"{text}\n{audited} tokens audited: relative error of a layer's attention "
            f"{self.error[0]:.3f}, at most {self.error[1]:.3f}; cosine {self.cosine[0]:.3f}, at "
            f"least {self.cosine[1]:.3f}"
        )
