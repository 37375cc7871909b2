"""FFNs whose tokens run a few experts: python -m bench.ffn_experts [--json OUT] [--quality].

Speed: one FFN 2048 wide with 5632 neurons and random weights. One thread, CPU time, cold caches, in
turns; each is proven against the same choice by hand. "whole" is the FFN as a patch without a
policy runs it; its time times the share of the neurons that tokens run is what a choice of experts
could cost at best, and where few tokens are many experts, times the share of the weights they read.

Quality: the lab model's bits per byte on held-out text by the share of the neurons that run, for
clusters and cuts scored by their mean gate, for routers that nobody trained, and for routers that
learned for a few steps.
"""

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import adaptive
from adaptive import ExpertRouterWeights, FeedForwardExperts
from adaptive.train import tune_experts
from bench.lab import data, tasks
from bench.lab.evaluate import HERE, load
from bench.machine import last_level_cache_bytes, read_bandwidth
from bench.record import Recorder
from bench.timing import TOLERANCE, cache_flusher, interleave, prove, speedup

WIDTH, NEURONS = 2048, 5632
EXPERTS = 8
MODEL = "one FFN, 2048 x 5632"
CHOICES = {
    "clusters": (1, 2, 4),
    "cut": (2,),
}
LAB_EXPERTS = 16
LAB_TOP = (1, 2, 4, 8, 12, 14, 15)
LAB_TRAINED = (2, 4, 8)
LAB_TEXTS, LAB_TOKENS, LAB_BATCH = 12, 256, 2


