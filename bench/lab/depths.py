"""Trains a small Mixture-of-Depths model from scratch, and the dense model of as many operations.

Every second layer sees a quarter of the tokens, chosen as Raposo et al. 2024 (arXiv:2404.02258) do:
the best of each sequence by a linear router, their update multiplied by its logit. Beside the loss
of the text the router learns to give these tokens scores above one half, and a predictor to name
them, both without a gradient to the rest; with either the model can decode, which the best of a
sequence cannot, since they depend on what comes later.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from adaptive import RouterPredictor, RouterWeights
from adaptive.policy.router_predictor import PARTS, predict
from bench.lab import data
from bench.lab import model as lab
from bench.lab.muon import Muon

HERE = Path(__file__).parent
MODELS = HERE / "depths_models"
RECIPE = MODELS / "recipe.json"
ROUTERS = "routers.safetensors"


class Routers(nn.Module):
    """A router and its predictor for each routed layer."""

    def __init__(self, layers: list[int], width: int, hidden: int) -> None:
        """Make random weights."""
        super().__init__()
        self.layers = layers
        count = len(layers)
        self.weight = nn.Parameter(torch.randn(count, width) / width**0.5)
        self.inner = nn.Parameter(torch.randn(count, hidden, width) / width**0.5)
        self.inner_bias = nn.Parameter(torch.zeros(count, hidden))
        self.outer = nn.Parameter(torch.randn(count, hidden) / hidden**0.5)
        self.outer_bias = nn.Parameter(torch.zeros(count, 1))

    def predictor(self, at: int) -> list[Tensor]:
        """Weights of the ``at``-th predictor, as `predict` takes them."""
        return [self.inner[at], self.inner_bias[at], self.outer[at], self.outer_bias[at]]

    def export(self) -> RouterWeights:
        """What a policy takes."""
        named = [
            dict(zip(PARTS, self.predictor(at), strict=True)) for at in range(len(self.layers))
        ]
        return RouterWeights(
            layers=tuple(self.layers),
            weight=tuple(map(tuple, self.weight.detach().tolist())),
            predictor=RouterPredictor.from_tensors(named),
        )


def build(recipe: dict[str, Any], kind: str) -> tuple[LlamaForCausalLM, Routers | None]:
    """Return a new model of a kind, "routed" or "dense", and its routers."""
    shape = recipe["architecture"]
    torch.manual_seed(recipe["seed"])
    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=recipe[kind]["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=shape["max_positions"],
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).float()
    routed = recipe[kind].get("routed")
    if not routed:
        return model, None
    return model, Routers(routed, shape["hidden_size"], recipe["predictor_width"])


def hidden_states(
    model: LlamaForCausalLM, routers: Routers | None, ids: Tensor, capacity: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Run all layers on ``ids``, ``[batch, tokens]``.

    Returns:
        The last states, the sum of what routers and predictors lose, and the share of tokens that
        the predictors name right.
    """
    config = model.config
    x = model.model.embed_tokens(ids)
    batch, tokens, width = x.shape
    positions = torch.arange(tokens).expand(batch, -1)
    theta = config.rope_parameters["rope_theta"]
    cos, sin = lab.rope_tables(positions, config.head_dim, theta)
    kept = max(1, int(capacity * tokens))
    side, right = torch.zeros(()), []
    for index, layer in enumerate(model.model.layers):
        weights = lab.layer_weights(layer)
        if routers is None or index not in routers.layers:
            x = x + lab.layer_forward(weights, x, cos, sin, config.rms_norm_eps)
            continue
        at = routers.layers.index(index)
        states = F.rms_norm(x, (width,), weights[0], config.rms_norm_eps)
        logits = states @ routers.weight[at]
        best = logits.topk(kept, 1).indices.sort(1).values
        taken = torch.zeros_like(logits).scatter(1, best, 1.0)
        rows = best[..., None].expand(-1, -1, width)
        turns = best[:, None, :, None].expand(-1, 1, -1, config.head_dim)
        update = lab.layer_forward(
            weights, x.gather(1, rows), cos.gather(2, turns), sin.gather(2, turns),
            config.rms_norm_eps,
        )  # fmt: skip
        x = x.scatter_add(1, rows, logits.gather(1, best)[..., None] * update)
        known = states.detach()
        named = predict(known, routers.predictor(at))
        scored = known @ routers.weight[at]
        for guess in (named, scored):
            side = side + F.binary_cross_entropy_with_logits(guess, taken)
        right.append(((named > 0) == (taken > 0)).float().mean())
    return x, side, torch.stack(right).mean() if right else torch.ones(())


