"""Whole models built from this project's ops: the Block Transformer, and a vanilla one."""

from adaptive.zoo.block_transformer import BlockTransformer
from adaptive.zoo.config import BlockTransformerConfig, VanillaTransformerConfig
from adaptive.zoo.model import Report
from adaptive.zoo.vanilla import VanillaTransformer

__all__ = [
    "BlockTransformer",
    "BlockTransformerConfig",
    "Report",
    "VanillaTransformer",
    "VanillaTransformerConfig",
]
