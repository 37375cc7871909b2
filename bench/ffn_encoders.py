"""FFNs of a trained encoder as experts: time against cosine to the full embedding.

python -m bench.ffn_encoders --minilm FOLDER --json RESULT.json

The model is all-MiniLM-L6-v2, the sentences are some of those of `bench.minilm`, in padded batches.
Routers are the mean of each expert's neurons, or random, to compare with; none is trained. Clusters
of which all run tell what routing costs, less the rows of padding, which run none.
"""

import argparse
import copy
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
import transformers

import adaptive
from adaptive import ExpertRouterWeights, FeedForwardExperts
from bench.minilm import BATCH, agreement, batches, embed
from bench.record import Recorder
from bench.timing import interleave, speedup

SENTENCES = 48
EXPERTS = 8
TOP = (2, 4, 6, 7)


def policies(layers: int, width: int) -> dict[str, tuple[str, int, FeedForwardExperts]]:
    """What is compared: (what it is called, experts that run, policy)."""
    router = ExpertRouterWeights.random(tuple(range(layers)), EXPERTS, width)
    forms: dict[str, dict[str, Any]] = {
        "clusters": {},
        "cut": {"split": "cut"},
        "cut, random router": {"split": "cut", "router": router},
    }
    found = {}
    for form, fields in forms.items():
        for top in (*TOP, EXPERTS) if form == "clusters" else TOP:
            policy = FeedForwardExperts(experts=EXPERTS, top_k=top, audit_every=1, **fields)
            found[f"{form} {top}"] = form, top, policy
    return found


def measure(folder: Path, record: Recorder, budget_s: float) -> None:
    """One row for each policy, and for the model without one."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    given = batches(tokenizer, sorted(pydoc_data.topics.topics)[::2], SENTENCES)
    chosen = policies(model.config.num_hidden_layers, model.config.hidden_size)
    full = embed(model, given)
    made, logs = {}, {}
    for name, (_, _, policy) in chosen.items():
        with adaptive.patch(model, policy) as patched:
            made[name] = embed(model, given)
            logs[name] = patched.report().experts
    shared = {id(weight): weight for weight in model.parameters()}
    timed = {"stock": model, "exact": copy.deepcopy(model, dict(shared))}
    adaptive.patch(timed["exact"])
    for name, (form, top, _) in chosen.items():
        if form == "clusters":
            timed[name] = copy.deepcopy(model, dict(shared))
            quiet = FeedForwardExperts(experts=EXPERTS, top_k=top, audit_every=None)
            adaptive.patch(timed[name], quiet)
    calls = {name: (lambda m=m: embed(m, given)) for name, m in timed.items()}
    for call in calls.values():
        call()  # copies of weights are made now
    timings = interleave(calls, threads=1, repetitions=7, at_least=3, budget_s=budget_s)
    made["stock"], made["exact"] = full, embed(timed["exact"], given)
    for name in ("stock", "exact", *chosen):
        form, top, _ = chosen.get(name, (name, EXPERTS, None))
        log, timing = logs.get(name), timings.get(name)
        row: dict[str, Any] = {
            "what": form,
            "experts": EXPERTS,
            "top_k": top,
            "share": 1.0 if log is None else log.share,
            "ffn_error_mean": None if log is None or log.error is None else round(log.error[0], 4),
            **agreement(made[name], full),
            "ms": None,
            "time_saved": None,
        }
        if timing is not None:
            values = timing.to_dict()
            row["ms"], row["ms_min"] = (round(values.pop(f) / 1e3, 2) for f in ("us", "us_min"))
            row["time_saved"] = round(1 - 1 / speedup(timings["exact"], timing), 4)
            row |= values
        record.add(row)
        print(row)
    record.document["sentences"], record.document["batch"] = len(full), BATCH
    record.document["tokens"] = {
        "real": int(sum(batch["attention_mask"].sum() for batch in given)),
        "padded": int(sum(batch["attention_mask"].numel() for batch in given)),
    }
    record.save()


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.ffn_encoders", description=__doc__)
    parser.add_argument("--minilm", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--budget-s", type=float, default=120.0, help="wall time of timing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"budget_s": options.budget_s, "threads": 1}
    measure(options.minilm, Recorder("ffn_encoders", options.json, settings), options.budget_s)


if __name__ == "__main__":
    main()
