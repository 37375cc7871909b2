"""Merges the tokens of an encoder between its layers, which are run as they are.

Every layer of a patched encoder gets a `MergingLayerForward`. While its own forward runs, the
attention function leaves the keys here and takes the logarithm of the tokens' sizes from here.
"""

import weakref
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.layers.hf_call import Call
from adaptive.layers.switch import Switch
from adaptive.ops import merge_tokens, unmerge_tokens
from adaptive.policy import TokenMerging

_FEATURES = 8
"""The op takes multiples of it; zeros behind a metric change no cosine."""


@dataclass
class TokenMerges:
    """What became of the tokens in the pass now running; shared by the layers of the model.

    Attributes:
        policy: How many merge where.
        layers: Of the model.
        protect: Tokens at the start of a sequence that never merge.
        switch: Of the patch: off inside `Patched.disabled()`.
        active: Whether a pass is running in which tokens merge.
        in_graph: Whether torch.compile is at work on it.
        lengths: Real tokens of each row before the next merge, ``[batch]``; None: all.
        sizes: Original tokens that each token stands for, ``[batch, tokens]``; None: one each.
        groups: Which token each original one is part of, ``[batch, all tokens]``; None: itself.
        bias: Added to the scores of each key, ``[batch, 1, 1, tokens]``; None: nothing.
        tokens: Real tokens that went through each layer so far.
        merge_seconds: Time spent on merging.
    """

    policy: TokenMerging
    layers: int
    protect: int
    switch: Switch
    active: bool = False
    in_graph: bool = False
    lengths: Tensor | None = None
    sizes: Tensor | None = None
    groups: Tensor | None = None
    bias: Tensor | None = None
    tokens: list[int] = field(default_factory=list)
    merge_seconds: float = 0.0
    _real: list[int] | None = None  # of each row; None: all
    _metric: Tensor | None = None
    _wanted: bool = False

    def begin(self, lengths: Tensor | None) -> None:
        """Let tokens merge in the pass that begins now."""
        self.end()
        self.active, self.in_graph, self.lengths = True, False, lengths
        self._real = None if lengths is None else lengths.tolist()

    def end(self) -> tuple[list[int], float]:
        """Forget the pass; return the real tokens of each of its layers and the time to merge."""
        done = self.tokens, self.merge_seconds
        self.active, self._wanted, self.tokens, self.merge_seconds = False, False, [], 0.0
        self.lengths = self.sizes = self.groups = self.bias = self._metric = None
        self._real = None
        return done

    def before(self, index: int, states: Tensor) -> None:
        """Note that layer ``index`` now runs on ``states``."""
        batch, tokens, _ = states.shape
        if index == 0:  # an exception may have ended the last pass
            self.tokens, self.sizes, self.groups, self.bias = [], None, None, None
        self.tokens.append(batch * tokens if self._real is None else sum(self._real))
        self._metric = None
        self._wanted = index in self.policy.merging_layers(self.layers)

    def attend(self, call: Call) -> Call:
        """Take the keys of a call; return it with the sizes of the tokens as its mask."""
        if self._wanted:
            self._metric = call.key.detach().float().mean(1)
        if self.bias is None:
            return call
        # Rounded to 16 bits the logarithm would be off by up to half a percent of a weight; kernels
        # of CUDA take no other dtype than the query's.
        bias = self.bias if call.query.is_cpu else self.bias.to(call.query)
        # Always by SDPA: some eager functions of transformers 4 multiply with what they get.
        return call._replace(mask=bias, eager=False)

    def after(self, index: int, states: Tensor) -> Tensor:
        """Return what a layer made, after its tokens merged; all tokens after the last layer."""
        start = perf_counter()
        if self._wanted:
            states = self._merge(states)
        if index == self.layers - 1 and self.groups is not None:
            states = unmerge_tokens(states, self.groups)
        self.merge_seconds += perf_counter() - start
        return states

    def _merge(self, states: Tensor) -> Tensor:
        tokens = states.shape[1]
        removed = self.policy.removed(tokens, self.protect)
        counts = None
        if self._real is not None:
            pairs = [self.policy.removed(length, self.protect) for length in self._real]
            self._real = [length - pair for length, pair in zip(self._real, pairs, strict=True)]
            counts = torch.tensor(pairs, dtype=torch.int32, device=states.device)
        if removed == 0:
            return states
        if self._metric is None:
            raise RuntimeError("adaptive: TokenMerging saw no attention in a layer")
        metric = nn.functional.pad(self._metric, (0, -self._metric.shape[2] % _FEATURES))
        if states.stride(2) != 1:  # patch embeddings may be a transposed view
            states = states.contiguous()
        native = states.device.type in merge_tokens.native
        run = merge_tokens.reference if _learns(states) or not native else merge_tokens
        merged, sizes, groups = run(
            states, metric.to(states.dtype), removed, self.sizes, self.lengths, counts, self.protect
        )
        if self.groups is None:
            self.groups = groups
        else:
            known = groups.gather(1, self.groups.clamp(min=0))
            self.groups = known.masked_fill_(self.groups < 0, -1)
        self.sizes = sizes
        self.bias = sizes.log()[:, None, None]
        if self._real is not None:
            self.lengths = torch.tensor(self._real, dtype=torch.int32, device=states.device)
            nothing = (self.lengths == 0)[:, None, None, None]
            self.bias = self.bias.masked_fill(nothing, 0.0)  # softmax of -inf alone would be NaN
        return merged


class MergingLayerForward:
    """The forward of one layer, set on the instance; as `LinearForward`, no strong reference.

    Attributes:
        index: Number of the layer.
        merges: Shared by the layers of the model.
    """

    def __init__(self, layer: nn.Module, index: int, merges: TokenMerges) -> None:
        """Know the layer, its number, and what tells how tokens merge."""
        self._layer = weakref.ref(layer)
        self.index = index
        self.merges = merges

    def __getstate__(self) -> tuple[nn.Module | None, int, TokenMerges]:
        """Let copies and pickles arrive with the copy of the layer."""
        return self._layer(), self.index, self.merges

    def __setstate__(self, state: tuple[nn.Module, int, TokenMerges]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer on the tokens that there are, and merge some of them."""
        layer, merges = self._layer(), self.merges
        assert layer is not None  # it is what calls
        forward = type(layer).forward
        if merges.in_graph and merges.switch.on:
            raise NotImplementedError("adaptive: TokenMerging cannot run under torch.compile")
        if not (merges.active and merges.switch.on):
            return forward(layer, *args, **kwargs)
        merges.before(self.index, args[0] if args else kwargs["hidden_states"])
        made = forward(layer, *args, **kwargs)
        if isinstance(made, tuple):
            return (merges.after(self.index, made[0]), *made[1:])
        return merges.after(self.index, made)


def _learns(states: Tensor) -> bool:
    return torch.is_grad_enabled() and states.requires_grad
