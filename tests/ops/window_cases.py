"""Inputs of local and block-sparse attention for their laws."""

import torch


def qkv(
    tokens, query_tokens=None, *, batch=2, heads=4, kv_heads=2, head_dim=32, dtype=None, seed=0
):
    """Random query, key and value."""
    rng = torch.Generator().manual_seed(seed)
    shapes = [(heads, tokens if query_tokens is None else query_tokens)] + 2 * [(kv_heads, tokens)]
    return tuple(
        torch.randn(batch, h, t, head_dim, generator=rng).to(dtype or torch.float32)
        for h, t in shapes
    )


def attend(query, key, value, seen, scale=None, softcap=0.0):
    """``(out, lse)`` in float64 over the keys that ``seen`` says, whatever the others hold."""
    group = query.shape[1] // key.shape[1]
    seen = seen.expand(*query.shape[:3], key.shape[2])
    used = seen.unflatten(1, (-1, group)).any(2).any(2)[..., None]
    keys = key.double().masked_fill(~used, 0).repeat_interleave(group, 1)
    values = value.double().masked_fill(~used, 0).repeat_interleave(group, 1)
    scores = query.double() @ keys.mT * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(3)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return weights @ values, lse


def blank_unseen(key, value, seen):
    """NaN in every key and value that no query of its KV head sees."""
    kv_heads = key.shape[1]
    seen = seen.expand(key.shape[0], -1, -1, -1)
    heads = seen.shape[1]
    seen = seen.expand(-1, kv_heads, -1, -1) if heads == 1 else seen.unflatten(1, (kv_heads, -1))
    used = seen.any(2) if heads == 1 else seen.any(2).any(2)
    return (t.masked_fill(~used[..., None], torch.nan) for t in (key, value))


def close(made, right, dtype=torch.float32):
    """Within the rounding of the output's dtype."""
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(made[0].double(), right[0], rtol=eps, atol=max(eps / 8, 5e-6))
    torch.testing.assert_close(made[1].double(), right[1], rtol=1e-5, atol=1e-5)
