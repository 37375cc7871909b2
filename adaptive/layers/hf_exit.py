"""Decoding with early exits: the loop that `generate` runs; see `EarlyExit` for the method."""

from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from adaptive.layers.hf_exit_passes import ExitPasses
from adaptive.layers.hf_exit_steps import AloneSteps, ExitSteps, TogetherSteps
from adaptive.layers.hf_inputs import cache_and_mask, refuse_moving_angles
from adaptive.layers.hf_row_passes import RowPasses
from adaptive.layers.hf_rows import Rows
from adaptive.layers.state import RECORD, PatchRecord
from adaptive.policy import EarlyExit
from adaptive.policy.early_exit import ALONE


@torch.no_grad()
def exit_early(  # noqa: PLR0913 - the signature that transformers calls
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    *,
    policy: EarlyExit,
    keeps_cache: bool,
    **model_kwargs: Any,
) -> Any:
    """Decode until every row is finished.

    Args:
        model: A patched model.
        input_ids: The prompt, ``[batch, tokens]``, padded on the left.
        logits_processor: Applied to the logits that a token is chosen from; criteria see the
            model's own.
        stopping_criteria: Asked after every token.
        generation_config: As `generate` prepared it.
        synced_gpus: Refused if True: ranks would make different numbers of passes.
        streamer: Gets each token; `generate` has given it the prompt.
        policy: What to do.
        keeps_cache: Whether the caller holds the cache, so that it must be whole afterwards.
        model_kwargs: As `generate` prepared them; what has no meaning here is refused.

    Returns:
        ``[batch, tokens]``, finished rows padded, or the dict that ``return_dict_in_generate``
        asks for, with sequences and past_key_values.
    """
    record: PatchRecord = model.__dict__[RECORD]
    assert record.exits is not None
    cache, mask = cache_and_mask("EarlyExit", input_ids, model_kwargs, synced_gpus)
    most = generation_config.max_length
    refuse_moving_angles("EarlyExit", model.config, input_ids, mask, most)
    base = model.get_submodule(record.base)
    given = model, base, record.depth, cache, mask, policy.layers, record.exits
    rows = Rows(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    steps: ExitSteps
    if policy.rows == ALONE and rows.batch > 1:
        steps = AloneSteps(policy, record, RowPasses(*given), rows, record.exits)
    else:
        steps = TogetherSteps(policy, record, ExitPasses(*given), rows, record.exits)
    as_dict = bool(generation_config.return_dict_in_generate)
    steps.run(generation_config.prefill_chunk_size, keeps_cache or as_dict)
    made: Any = rows.sequences()
    return GenerateDecoderOnlyOutput(sequences=made, past_key_values=cache) if as_dict else made
