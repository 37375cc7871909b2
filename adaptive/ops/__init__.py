"""Operators: what the layers compute with. One module per op."""

from adaptive.ops._op import OPS, Op, recorded
from adaptive.ops.block_sparse_attention import block_sparse_attention
from adaptive.ops.choose_blocks import choose_blocks
from adaptive.ops.combine_tokens import combine_tokens
from adaptive.ops.decode_attention import decode_attention
from adaptive.ops.exit_confidence import exit_confidence
from adaptive.ops.gather_attention import gather_attention
from adaptive.ops.gather_tokens import gather_tokens
from adaptive.ops.head_scores import head_scores
from adaptive.ops.hidden_cosine import hidden_cosine
from adaptive.ops.local_attention import local_attention
from adaptive.ops.merge_tokens import merge_tokens, unmerge_tokens
from adaptive.ops.pool_blocks import pool_blocks
from adaptive.ops.prefix_ffn import prefix_ffn
from adaptive.ops.prefix_row_ffn import prefix_row_ffn
from adaptive.ops.quantize_weight import quantize_weight
from adaptive.ops.route_tokens import route_tokens
from adaptive.ops.router_scores import router_scores
from adaptive.ops.score_blocks import block_ranges, score_blocks, score_lines
from adaptive.ops.score_tokens import score_tokens
from adaptive.ops.scored_attention import scored_attention
from adaptive.ops.select_tokens import select_tokens
from adaptive.ops.skinny_linear import skinny_linear
from adaptive.ops.sparse_row_ffn import sparse_row_ffn
from adaptive.ops.sum_tokens import sum_tokens
from adaptive.ops.tree_attention import tree_attention
from adaptive.ops.verify_draft import verify_draft
from adaptive.ops.verify_samples import verify_samples

__all__ = [
    "OPS",
    "Op",
    "block_ranges",
    "block_sparse_attention",
    "choose_blocks",
    "combine_tokens",
    "decode_attention",
    "exit_confidence",
    "gather_attention",
    "gather_tokens",
    "head_scores",
    "hidden_cosine",
    "local_attention",
    "merge_tokens",
    "pool_blocks",
    "prefix_ffn",
    "prefix_row_ffn",
    "quantize_weight",
    "recorded",
    "route_tokens",
    "router_scores",
    "score_blocks",
    "score_lines",
    "score_tokens",
    "scored_attention",
    "select_tokens",
    "skinny_linear",
    "sparse_row_ffn",
    "sum_tokens",
    "tree_attention",
    "unmerge_tokens",
    "verify_draft",
    "verify_samples",
]
