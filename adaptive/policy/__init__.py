"""Policies: which layers and heads do what. Frozen values and pure functions of them."""

from adaptive.policy._policy import Policy
from adaptive.policy.exact import Exact
from adaptive.policy.plan import ModelShape, Plan

__all__ = ["Exact", "ModelShape", "Plan", "Policy"]
