"""Whole passes of a model whose FFNs have widths: what they need to know, before and after."""

from typing import Any

from torch import nn
from transformers.cache_utils import Cache

from adaptive.layers.encoder_passes import unsupported
from adaptive.layers.hf_encoder_passes import argument, runs_again
from adaptive.layers.state import PatchRecord
from adaptive.policy import FeedForwardExperts, HeadRouting


def begin(
    base: nn.Module, record: PatchRecord, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Before a pass of the base module: note which of its tokens are padding.

    Raises:
        NotImplementedError: What padding skips would not be skipped when layers run again.
    """
    now = record.switch.width_pass
    if now is None or record.in_graph:
        return
    cache = argument(base, "past_key_values", args, kwargs)
    past = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
    reduces = record.encoder_exits or record.token_reduction
    now.begin(argument(base, "attention_mask", args, kwargs), past, reduces)
    if now.known is not None and runs_again(base):
        skips = (p for p in record.policies if isinstance(p, FeedForwardExperts | HeadRouting))
        if (policy := next(skips, None)) is not None:
            now.end()
            raise unsupported(
                "gradient checkpointing of padded rows",
                policy,
                "layers would run again and not know what is padding; call "
                "gradient_checkpointing_disable()",
            )


def end(record: PatchRecord) -> None:
    """After a pass of the base module: forget it."""
    if record.switch.width_pass is not None:
        record.switch.width_pass.end()
