"""Plain PyTorch modules, stock against patched: python -m bench.modules.

Cross-attention of a few queries to a long memory, as nn.TransformerDecoder does at every step, and
`adaptive.attention` against F.scaled_dot_product_attention. One thread, cold caches.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import adaptive
from bench.machine import last_level_cache_bytes, read_bandwidth
from bench.record import Recorder
from bench.timing import TOLERANCE, cache_flusher, interleave, prove, speedup

Run = Callable[[], Tensor]


class Case(NamedTuple):
    """Batch 1: `queries` tokens of `width`, split in `heads`, on `memory` tokens."""

    what: str
    width: int
    heads: int
    memory: int
    queries: int = 1
    dtype: str = "float32"
    kv_heads: int = 0


CASES = (
    Case("nn.MultiheadAttention", 256, 8, 2048),
    Case("nn.MultiheadAttention", 256, 8, 8192),
    Case("nn.MultiheadAttention", 512, 8, 2048),
    Case("nn.MultiheadAttention", 512, 8, 8192),
    Case("nn.MultiheadAttention", 512, 8, 8192, queries=16),
    Case("nn.MultiheadAttention", 512, 8, 8192, dtype="bfloat16"),
    Case("nn.MultiheadAttention", 1024, 16, 2048),
    Case("nn.TransformerDecoder, 6 layers", 512, 8, 4096, queries=4),
    Case("adaptive.attention", 512, 8, 8192, kv_heads=8),
    Case("adaptive.attention", 4096, 32, 8192, dtype="bfloat16", kv_heads=8),
)


def variants(case: Case) -> tuple[dict[str, Run], Tensor]:
    """The forms to time, and what they must give, in float64."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    if case.what == "adaptive.attention":
        return _attention(case, dtype)
    memory = torch.randn(1, case.memory, case.width).to(dtype)
    query = torch.randn(1, case.queries, case.width).to(dtype)
    if "Decoder" in case.what:
        layer = nn.TransformerDecoderLayer(case.width, case.heads, 4 * case.width, batch_first=True)
        module: nn.Module = nn.TransformerDecoder(layer, 6).eval().to(dtype)
        call: dict[str, Any] = {}
        arguments = [query, memory]
    else:
        module = nn.MultiheadAttention(case.width, case.heads, batch_first=True).eval().to(dtype)
        call, arguments = {"need_weights": False}, [query, memory, memory]
    wide = [a.double() for a in arguments]
    truth = _first(copy.deepcopy(module).double()(*wide, **call))
    patched = copy.deepcopy(module)
    adaptive.patch(patched)
    forms: dict[str, Run] = {
        "stock": lambda: _first(module(*arguments, **call)),
        "patched": lambda: _first(patched(*arguments, **call)),
    }
    if isinstance(module, nn.MultiheadAttention):
        forms["projected before"] = _projected_before(module, query, memory)
    return forms, truth


def _first(result: Tensor | tuple[Tensor, Any]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _projected_before(module: nn.MultiheadAttention, query: Tensor, memory: Tensor) -> Run:
    """What one could write by hand where the memory never changes: keys and values kept."""
    q_weight, *kv_weights = module.in_proj_weight.chunk(3)
    q_bias, *kv_biases = module.in_proj_bias.chunk(3)

    def split(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)

    pairs = zip(kv_weights, kv_biases, strict=True)
    key, value = (split(F.linear(memory, *pair)).contiguous() for pair in pairs)

    def run() -> Tensor:
        found = F.scaled_dot_product_attention(split(F.linear(query, q_weight, q_bias)), key, value)
        return module.out_proj(found.transpose(1, 2).flatten(2))

    return run


def _attention(case: Case, dtype: torch.dtype) -> tuple[dict[str, Run], Tensor]:
    head_dim = case.width // case.heads
    query = torch.randn(1, case.heads, case.queries, head_dim).to(dtype)
    key, value = (torch.randn(1, case.kv_heads, case.memory, head_dim).to(dtype) for _ in range(2))
    gqa = case.kv_heads != case.heads
    wide = (t.double() for t in (query, key, value))
    truth = F.scaled_dot_product_attention(*wide, enable_gqa=gqa)
    forms: dict[str, Run] = {
        "stock": lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=gqa),
        "patched": lambda: adaptive.attention(query, key, value, enable_gqa=gqa),
    }
    return forms, truth


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.modules", description=__doc__)
    parser.add_argument("--budget-s", type=float, default=8.0, help="wall time for each case")
    parser.add_argument("--json", type=Path, help="result file, written after every row")
    options = parser.parse_args()
    console = Console()
    torch.set_num_threads(1)
    recorder = Recorder("modules", options.json, {"budget_s": options.budget_s})
    recorder.document["bandwidth_gb_s"] = {"1": read_bandwidth(1)}
    flush = cache_flusher(2 * last_level_cache_bytes())
    with torch.inference_mode():
        for case in CASES:
            forms, truth = variants(case)
            errors = prove(forms, truth, TOLERANCE[case.dtype])
            found = interleave(forms, threads=1, budget_s=options.budget_s, before=flush)
            results = {n: {**found[n].to_dict(), "error": errors[n]} for n in forms}
            ratio = round(speedup(found["stock"], found["patched"]), 3)
            row = {**case._asdict(), "threads": 1, "variants": results, "speedup": ratio}
            recorder.add(row)
            times = ", ".join(f"{n} {v['us'] / 1e3:.2f} ms" for n, v in results.items())
            console.print(f"{case}: {times}; {ratio:.1f}x")


if __name__ == "__main__":
    main()
