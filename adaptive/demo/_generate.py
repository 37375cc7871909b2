"""One measured answer: what ``generate`` said, the time of each token, what the cache held."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Answer:
    """Tokens, logits, times and cache of one call of ``generate``.

    Attributes:
        tokens: Generated token ids.
        logits: Raw logits behind each token, ``[new_tokens, vocabulary]``, float32.
        prefill_s: Seconds from the call to the first token.
        step_s: Seconds of each later token.
        kv_used_bytes: Bytes of keys and values of the tokens in the cache.
        kv_held_bytes: Bytes that the cache has allocated for them.
        kv_tokens: Tokens in the cache.
    """

    tokens: list[int]
    logits: Tensor
    prefill_s: float
    step_s: list[float]
    kv_used_bytes: int
    kv_held_bytes: int
    kv_tokens: int

    @property
    def token_s(self) -> float:
        """Median seconds of a token after the first."""
        return median(self.step_s)


class Clock:
    """A streamer of ``generate`` that notes when each token arrives.

    Attributes:
        times: ``perf_counter`` at the prompt, then at every token.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token a call."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Take the end of the text."""


def answer(model: Any, prompt: Sequence[int], new_tokens: int) -> Answer:
    """Generate ``new_tokens`` tokens greedily, with the defaults of ``generate`` for the rest."""
    clock = Clock()
    output = generate(model, prompt, new_tokens, clock)
    times = clock.times
    used, held, tokens = kv_bytes(output.past_key_values)
    return Answer(
        tokens=output.sequences[0, len(prompt) :].tolist(),
        logits=torch.cat(output.logits).float(),
        prefill_s=times[1] - times[0],
        step_s=[after - before for before, after in pairwise(times[1:])],
        kv_used_bytes=used,
        kv_held_bytes=held,
        kv_tokens=tokens,
    )


def generate(model: Any, prompt: Sequence[int], new_tokens: int, streamer: Any) -> Any:
    """Call ``generate`` so that it yields exactly ``new_tokens`` tokens, their logits and cache."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
            streamer=streamer,
        )


def kv_bytes(cache: Any) -> tuple[int, int, int]:
    """Return the bytes of the tokens in ``cache``, the bytes it holds, and its tokens.

    A layer that grows by concatenation holds what it uses; one with storage of its own says so.
    """
    used = held = 0
    for layer in cache.layers:
        used += layer.keys.nbytes + layer.values.nbytes
        own = getattr(layer, "held_bytes", None)
        held += own() if own is not None else layer.keys.nbytes + layer.values.nbytes
    return used, held, int(cache.get_seq_length())


def exact_logits(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Return the logits behind ``tokens`` from one pass of ``model``, ``[tokens, vocabulary]``.

    With a model in float64 this is the truth that both variants are measured against.
    """
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    with torch.inference_mode():
        logits: Tensor = model(ids, use_cache=False, logits_to_keep=len(tokens)).logits[0]
    return logits
