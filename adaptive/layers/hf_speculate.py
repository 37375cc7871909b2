"""Self-speculative decoding of transformers models: draft, check, keep what was right.

The decoding loop that `generate` runs; see `SelfSpeculative` for the methods. A step has the last
token of each row, which no layer has seen yet, and

1. drafts k tokens, each by a pass of a part of the model;
2. checks them by the rest of the layers (early exit) or the whole model (skipped modules), on the
   last token and all drafts at once;
3. keeps the drafts up to the first that the model would not have made itself, and the model's own
   token after them; takes the others back from the cache.
"""

from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from adaptive.layers.depth import Skips
from adaptive.layers.draft_length import DraftLength
from adaptive.layers.hf_inputs import cache_and_mask
from adaptive.layers.hf_passes import Passes
from adaptive.layers.hf_rows import Rows
from adaptive.layers.speculation_log import SpeculationLog
from adaptive.layers.state import RECORD, PatchRecord
from adaptive.policy import SelfSpeculative
from adaptive.policy.self_speculative import MAX_DRAFT


@torch.no_grad()
def speculate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    *,
    policy: SelfSpeculative,
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
        model_kwargs: As `generate` prepared them; what has no meaning here is refused.

    Returns:
        ``[batch, tokens]``, finished rows padded, or the dict that ``return_dict_in_generate``
        asks for, with sequences and past_key_values.
    """
    record: PatchRecord = model.__dict__[RECORD]
    assert record.speculation is not None
    cache, mask = cache_and_mask("SelfSpeculative", input_ids, model_kwargs, synced_gpus)
    passes = Passes(model, model.get_submodule(record.base), record.depth, cache, mask)
    rows = Rows(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    length = DraftLength(fixed=policy.draft, most=MAX_DRAFT)
    decoder = _Decoder(policy, passes, rows, length, record.speculation)
    decoder.run(generation_config.prefill_chunk_size)
    if not generation_config.return_dict_in_generate:
        return rows.sequences()
    made: Any = rows.sequences()
    return GenerateDecoderOnlyOutput(sequences=made, past_key_values=cache)


class _Decoder:
    """One call of `generate`."""

    def __init__(
        self,
        policy: SelfSpeculative,
        passes: Passes,
        rows: Rows,
        length: DraftLength,
        log: SpeculationLog,
    ) -> None:
        self.policy = policy
        self.passes = passes
        self.rows = rows
        self.length = length
        self.log = log
        skip = policy.skip or ((), ())
        self.skips: Skips = (frozenset(skip[0]), frozenset(skip[1]))

    def run(self, chunk: int | None) -> None:
        """Read the prompt, then step until every row is finished."""
        rows, passes = self.rows, self.passes
        self.log.calls += 1
        turned_off = self.length.turned_off
        logits = passes.prompt(rows.prompt, chunk)
        self._keep(rows.choose(logits, []))
        try:
            while not rows.all_finished():
                self._step()
        except BaseException:
            passes.abandon()  # Ctrl-C in the middle of a draft leaves no trace of it
            raise
        finally:
            self.log.turned_off += self.length.turned_off - turned_off
        passes.finish(rows.longest() - 1 if rows.batch == 1 else passes.slots)
        rows.end()

    def _step(self) -> None:
        last = self.rows.last()
        most = self.rows.room() - 1
        if not self.length.wants(0, 1.0, most):
            start = perf_counter()
            logits = self.passes.plain(last)
            chosen = self.rows.choose(logits, [])
            self.passes.accept(torch.ones(len(last), dtype=torch.long, device=last.device), 1)
            self._keep(chosen)
            seconds = perf_counter() - start
            self.length.plain.add(seconds)
            self.log.plain_steps += 1
            self.log.plain_seconds += seconds
            return
        ids, chances = self._draft(last, most)
        self._check(ids, chances)

    def _draft(self, last: Tensor, most: int) -> tuple[Tensor, list[Tensor]]:
        """Draft tokens; return ``[batch, 1 + drafts]`` and the distributions they came from.

        All but the last of those tokens have passed the layers of a draft.
        """
        rows, length = self.rows, self.length
        ids, drawn = [last], []
        reach = torch.ones(rows.batch)
        while True:
            start = perf_counter()
            logits = self._draft_pass(ids[-1])
            token, confidence, chances = rows.draft(logits, ids[1:])
            expected = [length.accepts(c) for c in confidence.tolist()]
            seconds = perf_counter() - start
            length.draft.add(seconds)
            self.log.draft_seconds += seconds
            ids.append(token)
            drawn.append((confidence, chances))
            reach = reach * torch.tensor(expected)
            average = float(reach[rows.alive].mean())
            if not length.wants(len(drawn), average, most):
                break
        if not length.keeps(len(drawn), average):
            self.log.dropped += 1
            ids.pop()
            drawn.pop()
        self.confidences = [confidence for confidence, _ in drawn]
        return torch.cat(ids, 1), [chances for _, chances in drawn]

    def _draft_pass(self, ids: Tensor) -> Tensor:
        if self.policy.exit_layer is not None:
            return self.passes.shallow(ids, self.policy.exit_layer)
        with self.passes.depth.skipping(self.skips):
            return self.passes.skipping(ids)

    def _check(self, ids: Tensor, chances: list[Tensor]) -> None:
        """Check the drafts and keep what was right."""
        rows, passes, length = self.rows, self.passes, self.length
        drafts = ids.shape[1] - 1
        start = begun = perf_counter()
        if self.policy.exit_layer is None:
            logits = passes.whole(ids)
        else:
            if passes.behind(ids.shape[1]):
                passes.close(ids[:, -1:], self.policy.exit_layer)
                begun = perf_counter()
                length.closing.add(begun - start)
            logits = passes.deep(ids, self.policy.exit_layer)
        accepted, chosen = rows.verify(logits, ids[:, 1:], chances)
        length.verify.add(drafts + 1, perf_counter() - begun)
        self.log.verify_seconds += perf_counter() - start
        if self.passes.windowed and rows.batch > 1:
            # Windows count slots, so that rows must not have gaps: all go as far as the slowest.
            accepted = accepted.clamp(max=int(accepted[rows.alive_on(accepted.device)].min()))
            chosen = [row[:n] for row, n in zip(chosen, (accepted + 1).tolist(), strict=True)]
        kept = torch.where(rows.alive_on(accepted.device), accepted + 1, 1)
        passes.accept(kept, int(kept.max()))
        self._learn(accepted, drafts)
        self._keep(chosen)

    def _learn(self, accepted: Tensor, drafts: int) -> None:
        log, alive = self.log, self.rows.alive.tolist()
        log.steps += 1
        log.lengths[drafts] = log.lengths.get(drafts, 0) + 1
        for row, right in enumerate(accepted.tolist()):
            if not alive[row]:
                continue
            log.drafted += drafts
            log.accepted += right
            for i in range(min(right + 1, drafts)):
                self.length.learn(float(self.confidences[i][row]), i < right)

    def _keep(self, chosen: list[list[int]]) -> None:
        self.log.tokens += self.rows.keep(chosen)
