"""Routing tokens beside the layer that computes them: python -m bench.routing [--json OUT].

A SwiGLU layer of a prompt, in full and on the tokens that a router keeps: norm and scores, choice,
gather, layer, combination in place, in turn with the layer alone on as many rows. One thread, cold
caches, CPU time. About three minutes.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from adaptive.layers.widened_linear import slow_dtypes, widened_linear
from adaptive.ops import combine_tokens, gather_tokens, route_tokens, router_scores
from bench.machine import last_level_cache_bytes, read_bandwidth
from bench.record import Recorder
from bench.timing import TOLERANCE, cache_flusher, interleave, prove

TOKENS, WIDTH, INNER = 2048, 2048, 5632
SHARES = (0.125, 0.25, 0.5)


class Layer:
    """Random weights; products of 16 bits as a patched model runs them."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Draw weights under which values keep their size."""
        rng = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=rng) * shape[-1] ** -0.5).to(dtype)

        self.router, self.norm = draw(1, WIDTH), torch.ones(WIDTH, dtype=dtype)
        self.gate, self.up, self.down = draw(INNER, WIDTH), draw(INNER, WIDTH), draw(WIDTH, INNER)
        self.hidden = draw(1, TOKENS, WIDTH) * WIDTH**0.5
        self.widened = dtype in slow_dtypes()

    def linear(self, rows: Tensor, weight: Tensor) -> Tensor:
        """The faster of the two products that there are for the dtype."""
        return (
            widened_linear(rows, weight, None) if self.widened else functional.linear(rows, weight)
        )

    def __call__(self, rows: Tensor) -> Tensor:
        """SwiGLU of ``[batch, rows, width]``."""
        flat = rows.flatten(0, 1)
        inner = functional.silu(self.linear(flat, self.gate)) * self.linear(flat, self.up)
        return self.linear(inner, self.down).view(rows.shape)

    def scores(self) -> Tensor:
        """The router's, of every token."""
        return router_scores(self.hidden, self.router, self.norm)

    def routed(self, hidden: Tensor, share: float) -> Tensor:
        """The layer on the best tokens, added to ``hidden`` in place."""
        scores = router_scores(hidden, self.router, self.norm)
        room = int(share * TOKENS)  # what a share of a row without padding is, known in advance
        tokens = route_tokens(scores, capacity=room)[0][:, :room]
        made = self(gather_tokens(hidden, tokens))
        weights = scores.gather(1, tokens.long())
        combine_tokens.into(hidden, hidden=hidden, update=made, tokens=tokens, weights=weights)
        return hidden

    def by_index(self, hidden: Tensor, share: float) -> Tensor:
        """The same of PyTorch's own ops."""
        normed = functional.rms_norm(hidden, (WIDTH,), self.norm, 1e-6)
        scores = functional.linear(normed, self.router)[0, :, 0].float().sigmoid()
        tokens = scores.topk(int(share * TOKENS), sorted=False).indices.sort().values
        made = self(hidden[:, tokens])
        factors = scores[tokens, None].to(made.dtype)
        hidden[0].index_add_(0, tokens, made[0] * factors)
        return hidden


def ops_alone(layer: Layer, share: float) -> dict[str, Callable[[], object]]:
    """Each op of the routed layer by itself, on what it gets there."""
    room, scores = int(share * TOKENS), layer.scores()
    tokens = route_tokens(scores, capacity=room)[0][:, :room]
    rows = gather_tokens(layer.hidden, tokens)
    weights, hidden = scores.gather(1, tokens.long()), layer.hidden.clone()
    small = rows * 2**-10  # added again and again
    return {
        "router_scores": layer.scores,
        "route_tokens": lambda: route_tokens(scores, capacity=room),
        "gather_tokens": lambda: gather_tokens(layer.hidden, tokens),
        "combine_tokens in place": lambda: combine_tokens.into(
            hidden, hidden=hidden, update=small, tokens=tokens, weights=weights
        ),
        "layer of these rows": lambda: layer(rows),
        "layer of all rows": lambda: layer(layer.hidden),
    }


def measure(layer: Layer, share: float, dtype: str, budget_s: float, flush: Any) -> dict[str, Any]:
    """One row: what each part takes, and the sum of the ops over the layer."""
    forms = {
        "routed": lambda: layer.routed(layer.hidden.clone(), share),
        "routed by index ops": lambda: layer.by_index(layer.hidden.clone(), share),
    }
    scores = layer.scores()
    tokens = route_tokens.reference(scores, capacity=share)[0][:, : int(share * TOKENS)].long()
    wide = layer.hidden.double()
    rows = wide[0, tokens[0]]
    gate, up, down = (w.double() for w in (layer.gate, layer.up, layer.down))
    made = (functional.silu(rows @ gate.T) * (rows @ up.T)) @ down.T
    truth = wide.clone()
    truth[0, tokens[0]] += made * scores[0, tokens[0], None].double()
    # 16-bit scores round the border to others; so only the ops' own form must take the same tokens.
    errors = prove({"routed": forms["routed"]}, truth, TOLERANCE[dtype])
    parts = ops_alone(layer, share)
    timed = interleave({**parts, **forms}, threads=1, budget_s=budget_s, before=flush)
    costs = sum(timed[name].median_us for name in list(parts)[:4])
    return {
        "capacity": share,
        "dtype": dtype,
        "threads": 1,
        "tokens": TOKENS,
        "widened": layer.widened,
        "variants": {n: {**t.to_dict(), "error": errors.get(n)} for n, t in timed.items()},
        "ops_share": round(costs / timed["layer of these rows"].median_us, 5),
        "ops_share_of_all": round(costs / timed["layer of all rows"].median_us, 5),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.routing", description=__doc__)
    parser.add_argument("--budget-s", type=float, default=50.0, help="wall time for each share")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=sorted(TOLERANCE))
    parser.add_argument("--json", type=Path, help="result file, written after every row")
    options = parser.parse_args()
    console = Console()
    torch.set_num_threads(1)
    settings = {"budget_s": options.budget_s, "width": WIDTH, "inner": INNER}
    recorder = Recorder("routing", options.json, settings)
    recorder.document["bandwidth_gb_s"] = {"1": read_bandwidth(1)}
    flush = cache_flusher(2 * last_level_cache_bytes())
    with torch.inference_mode():
        for dtype in options.dtype:
            layer = Layer(getattr(torch, dtype))
            for share in SHARES:
                row = measure(layer, share, dtype, options.budget_s, flush)
                recorder.add(row)
                console.print(
                    f"{dtype} {share:.1%}: routing ops {row['ops_share']:.2%} of the layer"
                )
                for name, found in row["variants"].items():
                    console.print(f"  {name:24} {found['us'] / 1e3:10.3f} ms", highlight=False)
    recorder.save()


if __name__ == "__main__":
    main()
