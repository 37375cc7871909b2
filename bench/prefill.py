"""Time of a layer's attention to a long prompt, dense and by blocks: python -m bench.prefill.

The shape of a layer of Llama-3.2-1B or Llama-3-8B at 16k tokens, random queries and keys in the
layout of transformers. Random keys give each pattern the same work as any others where a share of
the blocks is asked for; which share a quality needs is measured by bench.quality_prefill. Every
variant is checked against float64 at some queries, on the keys that it was to read. Where a policy
chooses, the time of its parts stands beside it, and that of the audit, which is not in the total.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from adaptive.layers.block_sparse import Prompt, attend, audit, audited, choose, score
from adaptive.ops import block_sparse_attention, local_attention, pool_blocks
from adaptive.policy import BlockSparsePrefill
from bench.record import Recorder
from bench.timing import TOLERANCE, WrongResultError, interleave, relative_error, speedup

DENSE = "SDPA, causal"
OURS = "adaptive, causal"
CHECKED_ROWS = 48


def policies(shares: list[float]) -> dict[str, BlockSparsePrefill]:
    """Each pattern at each share of the blocks; a window of half the share reads about as much."""
    found = {}
    for share in shares:
        for pattern in ("selected", "vertical_slash", "a_shape"):
            budget = share / 2 if pattern == "a_shape" else share
            found[f"{pattern}, {share:.0%}"] = BlockSparsePrefill(
                pattern=pattern, budget=budget, audit=64
            )
    return found


def draw(heads: int, kv_heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> Prompt:
    """Random queries, keys and values, ``[batch, tokens, heads, head_dim]`` in memory."""
    rng = torch.Generator().manual_seed(0)
    sizes = (heads, kv_heads, kv_heads)
    made = [torch.randn(1, tokens, n, head_dim, generator=rng).to(dtype) for n in sizes]
    query, key, value = (t.transpose(1, 2) for t in made)
    return Prompt(query, key, value, None, None, 0.0)


def truth(prompt: Prompt, rows: Tensor, read: Callable[[int], Tensor]) -> Tensor:
    """Attention of some queries in float64 to the keys that ``read(query)`` names, per head."""
    group = prompt.query.shape[1] // prompt.key.shape[1]
    made = []
    for row in rows.tolist():
        key, value = (
            t[0, :, : row + 1].double().repeat_interleave(group, 0)
            for t in (prompt.key, prompt.value)
        )
        logits = (key @ prompt.query[0, :, row, :, None].double())[..., 0]
        logits = logits * prompt.query.shape[3] ** -0.5
        weights = logits.masked_fill(~read(row), -torch.inf).softmax(-1)
        made.append((weights[:, None] @ value)[:, 0])
    return torch.stack(made, 1)[None]


def reads(policy: BlockSparsePrefill | None, prompt: Prompt) -> Callable[[int], Tensor]:
    """Which of its keys a query reads, ``[heads or 1, keys]``, bool."""
    tokens = prompt.key.shape[2]
    if policy is None:
        return lambda row: torch.ones(1, row + 1, dtype=torch.bool)
    if policy.pattern == "a_shape":
        window = policy.window(tokens)

        def near(row: int) -> Tensor:
            keys = torch.arange(row + 1)
            tail = row >= tokens - policy.dense_tail
            return ((row - keys < window) | (keys < policy.sinks) | tail)[None]

        return near
    indices, counts = choose(policy, prompt)
    group = prompt.query.shape[1] // indices.shape[1]

    def listed(row: int) -> Tensor:
        block = row // policy.block
        keys = torch.zeros(indices.shape[1], tokens // policy.block + 1, dtype=torch.bool)
        for line in range(indices.shape[1]):
            keys[line, indices[0, line, block, : counts[0, line, block]].long()] = True
        return keys.repeat_interleave(policy.block, 1)[:, : row + 1].repeat_interleave(group, 0)

    return listed


def parts(policy: BlockSparsePrefill, prompt: Prompt, budget_s: float) -> dict[str, float]:
    """Milliseconds of pooling, scoring, selecting, attending and auditing."""
    if policy.pattern == "a_shape":
        return {}
    ranges = prompt.ranges(policy.block)
    lists = choose(policy, prompt)
    lse = attend(policy, prompt).lse
    runs: dict[str, Callable[[], object]] = {
        "score": lambda: score(policy, prompt, ranges),
        "choose": lambda: choose(policy, prompt),
        "attend": lambda: block_sparse_attention(*prompt[:3], *lists, policy.block),
        "audit": lambda: audit(policy, prompt, lse),
    }
    if policy.pattern == "selected":
        runs["pool"] = lambda: (pool_blocks(prompt.query), pool_blocks(prompt.key))
    found = interleave(
        runs, threads=torch.get_num_threads(), at_least=1, repetitions=3, budget_s=budget_s
    )
    made = {name: timing.median_us / 1e3 for name, timing in found.items()}
    made["select"] = made.pop("choose") - made["score"]
    made["score"] -= made.get("pool", 0.0)
    return {name: round(ms, 2) for name, ms in made.items()}


def dense(prompt: Prompt) -> Tensor:
    """The best stock form: keys and values copied to every query head, and SDPA's causal flag."""
    group = prompt.query.shape[1] // prompt.key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (prompt.key, prompt.value))
    return functional.scaled_dot_product_attention(prompt.query, key, value, is_causal=True)