def optimizers(model: LlamaForCausalLM, routers: Routers | None) -> list[Any]:
    """Muon for the layers' matrices, AdamW for the rest, their shares of the learning rate."""
    named = list(model.named_parameters())
    rest = [
        {"params": [p for n, p in named if "embed" in n], "scale": 0.5},
        {"params": [p for n, p in named if p.dim() == 1], "scale": 0.5},
    ]
    if routers is not None:
        rest.append({"params": list(routers.parameters()), "scale": 0.5})
    matrices = [p for n, p in named if p.dim() > 1 and "layers" in n]
    return [
        Muon([{"params": matrices, "scale": 1.0}], momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def corpus(split: str, work: Path) -> tuple[np.ndarray, int]:
    """The encoded text of a split, by the lab model's tokenizer, and its bytes.

    Made once and cached in ``work``.
    """
    cache = work / f"depths-{split}.npz"
    if cache.exists():
        found = np.load(cache)
        return found["tokens"], int(found["size"])
    tokenizer = Tokenizer.from_file(str(HERE / "model" / "tokenizer.json"))
    texts = data.training_texts() if split == "train" else data.heldout_texts()
    tokens = data.encode_corpus(tokenizer, texts, 1)
    size = sum(len(text.encode()) for text in texts)
    work.mkdir(parents=True, exist_ok=True)
    np.savez(cache, tokens=tokens, size=size)
    return tokens, size


def train(kind: str, work: Path, out: Path) -> None:
    """Train one kind by the recipe, and write it, its routers and a log to ``out``."""
    recipe = json.loads(RECIPE.read_text())
    model, routers = build(recipe, kind)
    model.train()
    tokens, _ = corpus("train", work)
    optimize = optimizers(model, routers)
    capacity = recipe[kind].get("capacity", 1.0)
    log, start = [], time.process_time()
    for step in range(recipe["steps"]):
        rng = np.random.default_rng([recipe["seed"], step])
        starts = rng.integers(0, len(tokens) - recipe["context"] - 1, recipe["batch"])
        rows = [tokens[at : at + recipe["context"] + 1].astype(np.int64) for at in starts]
        ids = torch.from_numpy(np.stack(rows))
        x, side, right = hidden_states(model, routers, ids[:, :-1], capacity)
        n = F.rms_norm(x, (x.shape[-1],), model.model.norm.weight, 1e-5)
        logits = F.linear(n, model.lm_head.weight).flatten(0, 1)
        loss = F.cross_entropy(logits, ids[:, 1:].flatten())
        (loss + recipe["side_weight"] * side).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = recipe["lr"] * min(1.0, (step + 1) / 30, 1.05 - step / recipe["steps"])
        for optimizer in optimize:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == recipe["steps"] - 1:
            log.append(
                {
                    "step": step,
                    "loss": round(float(loss.detach()), 4),
                    "predicted": round(float(right), 4),
                    "cpu_s": round(time.process_time() - start, 1),
                }
            )
            print(log[-1], flush=True)
    folder = out / kind
    model.eval().to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    if routers is not None:
        routers.export().save(folder / ROUTERS)
        (folder / ROUTERS).chmod(0o644)
    lines = "\n".join(json.dumps(row) for row in log)
    (folder / "log.jsonl").write_text(lines + "\n")


def load(kind: str) -> tuple[LlamaForCausalLM, RouterWeights | None]:
    """Return a shipped model in float32, and the routers that belong to it."""
    folder = MODELS / kind
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    path = folder / ROUTERS
    return model, RouterWeights.load(path) if path.exists() else None


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m bench.lab.depths", description=__doc__)
    parser.add_argument("kind", choices=["routed", "dense"])
    parser.add_argument("--work", type=Path, required=True, help="where encoded text is cached")
    parser.add_argument("--out", type=Path, default=MODELS, help="where the folder is written")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    train(chosen.kind, chosen.work, chosen.out)


if __name__ == "__main__":
    main()