def make(dtype: torch.dtype) -> Any:
    """A Llama of one layer whose FFN has the shape; all else is small."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=256,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def by_hand(ffn: Any, x: Tensor) -> Tensor:
    """What the chosen experts of a patched FFN make of ``x``, in float64, without skipping."""
    forward = ffn.forward
    order = forward.weights.order
    order = torch.arange(NEURONS) if order is None else order
    of = torch.empty(NEURONS, dtype=torch.long)
    of[order] = torch.arange(NEURONS) // (NEURONS // EXPERTS)
    gate, up, down = (p.weight.double() for p in (ffn.gate_proj, ffn.up_proj, ffn.down_proj))
    gates = x.double() @ gate.T
    scores = torch.zeros(*x.shape[:-1], EXPERTS, dtype=torch.float64).index_add_(-1, of, gates)
    best = scores.topk(forward.policy.top_k, -1).indices
    runs = torch.zeros_like(scores).scatter_(-1, best, 1.0)[..., of]
    made: Tensor = (ffn.act_fn(gates) * (x.double() @ up.T) * runs) @ down.T
    return made


def speed(dtype: str, options: Any, recorder: Recorder, console: Console) -> None:
    """Prove and time all choices at each number of tokens."""
    stock = make(getattr(torch, dtype))
    models = {"whole": copy.deepcopy(stock)}
    adaptive.patch(models["whole"])
    handles = {}
    for split, tops in CHOICES.items():
        for top in tops:
            name = f"{split} {top}/{EXPERTS}"
            models[name] = copy.deepcopy(stock)
            policy = FeedForwardExperts(experts=EXPERTS, top_k=top, split=split, audit_every=None)
            handles[name] = adaptive.patch(models[name], policy)
    ffns = {name: model.model.layers[0].mlp for name, model in models.items()}
    ffns["stock"] = stock.model.layers[0].mlp
    flush = cache_flusher(2 * last_level_cache_bytes())
    for tokens in options.tokens:
        x = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))
        x = x.to(getattr(torch, dtype))
        errors = {}
        for name in handles:
            part = x[:, : min(tokens, 128)]
            run = {name: (lambda ffn=ffns[name], part=part: ffn(part))}
            errors |= prove(run, by_hand(ffns[name], part), TOLERANCE[dtype])
        shares = {}
        for name, handle in handles.items():
            handle.reset_stats()
            ffns[name](x)
            log = handle.report().experts
            assert log is not None
            shares[name] = log.share, log.read_share
        forms = {name: (lambda ffn=ffn, x=x: ffn(x)) for name, ffn in ffns.items()}
        for name in ("stock", "whole"):
            ffns[name](x[:, :32])  # the others ran already
        found = interleave(
            forms, threads=1, budget_s=options.budget_s, at_least=2, repetitions=9, before=flush
        )
        variants = {}
        for name, timing in found.items():
            ran, read = shares.get(name, (1.0, 1.0))
            gain = speedup(found["whole"], timing)
            variants[name] = {
                **timing.to_dict(),
                "error": errors.get(name),
                "speedup": round(gain, 3),
                "ran_share": ran,
                "read_share": read,
                "of_ideal": round(gain * ran, 3),
                "of_ideal_by_reads": round(gain * max(ran or 0.0, read or 0.0), 3),
            }
        recorder.add(
            {"model": MODEL, "tokens": tokens, "dtype": dtype, "threads": 1, "variants": variants}
        )
        text = ", ".join(f"{n} {v['us'] / 1e3:.2f} ms" for n, v in variants.items())
        console.print(f"{dtype} {tokens} tokens: {text}", soft_wrap=True)


def quality(options: Any, recorder: Recorder, console: Console) -> None:
    """Bits per byte of the lab model by share of the neurons."""
    model, tokenizer = load(HERE / "model")
    text = data.long_document()
    tokens = np.asarray(tasks.encoder(tokenizer)(text))
    bos, per_token = tasks.bos_id(tokenizer), len(text.encode()) / len(tokens)

    starts = np.linspace(0, len(tokens) - options.context - 1, options.windows).astype(int)
    pieces = [torch.from_numpy(tokens[s : s + options.context].astype(np.int64)) for s in starts]

    def bits() -> float:
        nats = []
        for piece in pieces:
            ids = torch.cat([torch.tensor([bos]), piece[:-1]])[None]
            logits = model(ids, use_cache=False).logits[0]
            nats.append(torch.nn.functional.cross_entropy(logits, piece).item())
        return float(np.mean(nats)) / math.log(2) / per_token

    layers = tuple(range(model.config.num_hidden_layers))
    width = model.config.hidden_size
    dense = bits()
    console.print(f"dense: {dense:.4f} bits per byte")
    recorder.document["dense_bits_per_byte"] = round(dense, 4)
    forms: dict[str, dict[str, Any]] = {
        "clusters": {"split": "clusters"},
        "cut": {"split": "cut"},
        "random router": {
            "split": "cut",
            "router": ExpertRouterWeights.random(layers, LAB_EXPERTS, width),
        },
    }
    for top in LAB_TOP:
        more = {}
        if options.steps and top in LAB_TRAINED:
            more["trained router"] = {"router": trained(model, tokenizer, top, options)}
        for name, fields in {**forms, **more}.items():
            policy = FeedForwardExperts(experts=LAB_EXPERTS, top_k=top, audit_every=1, **fields)
            with adaptive.patch(model, policy) as patched:
                found = bits()
                log = patched.report().experts
            assert log is not None
            assert log.error is not None
            assert log.cosine is not None
            row = {
                "what": name,
                "experts": LAB_EXPERTS,
                "top_k": top,
                "share": log.share,
                "bits_per_byte": round(found, 4),
                "more_bits": round(found - dense, 4),
                "ffn_error_mean": round(log.error[0], 4),
                "ffn_cosine_mean": round(log.cosine[0], 4),
            }
            recorder.add(row)
            console.print(row)


def trained(model: Any, tokenizer: Any, top: int, options: Any) -> ExpertRouterWeights:
    """Routers that learned on text of the lab model's training set, by the clusters' mean gates."""
    texts = data.training_texts()[:LAB_TEXTS]
    tokens = torch.tensor(tasks.encoder(tokenizer)("\n".join(texts)))
    rng = torch.Generator().manual_seed(top)

    def batches() -> Any:
        for _ in range(options.steps):
            starts = torch.randint(0, len(tokens) - LAB_TOKENS, (LAB_BATCH,), generator=rng)
            yield torch.stack([tokens[start : start + LAB_TOKENS] for start in starts.tolist()])

    found = tune_experts(
        model, batches(), steps=options.steps, experts=LAB_EXPERTS, top_k=top, progress=False
    )
    assert isinstance(found.policy.router, ExpertRouterWeights)
    return found.policy.router


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.ffn_experts", description=__doc__)
    parser.add_argument("--budget-s", type=float, default=20.0, help="wall time for each row")
    parser.add_argument("--tokens", type=int, nargs="+", default=(1, 8, 512, 2048))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--quality", action="store_true", help="the lab model instead of speed")
    parser.add_argument("--steps", type=int, default=60, help="of training routers; 0: none")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--json", type=Path, help="result file, written after every row")
    parser.add_argument("--chart", type=Path, help="draw --json as a PNG, and measure nothing")
    options = parser.parse_args()
    if options.chart is not None:
        from bench.ffn_experts_chart import draw

        draw(options.json, options.chart)
        return
    torch.set_num_threads(1)
    kind = "ffn_experts_quality" if options.quality else "ffn_experts"
    settings = {k: v for k, v in vars(options).items() if k not in ("json", "chart")}
    recorder = Recorder(kind, options.json, settings)
    with torch.no_grad():
        if options.quality:
            quality(options, recorder, Console())
            return
        recorder.document["bandwidth_gb_s"] = {"1": read_bandwidth(1)}
        for dtype in options.dtype:
            speed(dtype, options, recorder, Console())


if __name__ == "__main__":
    main()
