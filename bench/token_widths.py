"""FFNs of another width for each token: python -m bench.token_widths [--json OUT].

One FFN of a model with random weights whose router, untrained, chooses among four widths. One
thread, CPU time, cold caches, all forms in turns. Beside the patched FFN without a router stands
what a width for each token makes of it, and the time that the neurons used, or for few tokens
the weights read, allow. The router and the sorting of rows are part of the measured time.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import adaptive
from adaptive import TokenRouting, WidthRouter
from adaptive.layers.hf_linear import most_rows
from adaptive.layers.width_choice import chosen_neurons
from bench.machine import last_level_cache_bytes, read_bandwidth
from bench.record import Recorder
from bench.timing import TOLERANCE, cache_flusher, interleave, prove, speedup

MODEL = "one FFN, 2048 wide, 5632 neurons"
WIDTHS = (0.25, 0.5, 0.75, 1.0)
HIDDEN, NEURONS = 2048, 5632


def make(dtype: torch.dtype) -> Any:
    """A Llama of one layer with this FFN; all else is small."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=256,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def uniform(tokens: int) -> tuple[WidthRouter, torch.Tensor]:
    """A router of random weights, and states of which it gives each width the same share.

    Of fewer tokens than widths the first are the widest.
    """
    router = WidthRouter.random((0,), HIDDEN, choices=len(WIDTHS))
    many = torch.randn(4 * tokens + 64, HIDDEN, generator=torch.Generator().manual_seed(1))
    chosen = router.logits(0, many.bfloat16()).argmax(1)
    wanted = [len(WIDTHS) - 1 - token % len(WIDTHS) for token in range(tokens)]
    places = {choice: (chosen == choice).nonzero()[:, 0].tolist() for choice in range(len(WIDTHS))}
    return router, many[[places[choice].pop() for choice in wanted]][None]


def fixed(choice: int) -> WidthRouter:
    """A router that gives all tokens the same width."""
    bias = torch.zeros(len(WIDTHS))
    bias[choice] = 1.0
    return WidthRouter.from_tensors({0: torch.zeros(len(WIDTHS), HIDDEN)}, {0: bias})


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.token_widths", description=__doc__)
    parser.add_argument("--budget-s", type=float, default=15.0, help="wall time for each row")
    parser.add_argument("--tokens", type=int, nargs="+", default=(1, 4, 128, 2048))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path, help="result file, written after every row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {k: v for k, v in vars(options).items() if k != "json"}
    recorder = Recorder("token_widths", options.json, settings)
    recorder.document["bandwidth_gb_s"] = {"1": read_bandwidth(1)}
    flush = cache_flusher(2 * last_level_cache_bytes())
    with torch.no_grad():
        for dtype in options.dtype:
            stock = make(getattr(torch, dtype))
            for tokens in options.tokens:
                measure(stock, tokens, dtype, options.budget_s, flush, recorder, Console())


def measure(
    stock: Any,
    tokens: int,
    dtype: str,
    budget_s: float,
    flush: Any,
    recorder: Recorder,
    console: Console,
) -> None:
    """Prove and time all forms at one number of tokens."""
    router, x = uniform(tokens)
    x = x.to(getattr(torch, dtype))
    routers = {"mixed": router}
    if tokens == 1:
        routers = {f"always {WIDTHS[i]:g}": fixed(i) for i in range(len(WIDTHS))}
    whole = copy.deepcopy(stock)
    adaptive.patch(whole)
    forms = {"whole": whole.model.layers[0].mlp}
    shares, errors = {"whole": 1.0}, {}
    for name, given in routers.items():
        policy = TokenRouting(widths=WIDTHS, router=given, audit_every=None)
        model = copy.deepcopy(stock)
        patched = adaptive.patch(model, policy)
        ffn = forms[name] = model.model.layers[0].mlp
        now = ffn.forward.now
        used = chosen_neurons(policy, 0, x.flatten(0, 1), None, NEURONS, now)
        used = torch.tensor([used]) if isinstance(used, int) else used
        errors |= prove({name: lambda ffn=ffn: ffn(x)}, _truth(ffn, x, used), TOLERANCE[dtype])
        log = patched.report().widths
        assert log is not None
        few = tokens <= most_rows(x.dtype)  # then weights are what takes time
        shares[name] = log.read_share if few else log.used_share
    found = interleave(
        {name: lambda ffn=ffn: ffn(x) for name, ffn in forms.items()},
        threads=1,
        budget_s=budget_s,
        at_least=5,
        before=flush,
    )
    variants = {
        name: {
            **timing.to_dict(),
            "error": errors.get(name),
            "speedup": round(speedup(found["whole"], timing), 3),
            "share": round(shares[name], 4),
            "of_ideal": round(speedup(found["whole"], timing) * shares[name], 3),
        }
        for name, timing in found.items()
    }
    recorder.add(
        {"model": MODEL, "tokens": tokens, "dtype": dtype, "threads": 1, "variants": variants}
    )
    text = ", ".join(
        f"{n} {v['us'] / 1e3:.2f} ms ({v['speedup']:.2f}x, {v['of_ideal']:.0%} of ideal)"
        for n, v in variants.items()
    )
    console.print(f"{dtype} {tokens} tokens: {text}", soft_wrap=True)


def _truth(ffn: Any, x: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """The masked FFN in float64."""
    gate, up, down = (
        getattr(ffn, name).weight.double() for name in ("gate_proj", "up_proj", "down_proj")
    )
    wide = x.double()
    hidden = ffn.act_fn(wide @ gate.T) * (wide @ up.T)
    mask = torch.arange(NEURONS) < used[:, None]
    return (hidden * mask) @ down.T


if __name__ == "__main__":
    main()
