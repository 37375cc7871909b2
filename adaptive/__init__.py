"""adaptive: spend a transformer's compute where it matters.

``adaptive.patch(model)`` makes a stock model faster in place; ``Patched.report()`` says what ran,
``Patched.unpatch()`` puts everything back.
"""

import torch  # noqa: F401  (first: its OpenMP runtime is the one that the kernels share)

from adaptive import _native, train, zoo
from adaptive.adapters import EncoderFamily, Family, register_family
from adaptive.calibrate import calibrate
from adaptive.cpu_level import cpu_level, set_cpu_level
from adaptive.errors import (
    AdaptiveError,
    PatchConflict,
    PlanMismatch,
    UnknownFamily,
    UnsupportedModel,
)
from adaptive.layers.torch_attention import register_attention
from adaptive.layers.torch_sdpa import attention
from adaptive.oracle_widths import WidthOracle, oracle_widths
from adaptive.patch import Support, check, patch, patched
from adaptive.patched import Patched
from adaptive.policy import (
    BlockSparsePrefill,
    EarlyExit,
    EncoderExit,
    EncoderGate,
    Exact,
    ExpertRouterWeights,
    FeedForwardExperts,
    GlobalLocalAttention,
    HeadRouting,
    LocalAttention,
    MixtureOfDepths,
    Plan,
    Policy,
    Quest,
    RazorAttention,
    RouterPredictor,
    RouterWeights,
    SelfSpeculative,
    StreamingLLM,
    TidalDecode,
    TokenMerging,
    TokenPruning,
    TokenRouting,
    WidthRouter,
)

__version__ = "0.1.0"

__all__ = [
    "AdaptiveError",
    "BlockSparsePrefill",
    "EarlyExit",
    "EncoderExit",
    "EncoderFamily",
    "EncoderGate",
    "Exact",
    "ExpertRouterWeights",
    "Family",
    "FeedForwardExperts",
    "GlobalLocalAttention",
    "HeadRouting",
    "LocalAttention",
    "MixtureOfDepths",
    "PatchConflict",
    "Patched",
    "Plan",
    "PlanMismatch",
    "Policy",
    "Quest",
    "RazorAttention",
    "RouterPredictor",
    "RouterWeights",
    "SelfSpeculative",
    "StreamingLLM",
    "Support",
    "TidalDecode",
    "TokenMerging",
    "TokenPruning",
    "TokenRouting",
    "UnknownFamily",
    "UnsupportedModel",
    "WidthOracle",
    "WidthRouter",
    "__version__",
    "_native",
    "attention",
    "calibrate",
    "check",
    "cpu_level",
    "oracle_widths",
    "patch",
    "patched",
    "register_attention",
    "register_family",
    "set_cpu_level",
    "train",
    "zoo",
]
