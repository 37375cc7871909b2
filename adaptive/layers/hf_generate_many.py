"""Answers `Patched.generate_many`: checks of the call, and its prompts one by one to the batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from adaptive.errors import PatchConflict
from adaptive.layers.hf_compiled import refuse_graphs
from adaptive.layers.hf_generate import why_not_mode
from adaptive.layers.hf_inputs import refuse_moving_angles
from adaptive.layers.hf_refill import Refill
from adaptive.layers.hf_requests import NAME, Request, prepare
from adaptive.layers.refill_log import RefillLog
from adaptive.layers.state import PatchRecord
from adaptive.policy import Policy, SelfSpeculative
from adaptive.policy.plan import PREFILL

OnResult = Callable[[int, Tensor], object]
Counts = int | Sequence[int] | None
_OP = f"adaptive::{NAME}"

_NOT_HERE = {
    "attention_mask": "prompts have no padding",
    "encoder_outputs": "there is no encoder",
    "input_ids": "prompts are",
    "inputs": "prompts are",
    "inputs_embeds": "prompts are token ids",
    "logits_to_keep": "it is set step by step",
    "past_key_values": "each prompt begins with an empty cache",
    "position_ids": "positions count the tokens of each prompt",
    "return_dict_in_generate": "sequences are what comes back",
    "streamer": "on_result gets each sequence when it is finished",
    "use_cache": "rows of a cache are what makes place",
}
"""Arguments of `generate` that have no meaning for prompts that come and go."""


@torch.no_grad()
def generate_many(
    model: Any,
    record: PatchRecord,
    prompts: Sequence[Tensor | Sequence[int]],
    batch_size: int,
    max_new_tokens: Counts,
    on_result: OnResult | None,
    options: dict[str, Any],
) -> list[Tensor]:
    """See `Patched.generate_many`."""
    _check_model(model, record)
    refuse_graphs(f"{_OP}: it", model)
    ids = _checked(prompts, batch_size, model)
    new = _new_tokens(max_new_tokens, len(ids))
    if on_result is not None and not callable(on_result):
        raise TypeError(
            f"{_OP}: on_result must be callable or None, got {type(on_result).__name__}"
        )
    _check_options(model, options)
    if not ids:
        return []
    if record.switch.refill is None:
        record.switch.refill = RefillLog()
    requests = _requests(model, ids, new, options)
    log, exits, speculation = record.switch.refill, record.exits, record.speculation
    found: list[Tensor | None] = [None] * len(ids)

    def ended(request: Request) -> None:
        result = found[request.index] = request.sequence()[0]
        if on_result is not None:
            on_result(request.index, result)

    refill = Refill(model, record, requests, min(batch_size, len(ids)), ended, log)
    with nullcontext() if record.depth is None else record.depth.owned(NAME):
        log.calls += 1
        if exits is not None:
            exits.begin_call(len(ids))
        if speculation is not None:
            speculation.calls += 1
        try:
            refill.run()
        finally:
            if exits is not None:  # of prompts, not of rows that many took the place of
                exits.row_exits = [refill.exits_of.get(i, {}) for i in range(len(ids))]
    return [sequence for sequence in found if sequence is not None]


def _requests(
    model: Any, prompts: list[Tensor], new: list[int | None], options: dict[str, Any]
) -> Iterator[tuple[Request, Cache]]:
    """The prompts, each prepared when it is asked for; what cannot be is refused at once."""
    own = model.generation_config.pad_token_id
    options = {"pad_token_id": 0 if own is None else own, **options}  # there is no padding
    each = [options if tokens is None else {**options, "max_new_tokens": tokens} for tokens in new]
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]) + (new[i] or 0))
    request, _ = prepare(model, longest, prompts[longest], each[longest])
    most = len(prompts[longest]) + request.room
    # Rows are at different places in each pass, so none may be where angles depend on the others.
    refuse_moving_angles(NAME, model.config, min(prompts, key=len)[None], None, most)
    return (
        prepare(model, index, prompt, given)
        for index, (prompt, given) in enumerate(zip(prompts, each, strict=True))
    )


def _check_model(model: Any, record: PatchRecord) -> None:
    """Raise if rows of this model's cache cannot be moved."""
    if not record.enabled:
        raise PatchConflict(f"adaptive: {NAME} has no stock path: call it outside disabled()")
    if not record.base or not hasattr(model, "generate"):
        kind = type(model).__name__
        raise NotImplementedError(
            f"{_OP}: model must be a decoder of transformers that generates (...ForCausalLM), "
            f"got {kind}"
        )
    for policy in record.policies:
        why = _why_not(policy)
        if why is not None:
            raise NotImplementedError(
                f"{_OP}: {type(policy).__name__} does not go along: {why}; use generate"
            )


