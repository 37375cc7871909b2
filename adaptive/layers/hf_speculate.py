"""Self-speculative decoding of transformers models: draft, check, keep what was right.

The decoding loop that `generate` runs; see `SelfSpeculative` for the methods. A step has the last
token of each row, which no layer has seen yet, and

1. drafts k tokens, each by a pass of a part of the model;
2. checks them by the rest of the layers (early exit) or the whole model (skipped modules), on the
   last token and all drafts at once;
3. keeps the drafts up to the first that the model would not have made itself, and the model's own
   token after them; takes the others back from the cache.

With a tree, what is checked branches, and the path is kept that the model would have made.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from adaptive.layers.head_copy import HeadCopy
from adaptive.layers.hf_inputs import cache_and_mask, refuse_moving_angles
from adaptive.layers.hf_rows import Rows
from adaptive.layers.hf_search_steps import SearchSteps
from adaptive.layers.hf_sibling_steps import SiblingSteps
from adaptive.layers.hf_steps import DraftSteps, Steps
from adaptive.layers.hf_tree_passes import TreePasses
from adaptive.layers.hf_tree_steps import TreeSteps
from adaptive.layers.state import RECORD, PatchRecord
from adaptive.policy import SelfSpeculative


@torch.no_grad()
def speculate(  # noqa: PLR0913 - the signature that transformers calls
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    *,
    policy: SelfSpeculative,
    keeps_cache: bool,
    **model_kwargs: Any,
) -> Any:
    """Decode until every row is finished.

    Args:
        model: A patched model.
        input_ids: The prompt, ``[batch, tokens]``, padded on the left.
        logits_processor: Applied to every row of logits, drafted or checked.
        stopping_criteria: Asked after every token that is kept.
        generation_config: As `generate` prepared it.
        synced_gpus: Refused if True: ranks would make different numbers of passes.
        streamer: Gets each token that is kept; `generate` has given it the prompt.
        policy: What to do.
        keeps_cache: Whether the caller holds the cache, so that it must have no gaps.
        model_kwargs: As `generate` prepared them; what has no meaning here is refused.

    Returns:
        ``[batch, tokens]``, finished rows padded, or the dict that ``return_dict_in_generate``
        asks for, with sequences and past_key_values.
    """
    record: PatchRecord = model.__dict__[RECORD]
    assert record.speculation is not None
    cache, mask = cache_and_mask("SelfSpeculative", input_ids, model_kwargs, synced_gpus)
    most = generation_config.max_length
    refuse_moving_angles("SelfSpeculative", model.config, input_ids, mask, most)
    base = model.get_submodule(record.base)
    passes = TreePasses(model, base, record.depth, cache, mask)
    rows = Rows(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    as_dict = bool(generation_config.return_dict_in_generate)
    steps = steps_of(policy, passes, rows, record, keeps_cache or as_dict)
    steps.run(generation_config.prefill_chunk_size)
    made: Any = rows.sequences()
    return GenerateDecoderOnlyOutput(sequences=made, past_key_values=cache) if as_dict else made


def steps_of(
    policy: SelfSpeculative, passes: TreePasses, rows: Rows, record: PatchRecord, keeps_cache: bool
) -> Steps:
    """The steps of a policy's form."""
    if policy.recycles:
        assert record.speculation is not None  # the policy has made it
        return TreeSteps(passes, rows, record.successors, record.draft_sizes, record.speculation)
    if policy.searches:
        return SearchSteps(policy, passes, rows, record, keeps_cache)
    if policy.draft_head is not None and record.head_copy is None:
        record.head_copy = HeadCopy()
    form = SiblingSteps if policy.tree else DraftSteps
    return form(policy, passes, rows, record, keeps_cache)
