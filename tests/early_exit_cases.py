"""What tests of early exit share: models, policies, and what they make."""

from models import greedy
from speculation_cases import TOKENS, model_of, plain
from transformers import DynamicCache

import adaptive

__all__ = ["FILLS", "SOME", "TOKENS", "cache_after", "exited", "model_of", "never", "plain"]

FILLS = ("deferred", "copy", "project")
SOME = {"layers": (1, 2, 3), "criterion": "agreement"}
"""Leaves the random models at several depths, whatever the scale of their logits."""


def exited(model, inputs, tokens=TOKENS, *, policy, **options):
    """What it makes with them, and the log."""
    with adaptive.patch(model, adaptive.EarlyExit(**policy)) as patched:
        made = greedy(model, inputs, tokens, **options)
        return made, patched.report().exits


def never(kv="deferred", **policy):
    return {"layers": (1, 3), "threshold": 1.01, "kv": kv, **policy}


def cache_after(model, inputs, tokens, policy, **options):
    """The cache that a caller holds after generate, the tokens in it, and the log."""
    cache = DynamicCache(config=model.config)
    options["past_key_values"] = cache
    made, log = exited(model, inputs, tokens, policy=policy, **options)
    return cache, made[:, : cache.get_seq_length()], log
