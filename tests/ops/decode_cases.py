"""Cases of decode_attention, a float64 oracle for them, and the rule that bounds the error."""

import math
from dataclasses import dataclass

import torch

EPS = torch.finfo(torch.float32).eps
NAN = math.nan
MASKS = (None, "bool", "bool_keys", "bool_heads", "add", "add_strided", "add_queries")
LAYOUTS = ("plain", "bshd", "pitch", "offset", "expand")


@dataclass(frozen=True)
class Case:
    """One call; ``lengths`` is None, "ragged" or the lengths themselves."""

    batch: int = 2
    kv_heads: int = 2
    group: int = 4
    query_tokens: int = 1
    capacity: int = 70
    head_dim: int = 64
    lengths: str | tuple[int, ...] | None = None
    mask: str | None = None
    layout: str = "plain"
    scale: float | None = None
    softcap: float = 0.0
    causal: bool = True
    dtype: torch.dtype = torch.float32
    magnitude: float = 1.0
    seed: int = 0

    def arguments(self, device="cpu"):
        """Arguments by name. Key and value are NaN wherever no query of the row may look."""
        rng = torch.Generator().manual_seed(self.seed)
        heads = self.kv_heads * self.group
        query = torch.randn(self.batch, heads, self.query_tokens, self.head_dim, generator=rng)
        query = _lay_out((query * self.magnitude).to(self.dtype), self.layout)
        arguments = {
            "query": query,
            "lengths": self._lengths(rng),
            "mask": self._mask(rng),
            "scale": self.scale,
            "softcap": self.softcap,
            "causal": self.causal,
        }
        shape = (self.batch, self.kv_heads, self.capacity, self.head_dim)
        shared = self.layout == "expand"
        unseen = ~seen_keys(key=torch.empty(shape, device="meta"), **arguments)
        unseen = unseen.view(self.batch, self.kv_heads, -1, self.capacity).all(2)
        for name in ("key", "value"):
            tensor = torch.randn(1 if shared else self.batch, *shape[1:], generator=rng)
            tensor = tensor.to(self.dtype)
            if not shared:
                tensor[unseen] = NAN
            arguments[name] = _lay_out(tensor, self.layout).expand(shape)
        return {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}

    def _lengths(self, rng):
        if self.lengths == "ragged":
            high = self.capacity + 1
            return torch.randint(0, high, (self.batch,), generator=rng, dtype=torch.int32)
        return None if self.lengths is None else torch.tensor(self.lengths, dtype=torch.int32)

    def _mask(self, rng):
        heads = self.kv_heads * self.group
        batch, tokens, keys = self.batch, self.query_tokens, self.capacity
        shape = {
            None: (),
            "bool": (batch, 1, tokens, keys),
            "bool_keys": (keys,),
            "bool_heads": (heads, 1, keys),
            "add": (batch, heads, tokens, keys),
            "add_strided": (keys, tokens),
            "add_queries": (batch, heads, tokens, 1),
        }[self.mask]
        taken = torch.rand(shape, generator=rng) < 0.6
        if keys > 200 and taken.dim() > 0 and taken.shape[-1] == keys:
            taken[..., 64:192] = False  # two whole blocks
        if self.mask is None or self.mask.startswith("bool"):
            return None if self.mask is None else taken
        bias = torch.randn(shape, generator=rng).masked_fill(~taken, -math.inf)
        return bias.T if self.mask == "add_strided" else bias


def _lay_out(tensor, layout):
    """A tensor of the same values in the memory layout that is named; gaps are NaN."""
    if layout == "bshd":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "pitch":
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), NAN, dtype=tensor.dtype)
        wide[..., 2:-3] = tensor
        return wide[..., 2:-3]
    if layout == "offset":
        flat = torch.full((tensor.numel() + 6,), NAN, dtype=tensor.dtype)
        flat[3:-3] = tensor.flatten()
        return flat[3:-3].view(tensor.shape)
    return tensor


def seen_keys(query, key, lengths=None, mask=None, causal=True, **_):
    """Which keys each query sees, ``[batch, heads, query_tokens, capacity]``, bool."""
    batch, heads, tokens, _ = query.shape
    seen = torch.zeros(batch, heads, tokens, key.shape[2], dtype=torch.bool)
    for row in range(batch):
        length = key.shape[2] if lengths is None else int(lengths[row])
        for token in range(tokens):
            limit = length - tokens + token + 1 if causal else length
            seen[row, :, token, : max(limit, 0)] = True
    if mask is not None:
        seen &= (mask if mask.dtype == torch.bool else mask != -math.inf).cpu()
    return seen


