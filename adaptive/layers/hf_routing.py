"""Runs a layer, its attention or its MLP for the sequences or tokens that need it, and no others.

Each routed module of a patched model gets a `RoutedForward`. It decides, gathers what runs of every
argument that has rows or tokens, lets the module's own forward run on that, and puts the output
back: into zeros for attention and MLPs, which are added to the states, and into the states for a
layer. What a model does around its modules stays its own code.
"""

import functools
import inspect
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.layers.depth import KeysKept
from adaptive.layers.hf_kept_cache import KeptCacheLayer
from adaptive.layers.hf_routes import Chosen, Routes, as_mask, rows_of, tokens_of
from adaptive.layers.hf_row_cache import RowCacheLayer
from adaptive.layers.hf_token_cache import Coming, TokenCacheLayer
from adaptive.layers.routed_tokens import combine_tokens, gather_tokens

Arguments = dict[str, Any]


class RoutedForward:
    """The forward of one module, set on the instance; as `LinearForward`, no strong reference.

    Attributes:
        index: Number of the layer.
        norm: Path of the layer's input norm below it, if the module is a layer that has one.
        routes: Shared by the modules of the model.
    """

    def __init__(self, module: nn.Module, index: int, norm: str, routes: Routes) -> None:
        """Know the module, the number of its layer, its norm, and what is shared."""
        self._module = weakref.ref(module)
        self.index, self.norm, self.routes = index, norm, routes

    def __getstate__(self) -> tuple[nn.Module | None, int, str, Routes]:
        """Let copies and pickles arrive with the copy of the module."""
        return self._module(), self.index, self.norm, self.routes

    def __setstate__(self, state: tuple[nn.Module, int, str, Routes]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module for what needs it."""
        module, routes = self._module(), self.routes
        assert module is not None  # it is what calls
        if routes.in_graph and routes.switch.on:
            raise NotImplementedError("adaptive: MixtureOfDepths cannot run under torch.compile")
        if not (routes.active and routes.switch.on):
            return type(module).forward(module, *args, **kwargs)
        if self.index not in routes.policy.routed:
            return self._run(module, args, kwargs)
        hidden, given = _by_name(module, args, kwargs)
        run = self._sequences if routes.policy.decide == "sequence" else self._tokens
        try:
            return run(module, hidden, given)
        except BaseException:
            layer = routes.cache_layer(self.index)
            if isinstance(layer, RowCacheLayer | TokenCacheLayer):
                layer.undo()  # half of a pass is in it
            raise

    def _run(self, module: nn.Module, args: tuple[Any, ...], given: Arguments) -> Any:
        """Run the module itself, and note in which form it returns its output."""
        out = type(module).forward(module, *args, **given)
        self.routes.forms[type(module)] = len(out) if isinstance(out, tuple) else 0
        return out

    def _read(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """What the router reads."""
        is_layer = self.routes.policy.unit == "block"
        return module.get_submodule(self.norm)(hidden) if is_layer and self.norm else hidden

    def _nothing(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """What becomes of states for which the module does not run, in memory of its own."""
        forms = self.routes.forms
        if type(module) not in forms:  # an MLP: attention and layers have run in the first layer
            self._run(module, (hidden[:1, :1],), {})
        return hidden.clone() if self.routes.policy.unit == "block" else torch.zeros_like(hidden)

    def _as_returned(self, module: nn.Module, hidden: Tensor) -> Any:
        """``hidden`` in the form in which the module returns its output."""
        parts = self.routes.forms[type(module)]
        return (hidden, *([None] * (parts - 1))) if parts else hidden

    def _sequences(self, module: nn.Module, hidden: Tensor, given: Arguments) -> Any:
        routes, (batch, tokens) = self.routes, hidden.shape[:2]
        layer: RowCacheLayer | None = routes.cache_layer(self.index)
        runs = None if layer is None else layer.runs
        if runs is None:
            runs = routes.decide_rows(self.index, self._read(module, hidden))
            if layer is not None:
                layer.decide(runs)
        ran = routes.count_rows(self.index, runs, tokens)
        if ran == batch:
            out = self._run(module, (hidden,), given)
        else:
            full = self._nothing(module, hidden)
            if ran:
                rows = runs.nonzero()[:, 0].to(hidden.device)
                given = rows_of(given, rows, batch)
                made = _first(self._run(module, (hidden.index_select(0, rows),), given))
                full = full.index_copy(0, rows, made.to(full.dtype))  # autocast has another one
            out = self._as_returned(module, full)
        if layer is not None:
            layer.advance(tokens)
        return out

    def _tokens(self, module: nn.Module, hidden: Tensor, given: Arguments) -> Any:
        routes, tokens = self.routes, hidden.shape[1]
        chosen = routes.decide_tokens(self.index, self._read(module, hidden))
        layer = routes.cache_layer(self.index) if routes.policy.unit != "mlp" else None
        kept = layer if isinstance(layer, KeptCacheLayer) else None
        mine = layer if isinstance(layer, TokenCacheLayer) else None
        whole = chosen.every and (mine is None or mine.complete) and not self._compacts()
        if whole:
            out = self._whole(module, hidden, given, chosen, mine)
        else:
            if kept is not None:
                self._keep_keys(module, hidden, given)
            full = self._nothing(module, hidden)
            if chosen.most:
                full = self._some(module, hidden, given, chosen, full)
            out = self._as_returned(module, full)
        if mine is not None:
            mine.advance(tokens, chosen.every)
        elif kept is not None:
            kept.advance(tokens)
        return out

    def _compacts(self) -> bool:
        return self.routes.policy.positions == "compact"

    def _whole(
        self,
        module: nn.Module,
        hidden: Tensor,
        given: Arguments,
        chosen: Chosen,
        layer: TokenCacheLayer | None,
    ) -> Any:
        """All tokens run: the module's own pass, and the weights."""
        if layer is not None:
            layer.expect(self._coming(chosen)._replace(whole=True))
        out = self._weighted_run(module, hidden, given, chosen.logits)
        if self.routes.policy.weighted is not True:
            return out
        made = _first(out)
        weights = chosen.logits[..., None].to(made.dtype)
        if self.routes.policy.unit == "block":
            made = hidden + weights * (made - hidden)
        else:
            made = weights * made
        return self._as_returned(module, made)

    def _weighted_run(
        self, module: nn.Module, hidden: Tensor, given: Arguments, logits: Tensor
    ) -> Any:
        """Run the module on ``hidden``, whose tokens have these logits."""
        routes = self.routes
        routes.mlp_weights = logits.sigmoid() if routes.policy.weighted == "mlp" else None
        try:
            return self._run(module, (hidden,), given)
        finally:
            routes.mlp_weights = None

    def _coming(self, chosen: Chosen) -> Coming:
        """The tokens that run, for the cache."""
        rows = chosen.counts.nonzero()[:, 0]
        places = chosen.tokens[rows].clamp(min=0) + self.routes.past
        return Coming(rows, chosen.counts[rows], places, len(chosen.counts))

    def _some(
        self, module: nn.Module, hidden: Tensor, given: Arguments, chosen: Chosen, full: Tensor
    ) -> Tensor:
        """Run the module on the tokens that are chosen; return the states of all."""
        routes, shape = self.routes, (hidden.shape[0], hidden.shape[1])
        rows = chosen.counts.nonzero()[:, 0]
        tokens = chosen.tokens[rows]
        places = tokens.clamp(min=0)
        every = len(rows) == shape[0]  # then nothing of the batch is copied to pick rows
        states = gather_tokens(hidden if every else hidden.index_select(0, rows), tokens)
        logits = chosen.logits.index_select(0, rows).gather(1, places)
        if routes.policy.unit != "mlp":
            given = self._arguments(states, given, chosen, places, rows, shape)
        else:
            given = tokens_of(given, places, rows, shape)
        made = _first(self._weighted_run(module, states, given, logits))
        if routes.policy.weighted is True:
            update = made - states if routes.policy.unit == "block" else made
            if every:
                return combine_tokens(full, update, tokens, logits)
            some = combine_tokens(full.index_select(0, rows), update, tokens, logits)
            return full.index_copy(0, rows, some)
        # Put, not added: a token that runs gets the bits that it would get alone.
        row, at = (tokens >= 0).nonzero(as_tuple=True)
        return full.index_put_((rows[row], tokens[row, at]), made[row, at].to(full.dtype))

    def _arguments(
        self,
        states: Tensor,
        given: Arguments,
        chosen: Chosen,
        places: Tensor,
        rows: Tensor,
        shape: tuple[int, int],
    ) -> Arguments:
        """What attention needs to know of the tokens that run: positions, mask and cache."""
        routes = self.routes
        layer = routes.cache_layer(self.index)
        coming = self._coming(chosen)
        given = dict(given)
        given.pop("attention_mask", None)
        given = tokens_of(given, places, rows, shape)
        window = routes.windows[self.index]
        if isinstance(layer, KeptCacheLayer):
            seen: Tensor | None = self._seen_of_all(coming, layer.length(), shape[1], window)
            layer.reading = rows
        else:
            seen = (layer or TokenCacheLayer(window)).visible(coming)
            if layer is not None:
                layer.expect(coming)
        if self._compacts():
            held = torch.zeros_like(rows) if layer is None else layer.held(rows)
            positions = held[:, None] + torch.arange(chosen.most, device=held.device)
            rotary = routes.rotary()
            given["position_embeddings"] = rotary(states, positions)
            if given.get("position_ids") is not None:
                given["position_ids"] = positions
        if seen is None and routes.eager and chosen.most > 1:
            seen = torch.ones(chosen.most, chosen.most, dtype=torch.bool, device=states.device)
            seen = seen.tril().expand(len(rows), -1, -1)
        mask = None if seen is None else as_mask(seen, routes.eager, states.dtype)
        return {**given, "attention_mask": mask}

    def _seen_of_all(self, coming: Coming, keys: int, tokens: int, window: int | None) -> Tensor:
        """Which of the last ``keys`` tokens those that run may see, ``[rows, most, keys]``."""
        end = self.routes.past + tokens
        places = torch.arange(end - keys, end, device=coming.positions.device)
        seen = places <= coming.positions[..., None]
        if window is not None:
            seen = seen & (places > coming.positions[..., None] - window)
        known = self.routes.known
        if known is not None:
            seen = seen & known[coming.rows, -keys:].bool()[:, None]
        return seen

    def _keep_keys(self, module: nn.Module, hidden: Tensor, given: Arguments) -> None:
        """Add keys and values of all tokens to the cache, and compute nothing after them."""
        self.routes.keys_only = True
        try:
            with suppress(KeysKept):
                type(module).forward(module, hidden, **given)
        finally:
            self.routes.keys_only = False


class WeightedForward(RoutedForward):
    """The forward of the MLP of a routed layer whose output is weighted."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the MLP, and multiply its output by the weights of the tokens."""
        module = self._module()
        assert module is not None  # it is what calls
        out = type(module).forward(module, *args, **kwargs)
        weights = self.routes.mlp_weights
        if weights is None:
            return out
        made = _first(out) * weights[..., None].to(_first(out).dtype)
        return (made, *out[1:]) if isinstance(out, tuple) else made


def _first(out: Any) -> Tensor:
    made: Tensor = out[0] if isinstance(out, tuple) else out
    return made


@functools.cache
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments of a class's forward."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _by_name(
    module: nn.Module, args: tuple[Any, ...], kwargs: Arguments
) -> tuple[Tensor, Arguments]:
    """Return the hidden states, which come first, and all other arguments by name."""
    names = _names(type(module).forward)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    hidden: Tensor = given.pop(names[0])
    return hidden, given
