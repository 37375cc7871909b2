"""Training for adaptive computation: exits after every layer, and gates that choose exits."""

from adaptive.train._result import EarlyExitTraining
from adaptive.train._schedule import curriculum_mask, dropout_probabilities, exit_weights
from adaptive.train.early_exit import early_exit
from adaptive.train.encoder_gate import encoder_gate

__all__ = [
    "EarlyExitTraining",
    "curriculum_mask",
    "dropout_probabilities",
    "early_exit",
    "encoder_gate",
    "exit_weights",
]
