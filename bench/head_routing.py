"""Attention whose tokens run a few heads: python -m bench.head_routing [--json OUT].

One decoder layer 2048 wide with 32 query heads of 64, 8 KV heads and random weights; its FFN and
the vocabulary are tiny, so what is timed is attention with its projections. One thread, CPU time,
in turns; each is proven against the same choice by hand. "whole" is the model in a patch without a
policy, "keys" the same that makes and keeps keys and values and does nothing else of attention:
what is between them is the most that heads can save, and a share of heads could save that share.
"""

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

import adaptive
from adaptive import ExpertRouterWeights, HeadRouting
from adaptive.layers.hf_adopt import adopt
from bench.machine import last_level_cache_bytes
from bench.record import Recorder
from bench.timing import TOLERANCE, WrongResultError, cache_flusher, interleave, speedup

WIDTH, HEADS, KV_HEADS, HEAD_DIM = 2048, 32, 8, 64
GROUP = HEADS // KV_HEADS
MODEL = "one layer, 2048 wide, 32 heads of 64, 8 KV heads"
TOPS = (2, 4, 6)
PROVEN = 200
"""Tokens of the proofs: more than a block, and few enough for float64."""


def make(dtype: torch.dtype) -> Any:
    """A Llama of one layer that is hardly more than attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=256,
        max_position_embeddings=1 << 17,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


class KeysOnly(nn.Module):
    """Attention that makes and keeps keys and values, and returns zeros."""

    def __init__(self, attention: Any) -> None:
        """Take over the projections."""
        super().__init__()
        self.k_proj, self.v_proj = attention.k_proj, attention.v_proj

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any, past_key_values: Any, **_: Any
    ) -> tuple[Tensor, None]:
        """Add to the cache."""
        shape = (*hidden_states.shape[:-1], -1, HEAD_DIM)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        key = turned(key, *position_embeddings)
        if past_key_values is not None:
            past_key_values.update(key, value, 0)
        return torch.zeros_like(hidden_states), None


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of ``[batch, heads, tokens, head_dim]``."""
    first, second = states.chunk(2, -1)
    return states * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def by_hand(model: Any, states: Tensor, gates: Tensor) -> Tensor:
    """What attention gives in float64 if heads are scaled by ``gates``, ``[tokens, kv_heads]``."""
    attention, x = model.model.layers[0].self_attn, states.double()
    names = ("q_proj", "k_proj", "v_proj")
    split = [
        (x @ getattr(attention, n).weight.double().T).view(len(x), -1, HEAD_DIM) for n in names
    ]
    query, key, value = (part.transpose(0, 1)[None] for part in split)
    rotary = model.model.rotary_emb(x[None], torch.arange(len(x))[None])
    query, key = turned(query, *rotary), turned(key, *rotary)
    key, value = (part.repeat_interleave(GROUP, 1) for part in (key, value))
    scores = (query @ key.transpose(2, 3) / math.sqrt(HEAD_DIM)).masked_fill(
        ~torch.ones(len(x), len(x), dtype=torch.bool).tril(), -math.inf
    )
    made = (scores.softmax(-1) @ value)[0] * gates.T.repeat_interleave(GROUP, 0)[..., None]
    out: Tensor = made.transpose(0, 1).flatten(1) @ attention.o_proj.weight.double().T
    return out


def error_of(model: Any, policy: HeadRouting, dtype: str) -> float:
    """The relative error of a patched model's attention; raises if it is none of rounding."""
    seen: list[Tensor] = []
    layer = model.model.layers[0]
    handles = [
        layer.input_layernorm.register_forward_hook(lambda *call: seen.append(call[-1][0])),
        layer.self_attn.register_forward_hook(lambda *call: seen.append(call[-1][0][0])),
    ]
    ids = torch.randint(0, 256, (1, PROVEN), generator=torch.Generator().manual_seed(1))
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    states, made = seen
    if policy.router is None:
        gates = torch.zeros(PROVEN, KV_HEADS, dtype=torch.float64)
        gates[:, list(policy.heads_of(0))] = 1
    else:
        weight, _ = policy.router.of(0, states.device)
        scores = states.double() @ weight.double().T
        gates = torch.zeros_like(scores).scatter(1, scores.topk(policy.top_k or 0, 1).indices, 1.0)
    wanted = by_hand(model, states, gates)
    error = float((made.double() - wanted).norm() / wanted.norm())
    if not error < TOLERANCE[dtype]:
        raise WrongResultError(f"{policy}: relative error {error}")
    return error


