"""Operators: what the layers compute with. One module per op."""

from adaptive.ops._op import OPS, Op, recorded
from adaptive.ops.decode_attention import decode_attention

__all__ = ["OPS", "Op", "decode_attention", "recorded"]
