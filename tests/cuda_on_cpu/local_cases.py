"""Cases of local and block-sparse attention, and their formula in float64."""

import itertools

import torch

from adaptive.ops import local_attention

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ORDER = (
    "query", "key", "value", "window", "windows", "sinks", "offsets", "scale", "softcap", "causal",
)  # fmt: skip
LISTS = (
    "query", "key", "value", "indices", "counts", "block_size",
    "offsets", "scale", "softcap", "causal",
)  # fmt: skip


def inputs(dtype, *, block_size=0, chosen=0, per_head=False, **sizes):
    """Named arguments of these sizes; with a block_size also lists, some of them empty."""
    full = {"batch": 2, "heads": 4, "kv_heads": 2, "tokens": 150, "head_dim": 64, **sizes}
    if full.get("windows"):
        full["window"] = None
    drawn = local_attention.make_inputs(**full, dtype=dtype, device="cpu")
    named = dict(zip(ORDER, drawn, strict=True))
    if not block_size:
        return named
    batch, heads, query_tokens, _ = named["query"].shape
    kv_heads, tokens = named["key"].shape[1:3]
    generator = torch.Generator().manual_seed(full.get("seed", 0) + 1)
    sizes = (batch, heads if per_head else kv_heads, -(-query_tokens // block_size))
    blocks = -(-tokens // block_size)
    chosen = min(chosen, blocks)
    noise = torch.rand(*sizes, blocks, generator=generator)
    named["indices"] = noise.argsort(-1)[..., :chosen].sort(-1).values.int()
    named["counts"] = torch.randint(0, chosen + 1, sizes, generator=generator).int()
    named["block_size"] = block_size
    return named


def seen(named):
    """Which keys each query sees, [batch, heads, query_tokens, tokens]."""
    batch, heads, query_tokens, _ = named["query"].shape
    tokens = named["key"].shape[2]
    keys, rows = torch.arange(tokens), torch.arange(query_tokens)[:, None]
    places = tokens - query_tokens + rows
    offsets, lists, windows = (named.get(name) for name in ("offsets", "indices", "windows"))
    window = tokens if named.get("window") is None else named["window"]
    mask = torch.zeros(batch, heads, query_tokens, tokens, dtype=torch.bool)
    for b in range(batch):
        cuts = [0, tokens] if offsets is None else offsets[b].tolist()
        for h in range(heads):
            limit = window if windows is None else int(windows[h])
            for first, last in itertools.pairwise(cuts):
                inside = (places >= first) & (places < last) & (keys >= first) & (keys < last)
                near = ((keys - places).abs() < limit) | (keys < first + named.get("sinks", 0))
                mask[b, h] |= inside & near
            if named["causal"]:
                mask[b, h] &= keys <= places
            if lists is None:
                continue
            size, n = named["block_size"], h // (heads // lists.shape[1])
            for i, count in enumerate(named["counts"][b, n].tolist()):
                listed = torch.isin(keys // size, lists[b, n, i, :count].long())
                mask[b, h, i * size : (i + 1) * size] &= listed
    return mask


def expected(named, mask):
    """(out, lse) in float64; what no query sees takes no part."""
    query = named["query"].double()
    heads, kv_heads = query.shape[1], named["key"].shape[1]
    used = mask.unflatten(1, (kv_heads, -1)).any(2).any(2)[..., None] if mask.numel() else None
    key, value = (
        torch.where(used, named[name].double(), 0).repeat_interleave(heads // kv_heads, 1)
        for name in ("key", "value")
    )
    scale = query.shape[3] ** -0.5 if named["scale"] is None else named["scale"]
    scores = query @ key.transpose(-1, -2) * scale
    if named["softcap"]:
        scores = named["softcap"] * torch.tanh(scores / named["softcap"])
    scores = scores.masked_fill(~mask, -torch.inf)
    out = torch.softmax(scores, -1).nan_to_num(0.0) @ value
    return out, torch.logsumexp(scores, -1)


def check(local, named):
    """Rounded once: half a last place of the exact result, and what float32 sums cost."""
    out, lse = local(**named)
    if lse.numel() == 0:
        return out, lse
    mask = seen(named)
    exact, exact_lse = expected(named, mask)
    last_place = torch.finfo(out.dtype).eps / 2 if out.dtype != torch.float32 else 0.0
    bound = last_place * exact.abs() + 1e-5 * (1 + exact.abs())
    assert ((out.double() - exact).abs() <= bound).all()
    empty = ~mask.any(-1)
    assert torch.equal(torch.isneginf(lse), empty)
    assert (out[empty] == 0).all()
    torch.testing.assert_close(lse[~empty].double(), exact_lse[~empty], rtol=5e-6, atol=5e-6)
    return out, lse


def poison(named):
    """NaN in the keys and values that no query sees, and numbers out of range behind the lists."""
    kv_heads = named["key"].shape[1]
    used = seen(named).unflatten(1, (kv_heads, -1)).any(2).any(2)
    for name in ("key", "value"):
        named[name][~used] = torch.nan
    if "indices" in named:
        room = torch.arange(named["indices"].shape[3])
        named["indices"][room >= named["counts"][..., None]] = 2**31 - 1
    return named
