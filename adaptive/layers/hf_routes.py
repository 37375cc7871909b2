"""What routed layers share in one pass: decisions, and the arguments of some rows or tokens."""

import math
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptive.layers.autocast import in_own_dtype
from adaptive.layers.hf_mask import LazyMask
from adaptive.layers.pooling import pool_weights, pooled
from adaptive.layers.switch import Switch
from adaptive.ops import route_tokens
from adaptive.policy import MixtureOfDepths

_STATES = 3
"""Axes from which on a floating tensor whose first is the batch has a row per sequence."""
_NUMBERS = 2
"""The same for whole numbers and truth values: positions and masks, ``[batch, tokens]``."""


@dataclass
class Chosen:
    """Tokens that run.

    Attributes:
        tokens: Their places in the call, ``[batch, most]``, int64; -1 behind them.
        counts: How many they are in each row, ``[batch]``, int64.
        most: The largest of these.
        every: Whether they are all tokens of the call, padding too.
        logits: Of the router for all tokens, ``[batch, tokens]``, float32.
    """

    tokens: Tensor
    counts: Tensor
    most: int
    every: bool
    logits: Tensor


@dataclass
class Routes:
    """State of the pass now running; it holds neither modules nor the record of the patch.

    Attributes:
        policy: What is routed, and by what.
        switch: Of the patch: off inside `Patched.disabled()`.
        windows: Window of each layer; None: it sees all tokens.
        eager: Whether masks are added to scores, in the dtype of the model.
        active: Whether a pass is running.
        in_graph: Whether torch.compile is at work on it. The layers say so: what is raised before
            them while a graph is made may be swallowed, and the code then runs without one.
        keys_only: Whether attention only adds keys and values to the cache.
        past: Tokens of the cache before the pass.
        known: Which tokens of cache and pass are not padding, ``[batch, past + tokens]``; None:
            all.
        cache: The cache of the pass; None: none.
        rotary: What makes position embeddings; None where positions are original.
        forms: How long the tuples are that modules of a class return; 0: they return a tensor.
        counted: For each routed layer, what was offered and what ran.
        mlp_weights: What the MLP now running multiplies its output by; None: nothing.
    """

    policy: MixtureOfDepths
    switch: Switch
    windows: tuple[int | None, ...]
    eager: bool
    active: bool = False
    in_graph: bool = False
    keys_only: bool = False
    past: int = 0
    known: Tensor | None = None
    cache: Any = None
    rotary: Any = None
    forms: dict[type, int] = field(default_factory=dict)
    counted: dict[int, tuple[int, int]] = field(default_factory=dict)
    mlp_weights: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out a pass that an exception ended: what it points at is not the copy's."""
        ended: dict[str, Any] = {"active": False, "keys_only": False, "known": None, "counted": {}}
        return {**self.__dict__, **ended, "cache": None, "rotary": None, "mlp_weights": None}

    def begin(self, cache: Any, past: int, known: Tensor | None, rotary: Any) -> None:
        """Route the pass that begins now."""
        self.end()
        self.active, self.in_graph, self.past, self.known = True, False, past, known
        self.cache = None if cache is None else weakref.ref(cache)
        self.rotary = None if rotary is None else weakref.ref(rotary)

    def end(self) -> dict[int, tuple[int, int]]:
        """Route nothing any more, forget the pass, and return what was counted."""
        counted, self.counted = self.counted, {}
        self.active, self.keys_only, self.known = False, False, None
        self.cache = self.rotary = self.mlp_weights = None
        return counted

    def cache_layer(self, index: int) -> Any:
        """The cache of a layer; None where the pass has no cache."""
        cache = None if self.cache is None else self.cache()
        return None if cache is None else cache.layers[index]

    def valid(self, tokens: int) -> Tensor | None:
        """Which of the ``tokens`` of the pass are not padding, ``[batch, tokens]``; None: all."""
        return None if self.known is None else self.known[:, -tokens:]

    def logits(self, index: int, states: Tensor) -> Tensor:
        """Logits of a layer's router, float32, of the last axis of ``states``.

        Raises:
            NotImplementedError: torch.jit.trace is at work, which would keep what is decided.
            ValueError: One is NaN; the layer is named.
        """
        assert self.policy.router is not None
        if torch._C._is_tracing():
            raise NotImplementedError(
                "adaptive: MixtureOfDepths cannot run under torch.jit.trace: which tokens run "
                "depends on the tokens"
            )
        weight, bias = self.policy.router.of(index, states.device)
        with in_own_dtype(states.device):
            logits = states.float() @ weight + bias
        return self._numbers(index, logits)

    def _guesses(self, index: int, states: Tensor) -> Tensor:
        """As `logits`, of the router's predictor."""
        router = self.policy.router
        assert router is not None
        assert router.predictor is not None  # the policy checks
        with in_own_dtype(states.device):
            logits = router.predictor.logits(router.layers.index(index), states)
        return self._numbers(index, logits)

    @staticmethod
    def _numbers(index: int, logits: Tensor) -> Tensor:
        if bool(logits.isnan().any()):
            raise ValueError(
                f"adaptive: MixtureOfDepths: scores of layer {index} must be numbers, got NaN"
            )
        return logits

    def decide_rows(self, index: int, states: Tensor) -> Tensor:
        """Which sequences run layer ``index``, ``[batch]``, bool, on the CPU.

        Args:
            index: The layer.
            states: What its router reads, ``[batch, tokens, width]``.
        """
        policy, (batch, tokens) = self.policy, states.shape[:2]
        if policy.router is None:
            return torch.zeros(batch, dtype=torch.bool)
        weights = pool_weights(states, self.valid(tokens), "mean")
        runs = self.logits(index, pooled(states, weights)).sigmoid() >= policy.least
        return (runs & (weights.sum(1) > 0)).cpu()

    def decide_tokens(self, index: int, states: Tensor) -> Chosen:
        """Which tokens run layer ``index``; arguments as `decide_rows`."""
        policy, (batch, tokens) = self.policy, states.shape[:2]
        logits, valid = self.logits(index, states), self.valid(tokens)
        guessed = self.past and policy.decode == "predictor"
        scores = (self._guesses(index, states) if guessed else logits).detach().sigmoid()
        least = policy.least if not self.past else policy.least_later
        prompt = policy.capacity is not None and not self.past
        if tokens == 1 and not prompt:  # decoding: there are no places to find
            runs = scores >= least
            runs = runs if valid is None else runs & valid
            chosen, counts = runs.long() - 1, runs[:, 0].long()
        else:
            chosen, counts, _ = route_tokens(
                scores,
                threshold=None if prompt else least,
                capacity=float(policy.capacity or 0) if prompt else None,
                valid=valid,
            )
        offered = batch * tokens if valid is None else int(valid.sum())
        ran = counts.tolist()
        self.counted[index] = (offered, sum(ran))
        most = max(ran, default=0)
        every = bool(ran) and min(ran) == tokens
        return Chosen(chosen[:, :most].long(), counts.long(), most, every, logits)

    def count_rows(self, index: int, runs: Tensor, tokens: int) -> int:
        """Count a call of a layer that some sequences run, and return how many.

        Args:
            index: The layer.
            runs: Which run, ``[batch]``.
            tokens: Of the pass; sequences that are padding alone in it were not offered.
        """
        ran, valid = int(runs.sum()), self.valid(tokens)
        offered = len(runs) if valid is None else int(valid.any(1).sum())
        self.counted[index] = (offered, ran)
        return ran


