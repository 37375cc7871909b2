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

from adaptive.layers.head_copy import HeadCopy
from adaptive.layers.hf_decoding import Decoding
from adaptive.layers.hf_inputs import refuse_moving_angles
from adaptive.layers.hf_rows import Rows
from adaptive.layers.hf_search_steps import SearchSteps
from adaptive.layers.hf_sibling_steps import SiblingSteps
from adaptive.layers.hf_steps import DraftSteps, Steps
from adaptive.layers.hf_tree_passes import TreePasses
from adaptive.layers.hf_tree_steps import TreeSteps
from adaptive.layers.state import RECORD, PatchRecord
from adaptive.policy import SelfSpeculative


def speculate(call: Decoding, policy: SelfSpeculative) -> Any:
    """Decode until every row is finished.

    Processors see every row of logits, drafted or checked, and criteria every token that is kept.

    Returns:
        ``[batch, tokens]``, finished rows padded, or the dict that ``return_dict_in_generate``
        asks for, with sequences and past_key_values.
    """
    record: PatchRecord = call.model.__dict__[RECORD]
    assert record.speculation is not None
    cache, mask = call.cache_and_mask("SelfSpeculative")
    most = call.config.max_length
    refuse_moving_angles("SelfSpeculative", call.model.config, call.input_ids, mask, most)
    base = call.model.get_submodule(record.base)
    passes = TreePasses(call.model, base, record.depth, cache, mask)
    rows = call.rows()
    steps = steps_of(policy, passes, rows, record, call.keeps_cache or call.as_dict)
    steps.run(call.config.prefill_chunk_size)
    return call.answer(rows.sequences(), cache)


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
