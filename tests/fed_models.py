"""Feeds text to models in pieces, with padding or without, for tests of local attention."""

import torch
from models import padded, token_ids


def given(kind, tokens):
    """Token ids, their mask, and the places of the tokens: "plain" or "padded"."""
    inputs = padded(batch=3, tokens=tokens) if kind == "padded" else {}
    ids = inputs.get("input_ids", token_ids(tokens=tokens))
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def fed(model, ids, mask, places, cuts):
    """Logits of all tokens, fed in pieces of so many, and the cache."""
    cache, found, at = None, [], 0
    for count in cuts:
        out = model(
            ids[:, at : at + count],
            attention_mask=mask[:, : at + count],
            position_ids=places[:, at : at + count],
            past_key_values=cache,
            use_cache=True,
        )
        cache, at = out.past_key_values, at + count
        found.append(out.logits)
    return torch.cat(found, 1), cache
