"""Decoding with early exits: the loop that `generate` runs; see `EarlyExit` for the method."""

from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from adaptive.layers.exit_criterion import Judge
from adaptive.layers.exit_log import ExitLog
from adaptive.layers.hf_exit_passes import AT_ONCE, ExitPasses
from adaptive.layers.hf_inputs import cache_and_mask, refuse_moving_angles
from adaptive.layers.hf_rows import Rows
from adaptive.layers.state import RECORD, PatchRecord
from adaptive.policy import EarlyExit
from adaptive.policy.early_exit import COPY, DEFERRED


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
    passes = ExitPasses(model, base, record.depth, cache, mask, policy.layers, record.exits)
    rows = Rows(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    as_dict = bool(generation_config.return_dict_in_generate)
    decoder = _Decoder(policy, record, passes, rows, record.exits)
    decoder.run(generation_config.prefill_chunk_size, keeps_cache or as_dict)
    made: Any = rows.sequences()
    return GenerateDecoderOnlyOutput(sequences=made, past_key_values=cache) if as_dict else made


class _Decoder:
    """One call of `generate`."""

    def __init__(
        self,
        policy: EarlyExit,
        record: PatchRecord,
        passes: ExitPasses,
        rows: Rows,
        log: ExitLog,
    ) -> None:
        self.policy = policy
        self.passes = passes
        self.rows = rows
        self.log = log
        layers = range(log.layers)
        self.sources: dict[int, dict[int, int]] = {}
        if policy.kv == COPY:
            for left in policy.layers:
                later = {i: policy.source(record.plan, i, left) for i in layers[left:]}
                self.sources[left] = later

    def run(self, chunk: int | None, keeps_cache: bool) -> None:
        """Read the prompt, then step until every row is finished."""
        rows, passes, log = self.rows, self.passes, self.log
        log.calls += 1
        logits = passes.prompt(rows.prompt, chunk)
        start = perf_counter()
        try:
            log.tokens += rows.keep(rows.choose(logits, []))
            while not rows.all_finished():
                self._step()
            if keeps_cache:
                passes.catch_up()
        except BaseException:
            passes.abandon()  # Ctrl-C leaves no layer ahead of another
            raise
        finally:
            log.seconds += perf_counter() - start
        passes.finish(passes.slots)
        rows.end()

    def _step(self) -> None:
        rows, passes, log = self.rows, self.passes, self.log
        ids, judge = rows.last(), Judge(self.policy)
        log.steps += 1
        whole = passes.ends[-1]
        for ran in passes.ends:
            begin = passes.ends[passes.ends.index(ran) - 1]
            logits = passes.first(ids) if ran == passes.ends[0] else passes.onward(begin)
            if ran == whole or self._all_leave(judge, logits):
                break
        chosen = rows.choose(logits[:, None], [])
        log.exits[ran] = log.exits.get(ran, 0) + int(rows.alive.sum())
        if ran < whole:
            self._leave(ran, ids, logits)
        log.tokens += rows.keep(chosen)

    def _all_leave(self, judge: Judge, logits: Tensor) -> bool:
        """Whether each unfinished row meets the criterion."""
        leaves = judge.leaves(logits, *self.passes.moved)
        return bool((leaves | ~self.rows.alive_on(leaves.device)).all())

    def _leave(self, ran: int, ids: Tensor, logits: Tensor) -> None:
        """Give the later layers what they get of tokens that left after ``ran`` layers."""
        passes = self.passes
        audited = self._is_audited()
        if self.policy.kv == DEFERRED:
            if audited:
                self._compare(logits, passes.catch_up(head=True))
            elif passes.backlog == AT_ONCE:
                passes.catch_up()
            return
        if audited:
            self._compare(logits, passes.audit(ran))
        if self.policy.kv == COPY:
            passes.copy_keys(ran, self.sources[ran])
        else:
            passes.project_keys(ran, ids)

    def _is_audited(self) -> bool:
        """Whether the exit of this step is one of those that are audited."""
        self.log.exit_steps += 1
        return self.policy.audit is not None and self.log.exit_steps % self.policy.audit == 0

    def _compare(self, early: Tensor, whole: Tensor | None) -> None:
        assert whole is not None  # a token just left, so some layers had not seen it
        same = (early.argmax(-1) == whole.argmax(-1)).cpu()[self.rows.alive]
        self.log.audited += len(same)
        self.log.agreed += int(same.sum())
