"""Runs a model on prompts for calibration: what it is fed, and who watches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptive.calibrate_heads import HeadScores
from adaptive.calibrate_layers import Similarity
from adaptive.layers.survey import Survey
from adaptive.progress import ProgressBar

COPIES = 4
"""How often the tokens of a random prompt are repeated."""

LEAST_TOKENS = 32

_AXES = 2


class Run(NamedTuple):
    """One prompt, ``[1, tokens]``, and what is measured on it."""

    ids: Tensor
    similarity: Similarity | None
    heads: HeadScores | None


def repeated_tokens(root: nn.Module, tokens: int) -> tuple[Tensor, int]:
    """Return a prompt of a first token and random tokens, repeated, and their period.

    The same on every call. Special tokens are left out; no token occurs twice in a copy if there
    are enough of them.

    Args:
        root: A model of transformers.
        tokens: Most tokens of the prompt.

    Returns:
        ``[1, 1 + COPIES * period]``, int64, on the CPU, and the period.
    """
    config: Any = root.config
    limit = getattr(config, "max_position_embeddings", None) or tokens
    period = (min(tokens, limit) - 1) // COPIES
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {getattr(config, name, None) for name in names}
    size = int(root.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    plain = torch.tensor([token for token in range(size) if token not in special])
    rng = torch.Generator().manual_seed(0)
    copy = plain[torch.randperm(len(plain), generator=rng)[:period]]
    if len(plain) < period:
        copy = plain[torch.randint(len(plain), (period,), generator=rng)]
    bos = config.bos_token_id
    first = torch.tensor([bos]) if isinstance(bos, int) and bos < size else copy[-1:]
    return torch.cat([first, copy.repeat(COPIES)])[None], period


def prompts(batches: Iterable[Tensor | Mapping[str, Any]]) -> list[Tensor]:
    """Return the prompts of a user's batches, ``[1, tokens]`` each.

    Raises:
        TypeError: A batch is no tensor of token ids.
        ValueError: A prompt is too short or padded, or there is none.
    """
    found: list[Tensor] = []
    for batch in batches:
        ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != _AXES:
            kind = type(ids).__name__
            if isinstance(ids, Tensor):
                kind = f"{ids.dtype} {list(ids.shape)}"
            raise TypeError(f"adaptive: batches must hold token ids [batch, tokens], got {kind}")
        if ids.shape[1] < LEAST_TOKENS:
            raise ValueError(
                f"adaptive: batches must have {LEAST_TOKENS} tokens or more, got {ids.shape[1]}"
            )
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is not None and not bool((mask != 0).all()):
            raise ValueError("adaptive: batches must have no padding, got a mask with zeros")
        found += list(ids.split(1))
    if not found:
        raise ValueError("adaptive: batches must hold a prompt, got none")
    return found


def run(root: nn.Module, survey: Survey, runs: Sequence[Run], progress: bool) -> None:
    """Run the model on each prompt, and let the measures see every layer.

    Args:
        root: A model of transformers that can be patched, and is not.
        survey: Of it.
        runs: The prompts.
        progress: Whether to show a bar, if stderr is a terminal, once it has taken a while.
    """
    from adaptive.layers.hf_watch import watching

    device = root.get_input_embeddings().weight.device  # type: ignore[operator]
    with (
        ProgressBar("calibrating", len(runs) * len(survey.sites), progress) as bar,
        torch.no_grad(),
    ):
        watcher = _Watcher(bar)
        with watching(root, survey, watcher) as base:
            for one in runs:
                watcher.run = one
                if one.similarity is not None:
                    one.similarity.begin()
                base(input_ids=one.ids.to(device), use_cache=False)


class _Watcher:
    """Shows each call of attention to the measures of the prompt that runs."""

    run: Run

    def __init__(self, bar: ProgressBar) -> None:
        self._bar = bar

    def attention(
        self, layer: int, query: Tensor, key: Tensor, scale: float | None, softcap: float
    ) -> None:
        for measure in (self.run.similarity, self.run.heads):
            if measure is not None:
                measure.attention(layer, query[0], key[0], scale, softcap)

    def hidden(self, layer: int, before: Tensor, after: Tensor) -> None:
        if self.run.similarity is not None:
            self.run.similarity.hidden(layer, before[0], after[0])
        self._bar.step()
