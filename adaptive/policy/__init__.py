"""Policies: which layers and heads do what. Frozen values and pure functions of them."""

from adaptive.policy._policy import Policy
from adaptive.policy.alibi import alibi_windows
from adaptive.policy.block_sparse import BlockSparsePrefill
from adaptive.policy.early_exit import EarlyExit
from adaptive.policy.encoder_exit import EncoderExit
from adaptive.policy.encoder_gate import EncoderGate
from adaptive.policy.exact import Exact
from adaptive.policy.expert_router import ExpertRouterWeights
from adaptive.policy.ffn_experts import FeedForwardExperts
from adaptive.policy.global_local import GlobalLocalAttention
from adaptive.policy.head_routing import HeadRouting
from adaptive.policy.local import LocalAttention
from adaptive.policy.mixture_of_depths import MixtureOfDepths
from adaptive.policy.plan import Plan
from adaptive.policy.quest import Quest
from adaptive.policy.razor import RazorAttention
from adaptive.policy.router_predictor import RouterPredictor
from adaptive.policy.router_weights import RouterWeights
from adaptive.policy.self_speculative import SelfSpeculative
from adaptive.policy.shape import ModelShape
from adaptive.policy.streaming import StreamingLLM
from adaptive.policy.tidal import TidalDecode
from adaptive.policy.token_merging import TokenMerging
from adaptive.policy.token_pruning import TokenPruning
from adaptive.policy.token_routing import TokenRouting
from adaptive.policy.width_router import WidthRouter

__all__ = [
    "BlockSparsePrefill",
    "EarlyExit",
    "EncoderExit",
    "EncoderGate",
    "Exact",
    "ExpertRouterWeights",
    "FeedForwardExperts",
    "GlobalLocalAttention",
    "HeadRouting",
    "LocalAttention",
    "MixtureOfDepths",
    "ModelShape",
    "Plan",
    "Policy",
    "Quest",
    "RazorAttention",
    "RouterPredictor",
    "RouterWeights",
    "SelfSpeculative",
    "StreamingLLM",
    "TidalDecode",
    "TokenMerging",
    "TokenPruning",
    "TokenRouting",
    "WidthRouter",
    "alibi_windows",
]
