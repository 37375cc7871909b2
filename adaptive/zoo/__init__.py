"""Whole models built from this project's ops: Block Transformer, recursive and vanilla ones."""

from adaptive.zoo.block_transformer import BlockTransformer
from adaptive.zoo.config import (
    BlockTransformerConfig,
    RecursiveTransformerConfig,
    VanillaTransformerConfig,
)
from adaptive.zoo.model import Report
from adaptive.zoo.recursive import RecursiveTransformer
from adaptive.zoo.vanilla import VanillaTransformer

__all__ = [
    "BlockTransformer",
    "BlockTransformerConfig",
    "RecursiveTransformer",
    "RecursiveTransformerConfig",
    "Report",
    "VanillaTransformer",
    "VanillaTransformerConfig",
]
