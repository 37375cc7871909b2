"""What a patched model remembers: the shared record, one state with counters per attention layer.

The seam between `adaptive.patch` and the code that runs attention: a *backend* is a module in this
package that exports two functions::

    def survey(root: nn.Module) -> Survey
        # One Site per attention module, in order, and all reasons to refuse. Changes nothing.
    def install(root: nn.Module, survey: Survey, record: PatchRecord) -> None
        # Makes the changes, each through record.log.set(root, name, key, value) or
        # record.log.hook(root, name, table, function): undone by name, and if a later one fails.

`adaptive.patch` asks `hf_model` for a model of transformers (its survey is also told what the
family says) and `torch_attention` for any other module. It puts a LayerState into
``module.__dict__[STATE]`` of every site before it calls ``install``; undoing, `disabled()`,
reports, deepcopy and plan rows are then common to all.

The hot path of a backend reads its state and counts what it did::

    state = module.__dict__[STATE]
    if not state.record.enabled: ...  # Patched.disabled(): the stock path, uncounted
    state.count_native(query_tokens, kv_tokens, kv_bytes, seconds)   # a native kernel ran
    state.count_stock("prefill", query_tokens)                       # stock ran; the reason

Rules: functions are module-level or `types.MethodType`, never closures or partials (a deepcopy
would run the original's weights); only these dicts hold state; no counts in `torch.compile`.
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch

from adaptive.layers.certificate import MassLog, ReadLog
from adaptive.layers.changes import ChangeLog
from adaptive.layers.encoder_exit_log import EncoderExitLog
from adaptive.layers.exit_log import ExitLog
from adaptive.layers.routing_log import RoutingLog
from adaptive.layers.speculation_log import SpeculationLog
from adaptive.layers.survey import Site
from adaptive.layers.switch import Switch
from adaptive.layers.token_reduction_log import TokenReductionLog
from adaptive.policy import Plan, Policy

RECORD = "_adaptive_record"
"""Key of the PatchRecord in the ``__dict__`` of the patched model."""

STATE = "_adaptive"
"""Key of the LayerState in the ``__dict__`` of each attention module."""

ENCODER = "encoder"
"""The kind of an attention module of a transformers model whose tokens see both ways."""


@dataclass(kw_only=True)
class PatchRecord:
    """Everything one patch() did to one model. Plain data: survives deepcopy and pickling.

    Attributes:
        policies: As given, for reports; a tuple of Policy.
        plan: Which layer and head does what.
        family: Name of the model family.
        states: The state of each attention module, in execution order.
        base: Name of the module whose forward is the whole pass.
        log: The changes, and how to undo them.
        switch: Off inside `Patched.disabled()`.
        forward_calls: Forward passes of the base module since the counters were reset.
        forward_seconds: Time in them; 0 where nothing is timed.
        timed: Whether calls are timed: not on CUDA, where that would need a synchronisation.
        forward_start: `time.perf_counter()` at the start of the pass now running.
        want_weights: The pass now running must return attention weights.
        native_start: Process-wide native call counts when the counters were reset.
        notes: Things to say in the report once: what was left alone and why -> how often.
        selection: What the last select layer of the pass now running chose; None: nothing yet.
        correct_every: Sparsely decoded tokens after which they are corrected; None: never.
        sparse: False while a pass must read every key, as a correction does.
        in_graph: Whether torch.compile is at work on the pass now running, if not on every call.
        eager_only: What of the plan needs more than a compiled graph can do; "" if nothing.
        depth: Which layers the pass now running runs; None where no policy needs that.
        speculation: What self-speculation did; None without it.
        head_copy: The LM head in 8 bits that drafts are made with; None without it.
        skip_search: What a search for skip sets knows; None without one.
        successors: The table that trees are drafted from; None without them.
        draft_sizes: How many drafts or nodes pay, learned over all calls, by rows of the batch.
        exits: What early exit did; None without it.
        encoder_exits: Which sequences go on in an encoder; None where no policy lets them leave.
        encoder_exit_log: What became of them; None likewise.
        routes: What routed layers share; None where no policy routes.
        routing_log: What became of what they were offered; None likewise.
        token_reduction, token_reduction_log: Likewise of the tokens of an encoder.
    """

    COUNTERS: ClassVar[tuple[str, ...]] = (
        "forward_calls",
        "forward_seconds",
        "timed",
        "notes",
        "speculation",
        "exits",
        "encoder_exit_log",
        "routing_log",
        "token_reduction_log",
    )

    policies: tuple[Policy, ...]
    plan: Plan
    family: str
    states: "list[LayerState]" = field(default_factory=list)
    base: str = ""
    log: ChangeLog = field(default_factory=ChangeLog)
    switch: Switch = field(default_factory=Switch)
    forward_calls: int = 0
    forward_seconds: float = 0.0
    timed: bool = True
    forward_start: float = 0.0
    want_weights: bool = False
    in_graph: bool = False
    native_start: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    selection: Any = None
    correct_every: int | None = None
    sparse: bool = True
    eager_only: str = ""
    depth: Any = None
    speculation: SpeculationLog | None = None
    head_copy: Any = None
    skip_search: Any = None
    successors: Any = None
    draft_sizes: dict[int, Any] = field(default_factory=dict)
    exits: ExitLog | None = None
    encoder_exits: Any = None
    encoder_exit_log: EncoderExitLog | None = None
    token_reduction: Any = None
    token_reduction_log: TokenReductionLog | None = None
    routes: Any = None
    routing_log: RoutingLog | None = None

    @property
    def keys_only(self) -> bool:
        """Whether attention only adds keys and values to the cache."""
        parts = (self.depth, self.routes)
        return any(part is not None and part.keys_only for part in parts)

    @property
    def enabled(self) -> bool:
        """Whether the switch is on."""
        return self.switch.on

    @enabled.setter
    def enabled(self, on: bool) -> None:
        self.switch.on = on

    def note(self, text: str) -> None:
        """Count something that the report should say."""
        if torch.compiler.is_compiling():
            return
        self.notes[text] = self.notes.get(text, 0) + 1

    def refuse_compiling(self) -> None:
        """Raise if torch.compile is at work and the plan needs more than a graph can do."""
        if self.eager_only and (self.in_graph or torch.compiler.is_compiling()):
            raise NotImplementedError(f"adaptive: {self.eager_only} cannot run under torch.compile")

    def reset(self, native_calls: dict[str, int]) -> None:
        """Set all counters to zero.

        Args:
            native_calls: What `adaptive._native.calls()` says now.
        """
        for state in self.states:
            state.reset()
        self.forward_calls = 0
        self.forward_seconds = 0.0
        self.native_start = dict(native_calls)
        self.notes = {}
        self.switch.reset()
        self.speculation = SpeculationLog() if self.speculation is not None else None
        self.exits = ExitLog(layers=self.exits.layers) if self.exits is not None else None
        if self.encoder_exit_log is not None:
            self.encoder_exit_log = EncoderExitLog(layers=self.encoder_exit_log.layers)
        if (log := self.routing_log) is not None:
            self.routing_log = RoutingLog(unit=log.unit, decide=log.decide)
        if (reduced := self.token_reduction_log) is not None:
            self.token_reduction_log = TokenReductionLog(verb=reduced.verb)


@dataclass(slots=True, kw_only=True)
class LayerState:
    """What one attention module is told to do, and what it did since the counters were reset.

    Attributes:
        record: Shared by all layers of the model.
        site: The module this belongs to.
        row: This layer's row of the plan: one mode per KV head.
        how: How a row that skips keys is run; None for one that does not.
        prefill: The policy that long calls of this layer follow; None: they are dense.
        rotation: How its keys are rotated, where local heads rebase positions; else None.
        native_calls: Calls that a native kernel answered.
        torch_calls: Calls answered with less work, but in PyTorch's operators.
        stock_calls: Calls that the stock implementation answered, by reason.
        query_tokens: Query tokens of all calls, ``batch * query_tokens`` each.
        kv_tokens: Keys read by native and torch calls: ``batch * length`` each.
        kv_bytes: Bytes of keys and values read by native and torch calls.
        seconds: Time in attention, native and stock, on CPU.
        held_bytes: Most bytes this layer's KV cache held allocated.
        used_bytes: Of those, bytes that held tokens at that time.
        cache: Name of the cache layer's class, as last seen.
        paths: How often each way of answering a native call was taken, by name.
        dense_bytes: Bytes that the native calls would have read without skipping any key.
        gathered: What calls that skip keys read; not in ``kv_tokens`` and ``kv_bytes``.
        scores: Pairs of query and key that long native calls computed, per head.
        dense_scores: Those that a fully causal call would have.
        dropped_bytes: Bytes of keys and values that heads dropped for good.
        mass: Shares of the softmax mass that the keys read had, where they were measured.
    """

    record: PatchRecord
    site: Site
    row: tuple[str, ...]
    how: Any = None
    prefill: Any = None
    rotation: Any = None
    native_calls: int = 0
    torch_calls: int = 0
    stock_calls: dict[str, int] = field(default_factory=dict)
    query_tokens: int = 0
    kv_tokens: int = 0
    kv_bytes: int = 0
    seconds: float = 0.0
    held_bytes: int = 0
    used_bytes: int = 0
    cache: str = ""
    paths: dict[str, int] = field(default_factory=dict)
    dense_bytes: int = 0
    gathered: ReadLog = field(default_factory=ReadLog)
    scores: int = 0
    dense_scores: int = 0
    dropped_bytes: int = 0
    mass: MassLog = field(default_factory=MassLog)

    def count_native(
        self, query_tokens: int, kv_tokens: int, kv_bytes: int, seconds: float
    ) -> None:
        """Count one call that a native kernel answered."""
        self.native_calls += 1
        self.query_tokens += query_tokens
        self.kv_tokens += kv_tokens
        self.kv_bytes += kv_bytes
        self.seconds += seconds

    def count_torch(self, query_tokens: int, kv_tokens: int, kv_bytes: int, seconds: float) -> None:
        """Count one call that was answered with less work, but without a native kernel."""
        self.count_native(query_tokens, kv_tokens, kv_bytes, seconds)
        self.native_calls -= 1
        self.torch_calls += 1

    def count_path(self, path: str) -> None:
        """Count one native call that was answered in the way called ``path``."""
        if torch.compiler.is_compiling():
            return
        self.paths[path] = self.paths.get(path, 0) + 1

    def count_read(self, tokens: int, read_bytes: int, dense_bytes: int) -> None:
        """Count what one call read: keys, bytes, and bytes that it would read densely."""
        if torch.compiler.is_compiling():
            return
        self.kv_tokens += tokens
        self.kv_bytes += read_bytes
        self.dense_bytes += dense_bytes

    def count_scores(self, computed: int, dense: int) -> None:
        """Count the pairs of query and key of one long call: computed, and if it were dense."""
        self.scores += computed
        self.dense_scores += dense

    def count_stock(self, reason: str, query_tokens: int, seconds: float = 0.0) -> None:
        """Count one call that the stock implementation answered, and why."""
        self.stock_calls[reason] = self.stock_calls.get(reason, 0) + 1
        self.query_tokens += query_tokens
        self.seconds += seconds

    def count_held(self, cache: str, held_bytes: int, used_bytes: int) -> None:
        """Note how much the layer's KV cache holds: the most so far, or since it dropped tokens."""
        self.cache = cache
        if held_bytes >= self.held_bytes or self.dropped_bytes:
            self.held_bytes = held_bytes
            self.used_bytes = used_bytes

    def restore(self, saved: "LayerState") -> None:
        """Set the counters to those of ``saved``."""
        for counter in COUNTERS:
            setattr(self, counter, getattr(saved, counter))

    def reset(self) -> None:
        """Set the counters to zero."""
        self.restore(LayerState(record=self.record, site=self.site, row=self.row))


_SETTINGS = ("record", "site", "row", "how", "prefill", "rotation")
COUNTERS = tuple(f.name for f in fields(LayerState) if f.name not in _SETTINGS)
"""Names of the counters of a LayerState."""
