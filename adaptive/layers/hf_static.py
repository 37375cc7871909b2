"""Self-speculative decoding by static steps: the loop that `generate` runs, and what it refuses."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from adaptive.layers.cuda_graph import Ending, LateEnding
from adaptive.layers.hf_compiled import is_compiled
from adaptive.layers.hf_decoding import Decoding
from adaptive.layers.hf_passes import Passes
from adaptive.layers.hf_static_step import StaticStep
from adaptive.layers.state import RECORD, PatchRecord
from adaptive.layers.static_steps import CAPTURE, Held, StaticSteps, capacity_for, weights_of
from adaptive.policy import SelfSpeculative

_NAME = "SelfSpeculative(static=True)"
_KEEP_THE_BEST = {"MinPLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"}
"""Processors that leave the largest score what and where it is."""


def speculate_static(call: Decoding, policy: SelfSpeculative, steps: StaticSteps) -> Any:
    """Decode until every row is finished, as `speculate`.

    Args:
        call: Refused where processors could change what is the best token, for criteria other than
            length and end tokens, with a streamer, and with a cache of the caller.
        policy: What to do.
        steps: What earlier calls have set up.

    Returns:
        ``[batch, tokens]``, finished rows padded, or the dict that ``return_dict_in_generate``
        asks for, without past_key_values: the static cache stays with the patch.

    Raises:
        NotImplementedError: The call asks for what a static step cannot do, named.
    """
    model, config, input_ids = call.model, call.config, call.input_ids
    record: PatchRecord = model.__dict__[RECORD]
    assert record.speculation is not None
    _refuse(call)
    cache, mask = call.cache_and_mask(_NAME)
    batch, tokens = input_ids.shape
    most = int(call.criteria.max_length or config.max_length)
    limit, ends = most - tokens, _end_tokens(call.criteria)
    longest = tokens if mask is None else int(mask.sum(-1).max())
    prompt = Passes(model, model.get_submodule(record.base), record.depth, cache, mask)
    logits = prompt.prompt(input_ids, config.prefill_chunk_size)
    _check_keys(model, cache)
    with _device(input_ids):
        # After the prompt: layers that are passed over return what they returned when last run.
        held = _held(model, policy, steps, batch, longest + limit, len(ends))
        pad = getattr(config, "_pad_token_tensor", None)
        held.step.begin(
            cache, mask, logits[:, -1:].argmax(-1), limit, ends, 0 if pad is None else int(pad)
        )
        decode(held, limit - 1, LateEnding() if input_ids.is_cuda else Ending())
    rows = held.step.rows
    _count(record, policy, held, steps)
    return call.answer(torch.cat([input_ids, rows.tokens[:, : int(rows.made.max())]], 1))


def _device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the device of ``tensor`` the current one: streams and graphs belong to that."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _check_keys(model: Any, prompt: Any) -> None:
    """Raise if the cache holds other elements than the model is said to compute with."""
    kinds = {layer.keys.dtype for layer in prompt.layers} - {model.dtype}
    if kinds:
        got = ", ".join(sorted(map(str, kinds)))
        raise NotImplementedError(
            f"adaptive: {_NAME}: keys must be {model.dtype} as the model, got {got}; use "
            "static=False"
        )


def decode(held: Held, most: int, ending: Ending) -> None:
    """Make steps until no row is alive, ``most`` at most."""
    going = held.step.rows.going
    for _ in range(most):
        ending.note(going)
        if ending.over():
            break
        held.run()


def _held(
    model: Any, policy: SelfSpeculative, steps: StaticSteps, batch: int, tokens: int, ends: int
) -> Held:
    """The step for a call, set up if no earlier call has done so.

    It is captured with rows that are not alive, so that what it does meanwhile is of no account.
    """
    assert policy.exit_layer is not None  # the policy has checked it
    assert policy.draft is not None
    needed = tokens + policy.draft + 1
    room = 1 << max(ends - 1, 0).bit_length()
    capture = CAPTURE.get(model.device.type)
    weights = weights_of(model) if capture is not None else None
    key = (batch, room, policy.exit_layer, policy.draft, model.dtype, model.device, weights)
    found = steps.find(key, needed)
    if found is None:
        steps.make_room()
        capacity = capacity_for(needed)
        # Calls outside of inference mode may follow, and could not write to what was made inside.
        with torch.inference_mode(False), torch.no_grad():
            step = StaticStep(model, batch, capacity, policy.exit_layer, policy.draft, room)
            found = Held(step, key, capture)
        steps.add(found)
    return found


def _count(record: PatchRecord, policy: SelfSpeculative, held: Held, steps: StaticSteps) -> None:
    log, rows, drafts = record.speculation, held.step.rows, held.step.drafts
    assert log is not None
    checks, row_checks, accepted = rows.counts.tolist()
    log.calls += 1
    log.tokens += int(rows.made.sum())
    log.steps += checks
    log.drafted += drafts * row_checks
    log.accepted += accepted
    log.lengths[drafts] = log.lengths.get(drafts, 0) + checks
    log.static_bytes = steps.held_bytes


def _end_tokens(criteria: Any) -> list[int]:
    found: list[int] = []
    for criterion in criteria:
        found += getattr(criterion, "eos_token_id", torch.zeros(0)).flatten().tolist()
    return sorted(set(found))


def _refuse(call: Decoding) -> None:
    """Raise if the call asks for what a step without the host cannot do."""
    problem = _why_not_model(call.model)
    others = _others(call.processors, _KEEP_THE_BEST)
    if others:
        problem = f"logits processors ({others}) run on the host"
    others = _others(call.criteria, {"EosTokenCriteria", "MaxLengthCriteria"})
    if others:
        problem = f"stopping criteria ({others}) run on the host"
    if call.streamer is not None:
        problem = "a streamer gets tokens that the host would have to wait for"
    if call.keeps_cache:
        problem = "it has a cache of its own, past_key_values cannot be given"
    if call.config.do_sample:
        problem = "do_sample=True is not supported, greedy search is"
    if problem is not None:
        raise NotImplementedError(
            f"adaptive: {_NAME}: {problem}; use `with patched.disabled():` for that call, or "
            "static=False"
        )


def _why_not_model(model: Any) -> str | None:
    compiled = next((name for name, module in model.named_modules() if is_compiled(module)), None)
    if compiled is not None:
        return f"no module can be compiled, got a compiled {compiled!r}"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast casts weights anew in each step"
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1:
        return f"the model must be on one device, got {', '.join(sorted(devices))}"
    return None


def _others(given: Sequence[Any], known: set[str]) -> str:
    names = {type(each).__name__ for each in given}
    return ", ".join(sorted(names - known))
