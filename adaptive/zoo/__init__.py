"""Whole models built from this project's ops: Block Transformer, recursive and vanilla ones."""

from adaptive.zoo.block_transformer import BlockTransformer
from adaptive.zoo.config import (
    BlockTransformerConfig,
    RecursiveTransformerConfig,
    VanillaTransformerConfig,
)
from adaptive.zoo.depth_batching import generate_many
from adaptive.zoo.model import Report
from adaptive.zoo.recursive import RecursiveReport, RecursiveTransformer
from adaptive.zoo.vanilla import VanillaTransformer

__all__ = [
    "BlockTransformer",
    "BlockTransformerConfig",
    "RecursiveReport",
    "RecursiveTransformer",
    "RecursiveTransformerConfig",
    "Report",
    "VanillaTransformer",
    "VanillaTransformerConfig",
    "generate_many",
]
