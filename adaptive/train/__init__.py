"""Training that makes models fit for adaptive computation: exits after every layer."""

from adaptive.train._result import EarlyExitTraining
from adaptive.train._schedule import curriculum_mask, dropout_probabilities, exit_weights
from adaptive.train.early_exit import early_exit

__all__ = [
    "EarlyExitTraining",
    "curriculum_mask",
    "dropout_probabilities",
    "early_exit",
    "exit_weights",
]
