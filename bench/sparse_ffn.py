"""Gemma 3n's sparse FFN, stock against patched: python -m bench.sparse_ffn [--json OUT].

One whole FFN of Gemma 3n E4B in a model of one layer with random weights: gate, choice of neurons,
activation, up and down. One thread, CPU time, cold caches, all forms in turns.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional

import adaptive
from adaptive.layers.hf_linear import LinearForward
from bench.machine import last_level_cache_bytes, read_bandwidth
from bench.record import Recorder
from bench.timing import TOLERANCE, cache_flusher, interleave, prove, speedup

MODEL = "Gemma 3n E4B, one sparse FFN"
ROWS = (1, 4, 8, 16)


def make(dtype: torch.dtype) -> Any:
    """A Gemma 3n of one layer whose FFN has the published shape; all else is small."""
    from transformers import AutoModelForCausalLM
    from transformers.models.gemma3n.configuration_gemma3n import Gemma3nTextConfig

    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        num_hidden_layers=1,
        activation_sparsity_pattern=[0.95],
        num_kv_shared_layers=0,
        layer_types=["full_attention"],
        vocab_size=256,
        vocab_size_per_layer_input=256,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def forms(mlp: Any, x: Tensor) -> tuple[dict[str, Callable[[], Tensor]], Tensor, float]:
    """The forms to time of a patched FFN, what they must give, and the share of active neurons."""
    ours, kind = mlp.forward, type(mlp)
    rows = x.reshape(-1, x.shape[-1])
    up, down = mlp.up_proj.weight, ours.down.of(mlp.down_proj.weight)
    linears = [getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")]
    fast = [linear.forward for linear in linears]
    assert all(isinstance(forward, LinearForward) for forward in fast)

    def dense() -> Tensor:
        """The model's own code, its linear layers by skinny_linear."""
        return kind.forward(mlp, x)  # type: ignore[no-any-return]

    def stock() -> Tensor:
        for linear in linears:
            del linear.__dict__["forward"]
        try:
            return kind.forward(mlp, x)  # type: ignore[no-any-return]
        finally:
            for linear, forward in zip(linears, fast, strict=True):
                linear.__dict__["forward"] = forward

    def selected() -> Tensor:
        activations = mlp.act_fn(mlp._gaussian_topk(functional.linear(rows, linears[0].weight)))
        needed = activations[0] if len(rows) == 1 else activations.amax(0)
        active = needed.nonzero()[:, 0]
        weighed = activations.index_select(1, active) * functional.linear(
            rows, up.index_select(0, active)
        )
        made: Tensor = weighed @ down.index_select(0, active)
        return made.view(x.shape)

    activations = ours.activations(mlp, rows)
    wide = [t.double() for t in (activations, rows, up, down)]
    truth = ((wide[0] * (wide[1] @ wide[2].T)) @ wide[3]).view(x.shape)
    named = {
        "stock": stock,
        "stock, by index_select": selected,
        "patched, all neurons": dense,
        "patched": lambda: ours(x),
    }
    return named, truth, float((activations != 0).any(0).float().mean())


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.sparse_ffn", description=__doc__)
    parser.add_argument("--budget-s", type=float, default=12.0, help="wall time for each row")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path, help="result file, written after every row")
    options = parser.parse_args()
    console = Console()
    torch.set_num_threads(1)
    settings = {k: v for k, v in vars(options).items() if k != "json"}
    recorder = Recorder("sparse_ffn", options.json, settings)
    recorder.document["bandwidth_gb_s"] = {"1": read_bandwidth(1)}
    flush = cache_flusher(2 * last_level_cache_bytes())
    for dtype in options.dtype:
        model = make(getattr(torch, dtype))
        with torch.no_grad(), adaptive.patch(model):
            mlp = model.model.layers[0].mlp
            for rows in options.rows:
                x = torch.randn(1, rows, mlp.hidden_size).to(mlp.up_proj.weight.dtype)
                named, truth, share = forms(mlp, x)
                errors = prove(named, truth, TOLERANCE[dtype])
                found = interleave(
                    named, threads=1, budget_s=options.budget_s, at_least=3, before=flush
                )
                results = {
                    name: {
                        **found[name].to_dict(),
                        "error": errors[name],
                        "speedup": round(speedup(found["stock"], found[name]), 3),
                    }
                    for name in named
                }
                recorder.add(
                    {
                        "model": MODEL,
                        "rows": rows,
                        "dtype": dtype,
                        "threads": 1,
                        "active_share": round(share, 4),
                        "variants": results,
                    }
                )
                times = ", ".join(
                    f"{n} {v['us'] / 1e3:.2f} ms ({v['speedup']:.2f}x)" for n, v in results.items()
                )
                console.print(f"{dtype} {rows} rows, {share:.1%} active: {times}")


if __name__ == "__main__":
    main()
