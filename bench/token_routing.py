"""FFNs of a part of their neurons: python -m bench.token_routing [--json OUT].

One FFN of the shape of Llama-3.2-1B in a model with random weights, patched at several widths. One
thread, CPU time, cold caches, all widths in turns; beside each the time that its share of the
neurons allows.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import adaptive
from bench.machine import last_level_cache_bytes, read_bandwidth
from bench.record import Recorder
from bench.timing import TOLERANCE, cache_flusher, interleave, prove, speedup

MODEL = "Llama-3.2-1B, one FFN"
WIDTHS = (1.0, 0.5, 0.25, 0.125)


def make(dtype: torch.dtype) -> Any:
    """A Llama of one layer whose FFN has the published shape; all else is small."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=256,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.token_routing", description=__doc__)
    parser.add_argument("--budget-s", type=float, default=15.0, help="wall time for each row")
    parser.add_argument("--tokens", type=int, nargs="+", default=(1, 128))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path, help="result file, written after every row")
    options = parser.parse_args()
    console = Console()
    torch.set_num_threads(1)
    settings = {k: v for k, v in vars(options).items() if k != "json"}
    recorder = Recorder("token_routing", options.json, settings)
    recorder.document["bandwidth_gb_s"] = {"1": read_bandwidth(1)}
    flush = cache_flusher(2 * last_level_cache_bytes())
    with torch.no_grad():
        for dtype in options.dtype:
            stock = make(getattr(torch, dtype))
            models = {width: copy.deepcopy(stock) for width in WIDTHS}
            for width, model in models.items():
                adaptive.patch(model, adaptive.TokenRouting(widths=width))
            for tokens in options.tokens:
                measure(models, stock, tokens, dtype, options.budget_s, flush, recorder, console)


def measure(
    models: dict[float, Any],
    stock: Any,
    tokens: int,
    dtype: str,
    budget_s: float,
    flush: Any,
    recorder: Recorder,
    console: Console,
) -> None:
    """Prove and time all widths at one number of tokens."""
    x = torch.randn(1, tokens, 2048).to(getattr(torch, dtype))
    ffns = {width: model.model.layers[0].mlp for width, model in models.items()}
    errors = {}
    for width, ffn in ffns.items():
        gate, up, down = (
            getattr(ffn, name).weight.double() for name in ("gate_proj", "up_proj", "down_proj")
        )
        neurons = int(width * gate.shape[0])
        wide = x.double()
        hidden = ffn.act_fn(wide @ gate[:neurons].T) * (wide @ up[:neurons].T)
        truth = hidden @ down[:, :neurons].T
        errors |= prove({str(width): lambda ffn=ffn: ffn(x)}, truth, TOLERANCE[dtype])
    full = stock.model.layers[0].mlp
    forms = {"stock": lambda: full(x), **{str(w): lambda f=f: f(x) for w, f in ffns.items()}}
    found = interleave(forms, threads=1, budget_s=budget_s, at_least=3, before=flush)
    variants = {
        name: {
            **timing.to_dict(),
            "error": errors.get(name),
            "speedup": round(speedup(found["1.0"], timing), 3),
        }
        for name, timing in found.items()
    }
    recorder.add(
        {"model": MODEL, "tokens": tokens, "dtype": dtype, "threads": 1, "variants": variants}
    )
    text = ", ".join(
        f"{n} {v['us'] / 1e3:.2f} ms ({v['speedup']:.2f}x)" for n, v in variants.items()
    )
    console.print(f"{dtype} {tokens} tokens: {text}", soft_wrap=True)


if __name__ == "__main__":
    main()
