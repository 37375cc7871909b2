"""Forward and backward pass of local attention: python -m bench.local_gradient [--json OUT].

`local_attention` under autograd in turn with a loop over blocks, with SDPA under a dense mask, and
with SDPA without a window. Gradients of query, key and value of every form that has the window are
held to float64's first. About five minutes.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from adaptive.ops import local_attention
from bench.record import Recorder
from bench.stock_local import near, repeat
from bench.timing import TOLERANCE, interleave, prove, speedup

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 64
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def forms(tokens: int, window: int) -> dict[str, Form]:
    """Attention of ``[1, heads, tokens, head_dim]``, by name; the last has no window."""
    sdpa = functional.scaled_dot_product_attention

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return local_attention(query, key, value, window=window)[0]

    def loop(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = repeat(query, key, value)
        parts, step = [], window // 2
        for begin in range(0, tokens, step):
            end = min(begin + step, tokens)
            low = max(0, begin - window + 1)
            seen = near(begin, end, low, window, query.device)
            parts.append(
                sdpa(query[:, :, begin:end], key[:, :, low:end], value[:, :, low:end], seen)
            )
        return torch.cat(parts, 2)

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen = near(0, tokens, 0, window, query.device)
        return sdpa(query, *repeat(query, key, value), seen)

    def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sdpa(query, *repeat(query, key, value), is_causal=True)

    return {
        "local_attention": ours,
        "half-block loop": loop,
        "SDPA, dense mask": dense,
        "SDPA, causal": causal,
    }


def gradients(form: Form, inputs: list[Tensor], weights: Tensor) -> Tensor:
    """Gradients of ``sum(form(*inputs) * weights)``, one after the other in one tensor."""
    given = [tensor.detach().requires_grad_() for tensor in inputs]
    form(*given).backward(weights)
    return torch.cat([tensor.grad.flatten() for tensor in given if tensor.grad is not None])


def measure(tokens: int, window: int, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: milliseconds and the largest error of the gradients of each form."""
    rng = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)

    def draw(heads: int) -> Tensor:
        return torch.randn(1, heads, tokens, HEAD_DIM, generator=rng).to(kind)

    inputs, weights = [draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)], draw(HEADS)
    known = forms(tokens, window)
    wide = [tensor.double() for tensor in inputs]
    truth = gradients(known["half-block loop"], wide, weights.double())

    def run(form: Form) -> Callable[[], Tensor]:
        return lambda: gradients(form, inputs, weights)

    runs = {name: run(form) for name, form in known.items()}
    windowed = {name: call for name, call in runs.items() if name != "SDPA, causal"}
    errors = prove(windowed, truth, TOLERANCE[dtype])
    timed = interleave(runs, threads=1, repetitions=options.repetitions, budget_s=options.budget_s)
    own = timed["local_attention"]
    return {
        "tokens": tokens,
        "window": window,
        "dtype": dtype,
        "threads": 1,
        "variants": {
            name: {
                **timing.to_dict(),
                "error": errors.get(name),
                "ours_is_faster": round(speedup(timing, own), 3),
            }
            for name, timing in timed.items()
        },
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.local_gradient", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--window", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--budget-s", type=float, default=60.0, help="wall time for each row")
    parser.add_argument("--json", type=Path, help="result file, written after every row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"repetitions": options.repetitions, "budget_s": options.budget_s}
    settings |= {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    recorder = Recorder("local_gradient", options.json, settings)
    console = Console()
    for dtype in options.dtype:
        for tokens in options.tokens:
            for window in options.window:
                row = measure(tokens, window, dtype, options)
                recorder.add(row)
                console.print(f"{dtype}, {tokens} tokens, window {window}")
                for name, found in row["variants"].items():
                    error = "-" if found["error"] is None else f"{found['error']:.0e}"
                    console.print(
                        f"  {name:18} {found['us'] / 1e3:9.1f} ms, error {error}, "
                        f"ours {found['ours_is_faster']:.2f}x as fast",
                        highlight=False,
                    )
    recorder.save()


if __name__ == "__main__":
    main()
