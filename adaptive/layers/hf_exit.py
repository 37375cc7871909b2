"""Decoding with early exits: the loop that `generate` runs; see `EarlyExit` for the method."""

from typing import Any

from adaptive.layers.hf_decoding import Decoding
from adaptive.layers.hf_exit_passes import ExitPasses
from adaptive.layers.hf_exit_steps import AloneSteps, ExitSteps, TogetherSteps
from adaptive.layers.hf_inputs import refuse_moving_angles
from adaptive.layers.hf_row_passes import RowPasses
from adaptive.layers.state import RECORD, PatchRecord
from adaptive.policy import EarlyExit
from adaptive.policy.early_exit import ALONE


def exit_early(call: Decoding, policy: EarlyExit) -> Any:
    """Decode until every row is finished.

    Processors see the logits that a token is chosen from, criteria the model's own.

    Returns:
        ``[batch, tokens]``, finished rows padded, or the dict that ``return_dict_in_generate``
        asks for, with sequences and past_key_values.
    """
    record: PatchRecord = call.model.__dict__[RECORD]
    assert record.exits is not None
    cache, mask = call.cache_and_mask("EarlyExit")
    most = call.config.max_length
    refuse_moving_angles("EarlyExit", call.model.config, call.input_ids, mask, most)
    base = call.model.get_submodule(record.base)
    given = call.model, base, record.depth, cache, mask, policy.layers, record.exits
    rows = call.rows()
    steps: ExitSteps
    if policy.rows == ALONE and rows.batch > 1:
        steps = AloneSteps(policy, record, RowPasses(*given), rows, record.exits)
    else:
        steps = TogetherSteps(policy, record, ExitPasses(*given), rows, record.exits)
    steps.run(call.config.prefill_chunk_size, call.keeps_cache or call.as_dict)
    return call.answer(rows.sequences(), cache)
