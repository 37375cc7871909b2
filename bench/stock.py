"""What each op is measured against: its stock PyTorch forms, its truth, and the sizes to sweep.

Ops come from ``adaptive.ops.OPS``. One without a suite here is timed against its own reference at
its own ``models`` sizes, so a new op is benchmarked from the day it is declared.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adaptive.ops import Op

Sizes = dict[str, Any]
Form = Callable[..., Tensor]


def first(result: Tensor | Sequence[Tensor]) -> Tensor:
    """The first output of an op that may return several."""
    return result if isinstance(result, Tensor) else result[0]


@dataclass(frozen=True)
class Suite:
    """How one op is benchmarked.

    Attributes:
        forms: Stock PyTorch forms by name; each takes the op's arguments and returns what ``pick``
            takes of its outputs. The ratio is quoted against the fastest of them.
        single_thread_only: Forms too slow to repeat at every thread count.
        truth: The same in float64.
        sweep: Sizes to measure, the most wanted first; empty: the op's ``models``.
        cuda_sweep: The same for a GPU, which smaller sizes would not fill.
        beside: What is timed in turn with the others though its result is another one, by name:
            what users would run instead.
        moved_bytes: Bytes that the op has to move for these arguments; None: all of them.
        place: Puts the arguments where users have them; None: anywhere.
        pick: What of the op's outputs is compared with the truth.
        others: Suites of the same op for arguments of another kind, measured after this one.
    """

    forms: Mapping[str, Form]
    truth: Form
    single_thread_only: frozenset[str] = frozenset()
    sweep: Sequence[Sizes] = ()
    cuda_sweep: Sequence[Sizes] = ()
    beside: Mapping[str, Form] = field(default_factory=dict)
    moved_bytes: Callable[..., int] | None = None
    place: Callable[..., tuple[Any, ...]] | None = None
    pick: Callable[[Any], Tensor] = first
    others: "Sequence[Suite]" = ()

    def moved(self, arguments: Sequence[object], result: Tensor) -> int:
        """Bytes read and written by one call."""
        if self.moved_bytes is not None:
            return self.moved_bytes(*arguments) + 4 * result.numel()
        return sum(a.nbytes for a in arguments if isinstance(a, Tensor)) + 4 * result.numel()


def fold(query: Tensor, key: Tensor) -> Tensor:
    """Query heads of one KV head as query tokens: [batch, kv_heads, group, head_dim]."""
    batch, heads, tokens, head_dim = query.shape
    group = heads // key.shape[1]
    return query.reshape(batch, key.shape[1], group * tokens, head_dim)


def decode_folded(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    """Fold the query group, two matmuls and a softmax: the fastest stock form on CPUs."""
    scores = torch.matmul(fold(query, key) * query.shape[-1] ** -0.5, key.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores, -1), value).view(query.shape)


def decode_sdpa_folded(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    """Fold the query group, one scaled_dot_product_attention."""
    out = functional.scaled_dot_product_attention(fold(query, key), key, value)
    return out.view(query.shape)


def decode_sdpa_gqa(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    """scaled_dot_product_attention(enable_gqa=True): what a decoding step runs by default."""
    return functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def decode_repeat_kv(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    """Copy every KV head to each of its query heads, then scaled_dot_product_attention."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    return functional.scaled_dot_product_attention(query, key, value)


def decode_truth(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    """One query token's attention in float64, one KV head at a time to stay small."""
    folded = fold(query, key).double() * query.shape[-1] ** -0.5
    out = torch.empty_like(folded)
    for head in range(key.shape[1]):
        scores = folded[:, head] @ key[:, head].double().transpose(-1, -2)
        out[:, head] = torch.softmax(scores, -1) @ value[:, head].double()
    return out.view(query.shape)


DECODE = Suite(
    forms={
        "folded matmuls": decode_folded,
        "SDPA folded": decode_sdpa_folded,
        "SDPA enable_gqa": decode_sdpa_gqa,
        "repeat_kv + SDPA": decode_repeat_kv,
    },
    truth=decode_truth,
    single_thread_only=frozenset({"repeat_kv + SDPA"}),
    sweep=[
        {"batch": 1, "heads": 32, "kv_heads": 8, "capacity": tokens, "head_dim": head_dim}
        for tokens in (16384, 32768, 1024, 4096, 65536)
        for head_dim in (128, 64)
    ],
    cuda_sweep=[
        {"batch": batch, "heads": 32, "kv_heads": 8, "capacity": tokens, "head_dim": head_dim}
        for batch, tokens in ((8, 32768), (1, 131072), (1, 16384), (64, 4096))
        for head_dim in (128, 64)
    ],
)

SUITES: dict[str, Suite] = {"decode_attention": DECODE}
"""By name of the op; the other modules called ``bench.stock_*`` have more."""


def _as_double(reference: Callable[..., Any]) -> Form:
    def truth(*arguments: object) -> Tensor:
        return first(
            reference(
                *(
                    a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
                    for a in arguments
                )
            )
        )

    return truth


def suite_for(op: Op[..., Any]) -> Suite:
    """The op's suite, or one that compares it with its own reference."""
    from bench.stock_draft import SUITES as DRAFT  # which use this module
    from bench.stock_exit import SUITES as EXIT
    from bench.stock_int8 import SUITES as INT8
    from bench.stock_linear import SUITES as LINEAR
    from bench.stock_local import SUITES as LOCAL
    from bench.stock_merge import SUITES as MERGE
    from bench.stock_prefix_ffn import SUITES as PREFIX_FFN
    from bench.stock_routing import SUITES as ROUTING
    from bench.stock_sparse import SUITES as SPARSE
    from bench.stock_sparse_ffn import SUITES as SPARSE_FFN

    more = {**SPARSE, **LINEAR, **LOCAL, **EXIT, **DRAFT, **ROUTING, **MERGE}
    more |= {**SPARSE_FFN, **PREFIX_FFN}
    if op.name in (suites := {**SUITES, **more}):
        return replace(suites[op.name], others=INT8.get(op.name, ()))
    return Suite(
        forms={"reference": lambda *a: first(op.reference(*a))}, truth=_as_double(op.reference)
    )


def smallest(op: Op[..., Any]) -> dict[str, Any]:
    """The op's smallest sizes at which there is anything to compute."""
    return min(
        (sizes for sizes in op.edges if all(sizes.values())),
        key=lambda s: s.get("capacity", s.get("tokens", 1)) * s.get("head_dim", 1),
    )


def empty(op: Op[..., Any]) -> dict[str, Any] | None:
    """The op's first sizes that leave nothing to compute, if it has any."""
    return next((s for s in op.edges if not all(v for v in s.values() if type(v) is int)), None)