def rows_of(value: Any, rows: Tensor, batch: int) -> Any:
    """Return ``value`` with the ``rows`` of each tensor in it that has ``batch`` of them."""
    if isinstance(value, Tensor):
        axes = _STATES if value.is_floating_point() else _NUMBERS
        if value.dim() < axes or value.shape[0] != batch:
            return value
        if isinstance(value, LazyMask):
            return value.of_batch(rows)
        return value.index_select(0, rows.to(value.device))
    if type(value) in (tuple, list):
        return type(value)(rows_of(item, rows, batch) for item in value)
    if type(value) is dict:
        return {key: rows_of(item, rows, batch) for key, item in value.items()}
    return value


def tokens_of(value: Any, places: Tensor, rows: Tensor, shape: tuple[int, int]) -> Any:
    """Return ``value`` with the states or positions at ``places`` of each tensor that has them.

    Args:
        value: An argument of a layer, no mask.
        places: ``[rows, chosen]``, int64, from 0.
        rows: Rows of the batch that they are of.
        shape: Batch and tokens of the call.
    """
    if isinstance(value, Tensor):
        axes = _STATES if value.is_floating_point() else _NUMBERS
        if value.dim() < axes or value.shape[1] != shape[1] or value.shape[0] not in (1, shape[0]):
            return value
        some = value.expand(shape[0], *value.shape[1:]).index_select(0, rows.to(value.device))
        index = places.to(value.device).reshape(*places.shape, *[1] * (value.dim() - 2))
        return some.gather(1, index.expand(*places.shape, *value.shape[2:]))
    if type(value) in (tuple, list):
        return type(value)(tokens_of(item, places, rows, shape) for item in value)
    if type(value) is dict:
        return {key: tokens_of(item, places, rows, shape) for key, item in value.items()}
    return value


def as_mask(seen: Tensor, eager: bool, dtype: torch.dtype) -> Tensor:
    """Return what attention takes for "may see", ``[rows, queries, keys]``, bool."""
    seen = seen[:, None]
    if not eager:
        return seen
    least = torch.finfo(dtype).min
    none = torch.zeros((), dtype=dtype, device=seen.device)
    return torch.where(seen, none, none + (least if math.isfinite(least) else -1e30))