def _why_not(policy: Policy) -> str | None:
    """Say why rows of a batch cannot change under a policy; None if they can."""
    if isinstance(policy, SelfSpeculative) and policy.searches:
        return "candidates are scored on the latest tokens of rows that stay; give it found sets"
    if policy.routes:
        return "layers hold keys of some rows or tokens alone"
    if not set(policy.modes) <= set(PREFILL):
        return "it chooses or drops keys by their places in the cache, which rows change"
    return None


def _checked(
    prompts: Sequence[Tensor | Sequence[int]], batch_size: int, model: Any
) -> list[Tensor]:
    """The prompts as int64 tensors on the model's device."""
    if type(batch_size) is not int:
        raise TypeError(f"{_OP}: batch_size must be an int, got {type(batch_size).__name__}")
    if batch_size < 1:
        raise ValueError(f"{_OP}: batch_size must be at least 1, got {batch_size}")
    if not isinstance(prompts, list | tuple):
        raise TypeError(
            f"{_OP}: prompts must be a list of token ids [tokens], got {type(prompts).__name__}"
        )
    found = []
    # Of a module that is no Embedding, nothing is known: it says itself what it does not take.
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None)
    for index, prompt in enumerate(prompts):
        try:
            ids = prompt if isinstance(prompt, Tensor) else torch.as_tensor(prompt)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{_OP}: prompts[{index}] must be token ids [tokens]: {error}"
            ) from None
        if ids.dim() != 1 or not len(ids):
            raise ValueError(
                f"{_OP}: prompts[{index}] must be token ids [tokens], at least one, got "
                f"{list(ids.shape)}"
            )
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{_OP}: prompts[{index}] must be int32 or int64, got {ids.dtype}")
        for token in (int(ids.min()), int(ids.max())):
            if token < 0 or (vocabulary is not None and token >= vocabulary):
                last = "on" if vocabulary is None else f"to {vocabulary - 1}"
                raise IndexError(
                    f"{_OP}: prompts[{index}] must hold token ids from 0 {last}, got {token}"
                )
        found.append(ids.to(model.device, torch.int64))
    return found


def _new_tokens(counts: Counts, prompts: int) -> list[int | None]:
    """The most new tokens of each prompt; None: as the model's generation config says."""
    several = isinstance(counts, Sequence) and not isinstance(counts, str)
    each: list[Any] = list(counts) if several else [counts]  # type: ignore[arg-type]
    for count in each:
        if count is not None and type(count) is not int:
            raise TypeError(
                f"{_OP}: max_new_tokens must be a whole number, a list of them or None, got "
                f"{type(count).__name__}"
            )
        if count is not None and count < 1:
            raise ValueError(f"{_OP}: max_new_tokens must be whole numbers from 1 on, got {count}")
    if not several:
        return each * prompts
    if len(each) != prompts:
        raise ValueError(
            f"{_OP}: max_new_tokens must be one number or one each for {prompts}, got {len(each)}"
        )
    return each


def _check_options(model: Any, options: dict[str, Any]) -> None:
    """Raise if options ask for what has no meaning here, or for another way of decoding."""
    config = options.get("generation_config") or model.generation_config
    if not isinstance(config, GenerationConfig):
        raise TypeError(
            f"{_OP}: generation_config must be a GenerationConfig, got {type(config).__name__}"
        )
    for name in ("logits_processor", "stopping_criteria"):
        called = options.get(name)
        if called is not None and not (isinstance(called, list) and all(map(callable, called))):
            raise TypeError(f"{_OP}: {name} must be a list of callables, got {called!r}")
    for name, why in _NOT_HERE.items():
        if options.get(name) is not None:
            raise NotImplementedError(f"{_OP}: {name} is not supported: {why}")
    sequences = options.get("num_return_sequences", config.num_return_sequences)
    if sequences not in (None, 1):
        raise NotImplementedError(
            f"{_OP}: num_return_sequences={sequences} is not supported: give a prompt several times"
        )
    problem = why_not_mode(model, options)
    if problem is not None:
        raise NotImplementedError(f"{_OP}: {problem}")