def measure(options: argparse.Namespace, head_dim: int) -> dict[str, Any]:
    """Time every variant in turn, then check what each of them made."""
    dtype = getattr(torch, options.dtype)
    prompt = draw(options.heads, options.kv_heads, options.tokens, head_dim, dtype)
    wanted = policies(options.shares)
    outs: dict[str, Tensor] = {}

    def go(name: str) -> None:
        if name in wanted:
            outs[name] = attend(wanted[name], prompt).out
        else:
            outs[name] = dense(prompt) if name == DENSE else local_attention(*prompt[:3])[0]

    found = interleave(
        {name: partial(go, name) for name in (DENSE, OURS, *wanted)},
        threads=options.threads,
        repetitions=options.repetitions,
        at_least=options.repetitions,
        budget_s=1.0,
    )
    rows = audited(options.tokens, CHECKED_ROWS)
    variants: dict[str, dict[str, Any]] = {}
    for name, out in outs.items():
        right = truth(prompt, rows, reads(wanted.get(name), prompt))
        error = relative_error(out[:, :, rows], right)
        if error > TOLERANCE[options.dtype]:
            raise WrongResultError(f"bench: the error of {name!r} is {error:.3g}")
        variants[name] = {**found[name].to_dict(), "error": error}
    chosen = {n: policy for n, policy in wanted.items() if policy.pattern != "a_shape"}
    return {
        "heads": options.heads,
        "kv_heads": options.kv_heads,
        "tokens": options.tokens,
        "head_dim": head_dim,
        "dtype": options.dtype,
        "threads": options.threads,
        "variants": variants,
        "speedup": {n: round(speedup(found[DENSE], found[n]), 3) for n in found},
        "split_ms": {n: parts(policy, prompt, 1.0) for n, policy in chosen.items()},
    }


def run(options: argparse.Namespace, recorder: Recorder, console: Console) -> None:
    """Time every variant at every head size."""
    torch.set_num_threads(options.threads)
    for head_dim in options.head_dim:
        row = measure(options, head_dim)
        recorder.add(row)
        for name, made in row["variants"].items():
            console.print(
                f"head_dim {head_dim}  {name:24} {made['us'] / 1e6:7.3f} s  "
                f"{row['speedup'][name]:5.2f}x  error {made['error']:.1e}  "
                f"{row['split_ms'].get(name, '')}",
                highlight=False,
                soft_wrap=True,
            )


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.prefill", description=__doc__)
    add = parser.add_argument
    add("--heads", type=int, default=32)
    add("--kv-heads", type=int, default=8)
    add("--tokens", type=int, default=16384)
    add("--head-dim", type=int, nargs="+", default=[64, 128])
    add("--dtype", default="bfloat16")
    add("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.4], help="of the blocks seen")
    add("--threads", type=int, default=1, help="1: CPU time, which neighbours do not touch")
    add("--repetitions", type=int, default=3)
    add("--json", type=Path, help="result file, written after every head size")
    options = parser.parse_args()
    settings = {k: v for k, v in vars(options).items() if k != "json"}
    recorder = Recorder("prefill", options.json, settings)
    with torch.inference_mode():
        run(options, recorder, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
