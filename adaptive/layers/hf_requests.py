"""Prompts of `generate_many`: what `generate` makes of the options of each, and rows of them."""

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from adaptive.layers.hf_decoding import Decoding, decode_by
from adaptive.layers.hf_generate import silenced, with_stop_strings
from adaptive.layers.hf_rows import SCORES_ALONE, Rows

NAME = "generate_many"
_COUNTED = {"EosTokenCriteria", "MaxLengthCriteria"}
"""Criteria that need no more than the last token and the length."""


@dataclass
class Request:
    """One prompt: its tokens, how the next is chosen, and when it ends.

    Attributes:
        index: Of the prompt.
        ids: Tokens, the prompt's and those made.
        device: Where the model takes them.
        processors: Applied to its logits.
        criteria: Asked after each token.
        config: As `generate` prepared it.
    """

    index: int
    ids: list[int]
    device: torch.device
    processors: Any
    criteria: Any
    config: Any

    def __post_init__(self) -> None:
        kinds = {type(criterion).__name__ for criterion in self.criteria}
        self._counted = kinds <= _COUNTED
        self._most: int = min(c.max_length for c in self.criteria if hasattr(c, "max_length"))
        stops = [c.eos_token_id.tolist() for c in self.criteria if hasattr(c, "eos_token_id")]
        self._stops = {token for each in stops for token in each}

    @property
    def room(self) -> int:
        """Tokens that it may still get."""
        return self._most - len(self.ids)

    def sequence(self) -> Tensor:
        """All tokens, ``[1, tokens]``."""
        return torch.tensor([self.ids], device=self.device)

    def add(self, token: int) -> bool:
        """Append a token; return whether it was the last."""
        self.ids.append(token)
        if self._counted:
            return token in self._stops or len(self.ids) >= self._most
        return bool(torch.as_tensor(self.criteria(self.sequence(), None)).any())


def prepare(
    model: Any, index: int, prompt: Tensor, options: dict[str, Any]
) -> tuple[Request, Cache]:
    """Have `generate` of transformers prepare a call for one prompt, ``[tokens]``, and stop there.

    Returns:
        The prompt with what it was prepared for, and the cache that was made, empty.

    Raises:
        NotImplementedError: The options ask for a cache that rows cannot come to and leave.
    """
    made: list[tuple[Request, Cache]] = []

    def note(call: Decoding) -> Tensor:
        cache, _ = call.cache_and_mask(NAME)
        ids, given = call.input_ids, (call.processors, call.criteria, call.config)
        made.append((Request(index, ids[0].tolist(), ids.device, *given), cache))
        return ids

    given = {"attention_mask": torch.ones_like(prompt[None]), **with_stop_strings(model, options)}
    taken = "tokenizer" in options and "tokenizer" not in given
    with silenced(model) if taken else nullcontext():
        stop_there = functools.partial(decode_by, loop=note, keeps_cache=False)
        type(model).generate(model, prompt[None], **given, custom_generate=stop_there)
    return made[0]


class RequestRows(Rows):
    """The rows of a batch, each a request of its own.

    Attributes:
        requests: Of each row.
        kept: Tokens that they got.
    """

    refilled = True

    def __init__(self, first: Request) -> None:
        """Start with one row."""
        self._streamer = None
        self._sample = bool(first.config.do_sample)
        self._processors = first.processors
        names = {type(processor).__name__ for processor in first.processors}
        self._scores_alone = names <= SCORES_ALONE
        self.kept = 0
        self.requests: list[Request] = []
        self.seat([first])

    def seat(self, requests: list[Request]) -> None:
        """Have these requests as rows."""
        self.requests = requests
        self.batch = len(requests)
        self.alive = torch.ones(self.batch, dtype=torch.bool)

    @property
    def even(self) -> bool:
        """False: nothing sees the batch as one."""
        return False

    @property
    def device(self) -> torch.device:
        """Where tokens are."""
        return self.requests[0].device

    def held(self) -> list[int]:
        """Tokens of each row that layers have seen: all but the last."""
        return [len(request.ids) - 1 for request in self.requests]

    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(request.ids) for request in self.requests)

    def room(self) -> int:
        """The most tokens that a row may still get."""
        return max(request.room for request in self.requests)

    def ends(self) -> Tensor:
        """The last place that a token of each row may get, ``[batch, 1]``."""
        places = [[len(request.ids) + request.room - 1] for request in self.requests]
        return torch.tensor(places, device=self.device)

    def last(self) -> Tensor:
        """The last token of each row, ``[batch, 1]``."""
        tokens = [[request.ids[-1]] for request in self.requests]
        return torch.tensor(tokens, device=self.device)

    def keep(self, chosen: list[list[int]]) -> int:
        """Append tokens to the rows, until each ends; return how many were kept."""
        kept, alive = 0, self.alive.tolist()
        for row, (request, tokens) in enumerate(zip(self.requests, chosen, strict=True)):
            for token in tokens:
                if not alive[row]:
                    break
                alive[row] = not request.add(token)
                kept += 1
        self.alive = torch.tensor(alive)
        self.kept += kept
        return kept

    def _scores(self, logits: Tensor, drafted: list[Tensor]) -> Tensor:
        """As `Rows`, each row by its own processors."""
        scores = logits.to(torch.float32, copy=True)
        if self._scores_alone:
            ids = torch.zeros(self.batch, 0, dtype=torch.long, device=scores.device)
            processed: Tensor = self._processors(ids, scores)
            return processed
        rows = []
        for row, request in enumerate(self.requests):
            ids = torch.cat([request.sequence(), *(each[row : row + 1] for each in drafted)], 1)
            rows.append(request.processors(ids, scores[row : row + 1]))
        return torch.cat(rows)
