"""Write a trained checkpoint as a Hugging Face model folder, with what belongs beside it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import GenerationConfig

from bench.lab import data
from bench.lab import model as lab
from bench.lab.tokenizer import save_for_transformers


def thin_log(source: Path, target: Path, keep: int = 400) -> None:
    """Copy a training log, leaving out rows until about ``keep`` and the evaluations remain."""
    rows = source.read_text().splitlines()
    stride = max(1, len(rows) // keep)
    kept = [r for i, r in enumerate(rows) if i % stride == 0 or '"passkey"' in r]
    target.write_text("\n".join(kept) + "\n", encoding="utf-8")


def export(work: Path, recipe_file: Path, out: Path) -> None:
    """Write the checkpoint as a Hugging Face model folder, with tokenizer, log and file list."""
    recipe = json.loads(recipe_file.read_text())
    tokenizer, _ = data.prepare(work)
    model = lab.build_model(recipe["architecture"])
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    model.load_state_dict(state["model"])
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    settings = out / "config.json"
    content = json.loads(settings.read_text(encoding="utf-8"))
    content["rope_theta"] = recipe["architecture"]["rope_theta"]  # where older readers look
    settings.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_for_transformers(tokenizer, out, recipe["architecture"]["max_positions"])
    thin_log(work / "log.jsonl", out.parent / "log.jsonl")
    data.write_list(out.parent / "data_list.json")
    print(f"step {state['step']}, {state['tokens']:,} tokens -> {out}")
