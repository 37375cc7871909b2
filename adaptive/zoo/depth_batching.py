"""Continuous depth-wise batching: rows at different recursions of their tokens share one pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from adaptive.zoo.depth_run import Slots
from adaptive.zoo.model import Prompts
from adaptive.zoo.recursive import RecursiveTransformer
from adaptive.zoo.run import choose

SCHEDULES = ("depth", "token")


@torch.no_grad()
def generate_many(  # noqa: PLR0913
    model: RecursiveTransformer,
    ids: Prompts,
    max_new_tokens: int | Sequence[int],
    *,
    batch_size: int,
    schedule: str = "depth",
    do_sample: bool = False,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    eos_token_id: int | None = None,
    kv_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Continue any number of prompts, ``batch_size`` at a time; finished ones make room for others.

    What a prompt gives depends neither on the others nor on the schedule; it is what ``generate``
    gives. `RecursiveTransformer.report` says afterwards how full the passes were.

    Args:
        model: Whose block is shared by all recursions.
        ids: ``[prompts, tokens]``, or one sequence of ids per prompt, of any lengths.
        max_new_tokens: For each prompt: one number, or one for each.
        batch_size: Slots: prompts that are under way at once.
        schedule: ``"depth"``: a row whose token leaves the block takes its next token in at once,
            beside rows that are in the middle of theirs (Bae et al. 2024, arXiv:2410.20672).
            ``"token"``: all rows finish a token before any begins
            the next; rows that leave the block early wait.
        do_sample: Draw from the softmax; otherwise the best token is taken.
        temperature: Divides the logits that are drawn from.
        generator: Of the draws; one number per prompt and token, as ``generate`` takes them.
        eos_token_id: The token that ends a row.
        kv_dtype: In which keys and values are held; None: the model's.

    Returns:
        The new tokens of each prompt, int64, the one that ended it included.

    Raises:
        ValueError: No prompt, an empty one, or an option is out of range.
        TypeError: The model is none that recurs, the ids are not whole numbers, or the model's
            dtype has no kernels.
        IndexError: An id is not in the vocabulary.
    """
    if not isinstance(model, RecursiveTransformer):
        raise TypeError(
            "adaptive::zoo: model must be a RecursiveTransformer for generate_many, "
            f"got {type(model).__name__}"
        )
    prompts = model._prompts(ids)
    limits = _limits(max_new_tokens, len(prompts))
    kv_dtype = kv_dtype or model.dtype
    for limit in set(limits):
        model._check_options(limit, temperature, eos_token_id, kv_dtype)
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(
            f"adaptive::zoo: batch_size must be a whole number from 1 on, got {batch_size!r}"
        )
    if schedule not in SCHEDULES:
        raise ValueError(f"adaptive::zoo: schedule must be one of {SCHEDULES}, got {schedule!r}")
    draws = None
    if do_sample:
        shape = len(prompts), max(limits)
        rows = [
            torch.rand(shape[0], generator=generator, device=model.device) for _ in range(shape[1])
        ]
        draws = torch.stack(rows, 1)
    capacity = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    slots = Slots(model, min(batch_size, len(prompts)), capacity, kv_dtype)
    queue = _Queue(slots, prompts, limits, eos_token_id, temperature, draws)
    while queue.fill():
        entered = queue.enter()
        left = slots.advance()
        while schedule == "token" and bool(slots.running.any()):
            slots.advance()
        if schedule == "token":
            left = entered
        else:  # a token may pass the block by
            left = torch.cat([left, entered[slots.turn[entered] == 0]])
        if len(left):
            logits = slots.leave(left)
            queue.peak_bytes = max(queue.peak_bytes, slots.used_bytes)
            queue.take(left, logits)
    new = [torch.tensor(row, device=model.device) for row in queue.made]
    model._last = {
        "rows": len(prompts),
        "new_tokens": sum(len(row) for row in new),
        "kv_entries": queue.longest,
        "kv_bytes": queue.peak_bytes,
        **slots.figures(),
    }
    return new


def _limits(most: int | Sequence[int], count: int) -> list[int]:
    if isinstance(most, Sequence):
        if len(most) != count:
            raise ValueError(
                f"adaptive::zoo: max_new_tokens must have one number for each of {count} prompts, "
                f"got {len(most)}"
            )
        return list(most)
    return [most] * count


class _Queue:
    """Prompts that wait, whose slot is whose, and the tokens that are ready to enter.

    Attributes:
        made: New tokens of each prompt.
        longest: The most tokens that a slot held.
        peak_bytes: The most that keys and values of all slots had.
    """

    def __init__(
        self,
        slots: Slots,
        prompts: list[Tensor],
        limits: list[int],
        eos: int | None,
        temperature: float,
        draws: Tensor | None,
    ) -> None:
        """Let all wait."""
        self.slots, self.prompts, self.limits, self.eos = slots, prompts, limits, eos
        self.temperature, self.draws = temperature, draws
        self.waiting = deque(range(len(prompts)))
        self.owners: list[int | None] = [None] * slots.count
        self.made: list[list[int]] = [[] for _ in prompts]
        self.ready: list[tuple[int, int]] = []
        self.longest = self.peak_bytes = 0

    def fill(self) -> bool:
        """Run waiting prompts into free slots; return whether there is anything left to do."""
        while self.waiting and None in self.owners:
            free = [slot for slot, owner in enumerate(self.owners) if owner is None]
            free = free[: len(self.waiting)]
            taken = [self.waiting.popleft() for _ in free]
            for slot, prompt in zip(free, taken, strict=True):
                self.owners[slot] = prompt
            rows = torch.tensor(free, device=self.slots.hidden.device)
            logits = self.slots.fill(rows, [self.prompts[prompt] for prompt in taken])
            self.peak_bytes = max(self.peak_bytes, self.slots.used_bytes)
            self.take(rows, logits)
        return any(owner is not None for owner in self.owners)

    def enter(self) -> Tensor:
        """Let the tokens that are ready enter; return their slots."""
        device = self.slots.hidden.device
        rows = torch.tensor([slot for slot, _ in self.ready], dtype=torch.int64, device=device)
        if self.ready:
            tokens = torch.tensor([token for _, token in self.ready], device=device)
            self.slots.enter(rows, tokens)
        self.ready = []
        return rows

    def take(self, rows: Tensor, logits: Tensor) -> None:
        """Choose the next token of each of these slots; free those that are finished."""
        slots = rows.tolist()
        owners = [owner for slot in slots if (owner := self.owners[slot]) is not None]
        draws = None
        if self.draws is not None:
            steps = [len(self.made[owner]) for owner in owners]
            draws = self.draws[owners, steps]
        temperature = None if draws is None else self.temperature
        gone = []
        self.longest = max(self.longest, int(self.slots.places[rows].max()))
        chosen = choose(logits, temperature, draws).tolist()
        for slot, owner, token in zip(slots, owners, chosen, strict=True):
            made = self.made[owner]
            made.append(token)
            if token == self.eos or len(made) == self.limits[owner]:
                self.owners[slot] = None
                gone.append(slot)
            else:
                self.ready.append((slot, token))
        if gone:
            self.slots.free(torch.tensor(gone, device=rows.device))
