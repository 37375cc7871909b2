"""Times drafts with their siblings on the lab model: python -m bench.siblings [--json OUT].

On three kinds of text: early exits and skipped modules as chains, the same with siblings, and the
tree of Token Recycling, against the exact path; every variant's tokens proved equal first. Besides
the times: how often the token of each rank was right where a draft was wrong. Variants take turns
in one process.
"""

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch

import adaptive
from bench.record import Recorder
from bench.speculation import LAB, PAD, measure, texts

EXITS = (2, 3, 4)
SKIP = ((2, 4, 6), (2, 4, 6))
Policy = adaptive.SelfSpeculative


def variant_policies() -> dict[str, Policy | None]:
    """Every variant by name."""
    found: dict[str, Policy | None] = {"exact": None, "tree": Policy(tree=True)}
    for tree, ending in ((False, ""), (True, ", siblings")):
        for layer in EXITS:
            found[f"exit {layer}{ending}"] = Policy(exit_layer=layer, tree=tree)
        found[f"exit 3, 4{ending}"] = Policy(exit_layer=3, draft=4, tree=tree)
        found[f"skip{ending}"] = Policy(skip=SKIP, tree=tree)
    return found


def rank_shares(model: Any, ids: torch.Tensor, layer: int, tokens: int) -> list[float]:
    """How often the token of each rank, from the second, is right where the draft is wrong."""
    own = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    own.generation_config.eos_token_id = None
    with adaptive.patch(own, Policy(exit_layer=layer, draft=4, tree=True)) as patched:
        own.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=PAD)
        length = patched._record.draft_sizes[1]
    return [round(count / length.failed, 3) for count in length.misses]


def lab(options: argparse.Namespace, recorder: Recorder) -> None:
    """The lab model, text by text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(LAB)
    model = AutoModelForCausalLM.from_pretrained(LAB).eval()
    for text, ids in texts(tokenizer, 384).items():
        variants = measure(model, ids, options, variant_policies())
        shares = {str(layer): rank_shares(model, ids, layer, options.tokens) for layer in EXITS}
        row = {"what": "lab", "text": text, "batch": 1, "rank_shares": shares}
        recorder.add({**row, "variants": variants})
        for name, found in variants.items():
            print(f"{text}, {name:22s} {found}")
        print(f"{text}: {shares}", flush=True)


def main() -> int:
    """Measure, print, write; 1 if something could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.siblings", description=__doc__)
    add = parser.add_argument
    add("--tokens", type=int, default=128, help="tokens to generate")
    add("--repetitions", type=int, default=5)
    add("--threads", type=int, default=1)
    add("--budget-s", type=float, default=90.0, help="wall time for each text")
    add("--json", type=Path, help="result file, written after every text")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {k: v for k, v in vars(options).items() if k != "json"}
    recorder = Recorder("siblings", options.json, settings)
    try:
        lab(options, recorder)
    except (RuntimeError, ValueError, MemoryError) as error:
        recorder.fail("lab", error)
        print(error, file=sys.stderr)
    recorder.save()
    return int(bool(recorder.document["failures"]))


if __name__ == "__main__":
    sys.exit(main())
