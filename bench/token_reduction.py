"""Rows of benchmarks in which tokens of an encoder go: a ViT timed, text embeddings compared.

Images are noise and the ViT's weights random: its time does not depend on them. Ideal is stock
attention and stock layers on as many tokens as are left, without matching, merging or sizes.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import adaptive
from bench.minilm import BATCH, NAME, Batch, agreement, embed
from bench.timing import interleave, speedup

SENTENCES = 48


def vit(**fields: Any) -> Any:
    """ViT-B/16 with random weights; its configuration is the default one."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(**fields)
    return transformers.ViTModel._from_config(config, attn_implementation="sdpa").eval()


def shortened(model: Any, counts: list[int]) -> Callable[[Tensor], Tensor]:
    """The same model, of which layer ``i`` runs on the first ``counts[i]`` tokens only."""
    holder = model if hasattr(model, "layers") else model.encoder
    layers = holder.layers if hasattr(holder, "layers") else holder.layer

    def run(images: Tensor) -> Tensor:
        states = model.embeddings(images)
        whole = states.clone()
        for layer, count in zip(layers, counts, strict=True):
            made = layer(states[:, :count])
            states = made[0] if isinstance(made, tuple) else made
        whole[:, : states.shape[1]] = states
        made = model.layernorm(whole)
        return model.pooler(made) if model.pooler is not None else made

    return run


def image_rows(
    model: Any, policies: Mapping[float, adaptive.Policy], stock: float, **timing: Any
) -> Iterator[dict[str, Any]]:
    """A row for stock, whose setting is called ``stock``, and one for each setting's policy.

    Args:
        model: That `vit` made.
        policies: By their setting.
        stock: The setting that keeps all tokens.
        timing: threads, repetitions and budget_s of `interleave`.
    """
    size = model.config.image_size
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    calls: dict[str, Callable[[], object]] = {f"reduced {stock}": lambda: model(images)}
    logs: dict[float, Any] = {}
    for setting, policy in policies.items():
        own, handle = _patched(model, policy)
        calls[f"reduced {setting}"] = lambda m=own: m(images)
        with torch.inference_mode():
            own(images)
        logs[setting] = _log(handle)
        ideal = shortened(model, logs[setting].tokens)
        calls[f"ideal {setting}"] = lambda run=ideal: run(images)
    with torch.inference_mode():
        timings = interleave(calls, **timing)
    whole, first = timings[f"reduced {stock}"], next(iter(logs.values()))
    for setting in (stock, *policies):
        found, log = timings[f"reduced {setting}"], logs.get(setting)
        ideal_time = timings.get(f"ideal {setting}", whole)
        fields = found.to_dict()
        yield {
            "model": "ViT-B/16, random weights",
            "setting": setting,
            "threads": timing["threads"],
            "kept_share": 1.0 if log is None else log.kept_share,
            "tokens_last": first.tokens[0] if log is None else log.tokens[-1],
            "ms": round(fields.pop("us") / 1e3, 2),
            "ms_min": round(fields.pop("us_min") / 1e3, 2),
            **fields,
            "ideal_ms": round(ideal_time.median_us / 1e3, 2),
            "speedup": round(speedup(whole, found), 3),
            "of_ideal": round(speedup(ideal_time, found), 3),
            "images_per_s": round(1e6 / found.median_us, 2),
        }


def text_rows(
    model: nn.Module,
    given: Sequence[Batch],
    policies: Mapping[tuple[str, float], adaptive.Policy],
    timed: Collection[str],
    **timing: Any,
) -> Iterator[dict[str, Any]]:
    """A row for each policy; the first of them is what the others are faster than.

    Args:
        model: A text encoder.
        given: Its sentences.
        policies: By method and setting.
        timed: Methods whose time is taken.
        timing: threads, repetitions and budget_s of `interleave`.
    """
    full = embed(model, given)
    made, logs, calls = {}, {}, {}
    for key, policy in policies.items():
        own, handle = _patched(model, policy)
        made[key] = embed(own, given)
        logs[key] = _log(handle)
        if key[0] in timed:
            calls[str(key)] = lambda m=own: embed(m, given)
    timings = interleave(calls, **timing)
    whole = timings[str(next(iter(policies)))]
    for key, embeddings in made.items():
        found, log = timings.get(str(key)), logs[key]
        yield {
            "model": NAME,
            "method": key[0],
            "setting": key[1],
            "threads": timing["threads"],
            "sentences": len(full),
            "batch": BATCH,
            "kept_share": 1.0 if log is None else round(log.kept_share, 4),
            "reduce_share": 0.0 if log is None else round(log.reduce_seconds / log.seconds, 4),
            "ms": found and round(found.median_us / 1e3, 2),
            "speedup": found and round(speedup(whole, found), 3),
            **agreement(embeddings, full),
        }


def _patched(model: nn.Module, policy: adaptive.Policy) -> tuple[nn.Module, adaptive.Patched]:
    """A copy with the same weights that the policy runs, and its handle."""
    own = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    return own, adaptive.patch(own, policy)


def _log(handle: adaptive.Patched) -> Any:
    """What the policy did to the tokens; None: nothing."""
    report = handle.report()
    return report.token_pruning or report.token_merging
