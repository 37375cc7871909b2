"""What tests of early exit share: models, policies, and what they make."""

from models import greedy
from speculation_cases import drafting
from transformers import DynamicCache

import adaptive

TOKENS = 20
MODELS = {}
FILLS = ("deferred", "copy", "project")
SOME = {"layers": (1, 2, 3), "criterion": "agreement"}
"""Leaves the random models at several depths, whatever the scale of their logits."""


def model_of(case):
    """A model of the case, made once."""
    if case not in MODELS:
        MODELS[case] = drafting(case)
    return MODELS[case]


def plain(model, inputs, tokens=TOKENS, **options):
    """What the patched model makes without exits."""
    with adaptive.patch(model):
        return greedy(model, inputs, tokens, **options)


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