def run(dtype: str, options: Any, recorder: Recorder, console: Console) -> None:
    """Prove and time all choices, in prompts and in steps after caches of several lengths."""
    stock = make(getattr(torch, dtype))
    models = {name: copy.deepcopy(stock) for name in ("whole", "keys")}
    models["keys"].model.layers[0].self_attn = KeysOnly(models["keys"].model.layers[0].self_attn)
    adaptive.patch(models["whole"])
    router, errors, shares = ExpertRouterWeights.random((0,), KV_HEADS, WIDTH), {}, {}
    for top in TOPS:
        spread = tuple((0, head * KV_HEADS // top) for head in range(top))
        policies = {
            f"token {top}/{KV_HEADS}": HeadRouting(top_k=top, router=router, audit_every=None),
            f"layer {top}/{KV_HEADS}": HeadRouting(heads=spread, audit_every=None),
        }
        for name, policy in policies.items():
            models[name], shares[name] = copy.deepcopy(stock), top / KV_HEADS
            adaptive.patch(models[name], policy)
            errors[name] = error_of(models[name], policy, dtype)
    models["stock"] = stock
    flush = cache_flusher(2 * last_level_cache_bytes())
    for tokens, past in [(tokens, 0) for tokens in options.tokens] + [(1, n) for n in options.past]:
        rng = torch.Generator().manual_seed(tokens + past)
        ids = torch.randint(0, 256, (1, tokens), generator=rng)
        forms = {name: step_of(model, ids, past, name) for name, model in models.items()}
        found = interleave(
            forms, threads=1, budget_s=options.budget_s, at_least=3, repetitions=25, before=flush
        )
        whole, keys = found["whole"].median_us, found["keys"].median_us
        variants = {}
        for name, timing in found.items():
            share = shares.get(name, 0.0 if name == "keys" else 1.0)
            ideal = keys + share * (whole - keys)
            variants[name] = {
                **timing.to_dict(),
                "error": errors.get(name),
                "speedup": round(speedup(found["whole"], timing), 3),
                "share": share,
                "of_ideal": round(ideal / timing.median_us, 3),
            }
        recorder.add(
            {
                "model": MODEL,
                "tokens": tokens,
                "past": past,
                "dtype": dtype,
                "threads": 1,
                "variants": variants,
            }
        )
        text = ", ".join(
            f"{n} {v['us'] / 1e3:.2f} ms ({v['of_ideal']})" for n, v in variants.items()
        )
        console.print(f"{dtype} {tokens} tokens after {past}: {text}", soft_wrap=True)


def step_of(model: Any, ids: Tensor, past: int, name: str) -> Any:
    """One pass over ``ids`` after ``past`` tokens; steps go on, each with one token more."""
    if not past:
        return lambda: model.model(ids, use_cache=False)
    cache = DynamicCache(config=model.config)
    if name != "stock":  # the patch's cache grows in place; a stock one is copied in every step
        adopt(cache)
    shape = (1, KV_HEADS, past, HEAD_DIM)
    rng = torch.Generator().manual_seed(0)
    key, value = (torch.randn(shape, generator=rng).to(model.dtype) for _ in range(2))
    cache.update(key, value, 0)
    return lambda: model.model(ids, past_key_values=cache, use_cache=True)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.head_routing", description=__doc__)
    parser.add_argument("--budget-s", type=float, default=12.0, help="wall time for each row")
    parser.add_argument("--tokens", type=int, nargs="*", default=(512, 2048))
    parser.add_argument("--past", type=int, nargs="*", default=(512, 4096, 16384))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="result file, written after every row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {k: v for k, v in vars(options).items() if k != "json"}
    recorder = Recorder("head_routing", options.json, settings)
    with torch.no_grad():
        for dtype in options.dtype:
            run(dtype, options, recorder, Console())


if __name__ == "__main__":
    main()
