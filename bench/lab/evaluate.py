"""Evaluate the lab model: bits per byte, passkey, induction heads, exit curve, and charts."""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.lab import data, measure, tasks

HERE = Path(__file__).parent
EXAMPLES = """examples:
  python -m bench.lab.evaluate                     everything (about 15 minutes on one core)
  python -m bench.lab.evaluate --seeds 1           a quicker passkey table
  python -m bench.lab.evaluate --charts-only       redraw the charts from results.json
"""


def load(folder: Path) -> tuple[Any, Any]:
    """Return the exported model (float32, ready to measure) and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(str(folder))


def bits_per_byte(
    model: Any, tokenizer: Any, texts: dict[str, str], context: int, windows: int
) -> dict[str, Any]:
    """Return bits per byte and next-token accuracy of every exit, for each named text."""
    encode = tasks.encoder(tokenizer)
    bos = tasks.bos_id(tokenizer)
    found: dict[str, Any] = {}
    for name, text in texts.items():
        tokens = np.asarray(encode(text))
        nats, hits = measure.text_losses(model, tokens, bos, context, windows)
        bytes_per_token = len(text.encode()) / len(tokens)
        bits = nats / math.log(2) / bytes_per_token
        found[name] = {
            "bits_per_byte": round(float(bits[-1]), 4),
            "bytes_per_token": round(bytes_per_token, 4),
            "context": context,
            "windows": windows,
            "bits_per_byte_by_exit": [round(float(x), 4) for x in bits],
            "accuracy_by_exit": [round(float(x), 4) for x in hits],
        }
    return found


def passkey_table(
    model: Any, tokenizer: Any, lengths: list[int], depths: list[float], seeds: int
) -> dict[str, Any]:
    """Return passkey accuracy by length, depth and exit layer."""
    table: dict[str, Any] = {"depths": depths, "seeds": seeds, "lengths": {}}
    for length in lengths:
        begun = time.time()
        cells = np.asarray(
            [
                [measure.passkey_exits(model, tokenizer, length, d, seed) for seed in range(seeds)]
                for d in depths
            ],
            dtype=float,
        )
        table["lengths"][str(length)] = {
            "accuracy": round(float(cells[..., -1].mean()), 4),
            "prompts": int(cells[..., -1].size),
            "by_depth": [round(float(x), 4) for x in cells[..., -1].mean(1)],
            "by_exit": [round(float(x), 4) for x in cells.mean((0, 1))],
        }
        accuracy = table["lengths"][str(length)]["accuracy"]
        print(f"passkey {length}: {accuracy:.3f} ({time.time() - begun:.0f} s)", flush=True)
    return table


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Run every measurement and return the results."""
    import transformers

    torch.set_num_threads(args.threads)
    model, tokenizer = load(args.model)
    texts = {"long_document": data.long_document(), "source": "\n".join(data.heldout_texts())}
    text = bits_per_byte(model, tokenizer, texts, args.context, args.windows)
    heads = measure.induction_scores(model, length=256, batch=4, seed=0)
    depths = [round(float(d), 3) for d in np.linspace(0.0, 1.0, args.depths)]
    passkey = passkey_table(model, tokenizer, args.lengths, depths, args.seeds)
    config = model.config
    return {
        "model": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
        },
        "text": text,
        "passkey": passkey,
        "induction": {
            "scores": [[round(float(x), 3) for x in row] for row in heads],
            "heads_above_0.3": int((heads > 0.3).sum()),
            "best": round(float(heads.max()), 3),
        },
        "copy_accuracy_by_exit": measure.copy_accuracy(model, length=256, batch=4, seed=0),
        "logit_difference_from_transformers": measure.transformers_difference(model),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def main() -> None:
    """Read the command line, measure, write ``results.json`` and the charts."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.lab.evaluate", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", type=Path, default=HERE / "model", help="model folder to measure")
    add("--out", type=Path, default=HERE, help="folder for results.json and the charts")
    add("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192],
        metavar="TOKENS", help="passkey prompt lengths")  # fmt: skip
    add("--depths", type=int, default=11, help="depths from 0 to 1 (default 11)")
    add("--seeds", type=int, default=6, help="prompts per length and depth (default 6)")
    add("--context", type=int, default=1024, help="tokens per held-out text window")
    add("--windows", type=int, default=48, help="held-out windows per text")
    add("--threads", type=int, default=1, help="CPU threads (default 1)")
    add("--charts-only", action="store_true", help="redraw the charts and stop")
    args = parser.parse_args()
    target = args.out / "results.json"
    if not args.charts_only:
        results = evaluate(args)
        target.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    from bench.lab import charts

    charts.draw_all(json.loads(target.read_text()), HERE / "log.jsonl", args.out)


if __name__ == "__main__":
    main()
