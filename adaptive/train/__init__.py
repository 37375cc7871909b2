"""Training for adaptive computation: exits after every layer, gates for exits, and routers."""

from adaptive.train._result import EarlyExitTraining
from adaptive.train._schedule import curriculum_mask, dropout_probabilities, exit_weights
from adaptive.train.attention_rank import attention_rank, lowest_rank
from adaptive.train.early_exit import early_exit
from adaptive.train.encoder_gate import encoder_gate
from adaptive.train.fit_router import RouterFit, fit_router
from adaptive.train.layer_similarity import layer_similarity, least_changing
from adaptive.train.tune_experts import ExpertTuning, tune_experts
from adaptive.train.tune_heads import HeadTuning, tune_heads
from adaptive.train.tune_router import RouterTuning, tune_router
from adaptive.train.tune_widths import tune_widths

__all__ = [
    "EarlyExitTraining",
    "ExpertTuning",
    "HeadTuning",
    "RouterFit",
    "RouterTuning",
    "attention_rank",
    "curriculum_mask",
    "dropout_probabilities",
    "early_exit",
    "encoder_gate",
    "exit_weights",
    "fit_router",
    "layer_similarity",
    "least_changing",
    "lowest_rank",
    "tune_experts",
    "tune_heads",
    "tune_router",
    "tune_widths",
]
