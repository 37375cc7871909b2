"""The handle of a patched model: report, switch off, verify, and put back."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from adaptive import _native
from adaptive.errors import PatchConflict
from adaptive.layers.report import Report, report
from adaptive.layers.state import ENCODER, RECORD, STATE, PatchRecord
from adaptive.layers.verify import Verification, verify, verify_encoder
from adaptive.policy import Plan


class Patched:
    """What `adaptive.patch` did to one model, for as long as it lasts.

    A thin view: all that is remembered lies in the model, so losing the handle loses nothing
    (`adaptive.patched(model)` makes another). As a context manager it unpatches at the end::

        with adaptive.patch(model) as patched:
            model.generate(**inputs)
            print(patched.report())

    Attributes:
        model: The model as it was given to patch().
    """

    def __init__(self, model: nn.Module, root: nn.Module, record: PatchRecord) -> None:
        """Hold the model as given, the module that was patched, and what patch() left in it."""
        self.model = model
        self._root = root
        self._record = record
        self._last: Report | None = None

    def __enter__(self) -> Patched:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unpatch()

    def __repr__(self) -> str:
        """Return the model's class, its family, and whether it is still patched."""
        state = "patched" if self.active else "unpatched"
        return f"<{state} {type(self.model).__name__}, {len(self._record.states)} layers>"

    @property
    def active(self) -> bool:
        """Whether the model is still patched by the patch() that this handle belongs to."""
        return self._root.__dict__.get(RECORD) is self._record

    @property
    def plan(self) -> Plan:
        """Which layer and head does what. Can be saved, and given to patch() again."""
        return self._record.plan

    def report(self) -> Report:
        """Say per layer what ran, and how often, since the patch or the last `reset_stats()`.

        After `unpatch()` it is the last report before it.
        """
        if self._last is not None:
            return self._last
        return report(type(self.model).__name__, self._record, _native.calls())

    def reset_stats(self) -> None:
        """Set all counters to zero."""
        self._record.reset(_native.calls())

    @contextlib.contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Run the stock path inside the block, bit for bit, uncounted. Blocks can be nested.

        It holds for this model in all threads.
        A cache that was filled by the patched model can be used inside, and the other way round.
        """
        before = self._record.enabled
        self._record.enabled = False
        try:
            yield self.model
        finally:
            self._record.enabled = before

    def verify(self, inputs: Mapping[str, Any] | Tensor, new_tokens: int = 32) -> Verification:
        """Compare the patched model with the stock path on ``inputs``.

        Stock decodes greedily; then the patched model is fed the same tokens, step by step, so that
        one early difference cannot hide or cause the next. Counters are left as they were.

        An encoder runs once each way, and outputs of tokens that are not padding are compared; if
        it has logits, ``token_agreement`` is the share of tokens (rows, of a classifier) whose
        largest logit is the same.

        Args:
            inputs: Token ids ``[batch, tokens]``, or the keyword arguments of the model's forward
                with "input_ids" and, for padded batches (on the left), "attention_mask". Hidden
                states are compared if it has no head. For a model without "input_ids": its keyword
                arguments, and outputs are compared.
            new_tokens: Tokens to decode, at least 1; an encoder decodes none.

        Raises:
            ValueError: ``new_tokens`` is below 1, token ids are not whole numbers in rows, or
                ``inputs`` holds what is set step by step, such as "position_ids".
            TypeError: ``inputs`` is no tensor or dict, or not what the model's forward takes.
            PatchConflict: The model is not patched any more.
        """
        self._require_active("verify")
        record = self._record
        before, states = copy.copy(record), [copy.copy(state) for state in record.states]
        logs = copy.copy(record.switch)
        start = _native.calls()
        self.reset_stats()
        enabled, record.enabled = record.enabled, True  # inside disabled(), too
        try:
            if any(state.site.kind == ENCODER for state in record.states):
                return verify_encoder(self.model, self.disabled, inputs)
            return verify(self.model, self.disabled, inputs, new_tokens)
        finally:
            record.enabled = enabled
            spent = _minus(_native.calls(), start)
            for counter in PatchRecord.COUNTERS:
                setattr(record, counter, getattr(before, counter))
            record.switch.restore(logs)
            record.native_start = _minus(before.native_start, spent, sign=1)
            for state, saved in zip(record.states, states, strict=True):
                state.restore(saved)

    def generate_many(
        self,
        prompts: Sequence[Tensor | Sequence[int]],
        *,
        batch_size: int = 8,
        max_new_tokens: int | Sequence[int] | None = None,
        on_result: Callable[[int, Tensor], object] | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """Generate from many prompts in one batch, whose finished rows make place for the next.

        Each prompt gets the tokens that ``model.generate`` makes of it alone, up to rounding; with
        `EarlyExit` where rows leave alone, and with `SelfSpeculative`. Drawn tokens come from the
        same distribution.

        Args:
            prompts: Token ids, ``[tokens]`` each, without padding, of any lengths.
            batch_size: The most rows at a time.
            max_new_tokens: The most new tokens, of all prompts or of each; None: as the model's
                generation config says.
            on_result: Called with a prompt's number and its sequence as soon as that is finished.
            options: Of `generate`: stop tokens, sampling, processors, criteria, ...

        Returns:
            For each prompt its tokens and the new ones, ``[tokens]``, in the order of the prompts.

        Raises:
            ValueError, TypeError, IndexError: An argument is wrong; it is named, and nothing runs.
            NotImplementedError: The model, a policy, or an option cannot be used so; it is named.
            PatchConflict: The model is not patched any more, or this is inside `disabled()`.
        """
        self._require_active("generate_many")
        if any(state.site.kind != "hf" for state in self._record.states):
            raise NotImplementedError(
                "adaptive::generate_many: model must be a decoder of transformers, got "
                f"{type(self.model).__name__}"
            )
        from adaptive.layers.hf_generate_many import generate_many

        return generate_many(
            self._root, self._record, prompts, batch_size, max_new_tokens, on_result, options
        )

    def unpatch(self) -> nn.Module:
        """Put the model back as it was before patch(), and return it.

        Verified: everything that patch() installed must still be in place before anything is
        undone, and nothing of it is left afterwards. What others changed meanwhile (weights,
        adapters, settings in the config) stays. Calling it again does nothing.

        Raises:
            PatchConflict: Someone wrapped or replaced a module that patch() touched, or added a
                copy of one; it is named. Nothing is undone then. Undo that first, and call again.
        """
        if not self.active:
            return self.model
        log = self._record.log
        conflicts = log.conflicts(self._root)
        if not conflicts:
            ours = {id(module) for module in log.modules(self._root)}
            conflicts = [
                f"{name!r} came later, and is a copy of a patched module"
                for name, module in self._root.named_modules()
                if id(module) not in ours and _is_touched(module)
            ]
        if conflicts:
            raise PatchConflict(
                "adaptive: cannot unpatch, someone changed the model since patch(): "
                + "; ".join(conflicts)
            )
        self._last = self.report()
        log.undo(self._root)
        self._record.head_copy = None  # this handle may live on
        return self.model

    def _require_active(self, verb: str) -> None:
        if not self.active:
            raise PatchConflict(f"adaptive: cannot {verb}: this model is not patched any more")


def _is_touched(module: nn.Module) -> bool:
    known = module.__dict__
    marked = STATE in known or RECORD in known
    forward = type(known.get("forward"))
    return marked or forward.__module__.startswith("adaptive.layers.")


def _minus(calls: dict[str, int], other: dict[str, int], sign: int = -1) -> dict[str, int]:
    return {name: calls.get(name, 0) + sign * other.get(name, 0) for name in {**calls, **other}}
