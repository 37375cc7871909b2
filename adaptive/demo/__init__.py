"""The demonstration: a trained model finds a key in a long document, stock against patched."""

from adaptive.demo._result import Result
from adaptive.demo._run import Options, run

__all__ = ["Options", "Result", "run"]