def exact(query, key, value, mask=None, scale=None, softcap=0.0, **others):
    """``(out, lse)`` in float64, query by query over the keys that it sees and no others."""
    seen = seen_keys(query, key, mask=mask, **others)
    query, key, value = (t.double().cpu() for t in (query, key, value))
    out = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.full(query.shape[:3], -math.inf, dtype=torch.float64)
    bias = torch.zeros(1) if mask is None or mask.dtype == torch.bool else mask.cpu()
    bias = bias.expand(seen.shape)
    for row, head, token in torch.ones(query.shape[:3]).nonzero().tolist():
        keep = seen[row, head, token].nonzero()[:, 0]
        if len(keep) == 0:
            continue
        kv_head = head // (query.shape[1] // key.shape[1])
        score = key[row, kv_head, keep] @ query[row, head, token]
        score = score * (scale if scale is not None else query.shape[3] ** -0.5)
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        score = score + bias[row, head, token, keep]
        out[row, head, token] = torch.softmax(score, 0) @ value[row, kv_head, keep]
        lse[row, head, token] = torch.logsumexp(score, 0)
    return out, lse


def assert_accurate(op, arguments):
    """The kernel's error is at most 4 times that of float32 PyTorch, plus 4 float32 roundings."""
    for made, plain, right in zip(
        op(**arguments), op.reference(**arguments), exact(**arguments), strict=True
    ):
        made, plain = made.double().cpu(), plain.double().cpu()
        finite = right.isfinite()
        assert torch.equal(made[~finite], right[~finite])
        made, plain, right = made[finite], plain[finite], right[finite]
        if right.numel() == 0:
            continue
        allowed = 4 * (plain - right).abs().max() + 4 * EPS * right.abs().max()
        worst = (made - right).abs().max()
        assert worst <= allowed, f"error {worst:.3g}, allowed {allowed:.3g}"  # NaN fails too


BF16, F16 = torch.bfloat16, torch.float16
EDGES = {
    "one key": Case(capacity=1),
    "block minus one": Case(capacity=63, head_dim=128),
    "block": Case(capacity=64, head_dim=96, dtype=BF16),
    "block plus one": Case(capacity=65, head_dim=256, dtype=F16),
    "several items": Case(batch=1, capacity=2500, head_dim=32, lengths=(2100,)),
    "item plus one": Case(batch=1, capacity=1025, head_dim=64, query_tokens=2, dtype=BF16),
    "lengths 0, 1, capacity": Case(batch=3, lengths=(0, 1, 70), dtype=BF16),
    "more queries than keys": Case(batch=2, query_tokens=9, lengths=(4, 9)),
    "16 queries": Case(query_tokens=16, capacity=200, head_dim=80, lengths="ragged", dtype=F16),
    "not causal": Case(query_tokens=5, capacity=90, causal=False, lengths="ragged"),
    "group 1": Case(group=1, kv_heads=5, head_dim=128, dtype=BF16),
    "group 3": Case(group=3, head_dim=40, dtype=F16),
    "group 5, 3 queries": Case(group=5, query_tokens=3, head_dim=72),
    "group 7": Case(group=7, kv_heads=1, head_dim=248, dtype=BF16),
    "group 8": Case(group=8, kv_heads=1, head_dim=256),
    "group 13": Case(group=13, kv_heads=1, head_dim=120, dtype=BF16),
    "bool mask": Case(mask="bool", capacity=300, query_tokens=2, dtype=BF16),
    "keys masked for all": Case(mask="bool_keys", capacity=300, lengths="ragged"),
    "mask of each head": Case(mask="bool_heads", capacity=300, query_tokens=3, head_dim=56),
    "bias": Case(mask="add", capacity=300, query_tokens=3, lengths="ragged", dtype=F16),
    "bias, strided keys": Case(mask="add_strided", capacity=130, query_tokens=4),
    "bias of a query": Case(mask="add_queries", capacity=130, query_tokens=4, dtype=BF16),
    "bshd": Case(layout="bshd", query_tokens=2, dtype=BF16),
    "pitch": Case(layout="pitch", head_dim=104, dtype=F16),
    "offset": Case(layout="offset", head_dim=64, dtype=BF16),
    "expand": Case(layout="expand", batch=3, lengths="ragged"),
    "softcap": Case(softcap=5.0, magnitude=8.0, capacity=130, mask="add"),
    "scale": Case(scale=-0.7, dtype=BF16),
    "scale 0": Case(scale=0.0, capacity=100),
    "scores of 1e4": Case(magnitude=3e3, capacity=200, group=2),
    "denormal": Case(magnitude=1e-40, capacity=100),
}
