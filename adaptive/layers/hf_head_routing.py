"""Query and output projections of a transformers model for the heads that each token runs."""

import inspect
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.errors import PatchConflict
from adaptive.layers.best_heads import best_heads
from adaptive.layers.expert_log import AUDITED_ROWS
from adaptive.layers.head_choice import HeadChoice, HeadPass, the_same
from adaptive.layers.head_log import HeadLog
from adaptive.layers.hf_linear import fast_linear, is_plain, is_watched
from adaptive.layers.state import ENCODER, PatchRecord
from adaptive.layers.survey import Site, Survey
from adaptive.layers.switch import Switch
from adaptive.layers.width_choice import WidthPass
from adaptive.policy.head_routing import HeadRouting

PACKED = "qkv_proj"
"""Queries, keys and values of one projection, in this order, as in Phi-3."""


class _Projection:
    """The forward of one patched projection, set on the instance.

    An object with a weak reference, for the reasons of `hf_linear.LinearForward`.
    """

    def __init__(
        self, linear: nn.Module, switch: Switch, site: Site, policy: HeadRouting, native: bool
    ) -> None:
        """Know the layer, whose weight is read anew in every call.

        Args:
            linear: The projection.
            switch: Of the patch.
            site: The attention module that it belongs to.
            policy: What decides.
            native: Whether native kernels may compute it.
        """
        self._linear = weakref.ref(linear)
        self.switch, self.site, self.policy, self.native = switch, site, policy, native

    def __getstate__(self) -> tuple[Any, ...]:
        """What a copy is made of: the copy of the layer, and what decides."""
        return self._linear(), self.switch, self.site, self.policy, self.native

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    @property
    def layer(self) -> int:
        """Its number."""
        return self.site.layer

    def columns(self, start: int, stop: int) -> slice:
        """Where the query heads of some KV heads are, in rows of a weight or columns of states."""
        width = self.site.heads // self.site.kv_heads * self.site.head_dim
        return slice(start * width, stop * width)

    @staticmethod
    def check(linear: Any, name: str) -> None:
        """Raise PatchConflict if someone hooked the projection."""
        if is_watched(linear):
            raise PatchConflict(
                f"adaptive: HeadRouting reads parts of {name!r}, which someone hooked since "
                "patch(); unpatch() first"
            )

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A product with a part of the layer."""
        made = fast_linear(x, weight, bias) if self.native else None
        return F.linear(x, weight, bias) if made is None else made


class QueryForward(_Projection):
    """Chooses the heads of each token, and computes the queries of these, and no others."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return queries, 0 where a head does not run, and what is packed with them.

        Differentiable but for the choice.

        Raises:
            NotImplementedError: torch.compile or torch.jit.trace is at work.
            PatchConflict: Someone hooked the projection.
            ValueError: A score is NaN.
        """
        linear: Any = self._linear()
        assert linear is not None  # it is what calls
        now = self.switch.head_pass
        if not self.switch.on or now is None:
            return type(linear).forward(linear, x)  # type: ignore[no-any-return]
        now.chosen.pop(self.layer, None)
        if self.switch.in_graph or torch.compiler.is_compiling() or torch._C._is_tracing():
            raise NotImplementedError(
                "adaptive: HeadRouting cannot run under torch.compile or torch.jit.trace: which "
                "heads run depends on the tokens"
            )
        queries = self.columns(0, self.site.kv_heads).stop
        packed = queries < len(linear.weight)
        self.check(linear, PACKED if packed else "q_proj")
        if x.numel() == 0:
            return type(linear).forward(linear, x)  # type: ignore[no-any-return]
        rows = x.reshape(-1, x.shape[-1])
        choice = self._choose(x, rows)
        out: Tensor | None = None
        if choice.audited is not None:  # what runs is computed below as in any call
            every = F.linear(rows[choice.audited], linear.weight, linear.bias)
            out = every.new_zeros(len(rows), every.shape[1])
            out[choice.audited] = every
        parts = [(self.columns(start, stop), some) for start, stop, some in choice.spans]
        if packed:  # keys and values of all tokens
            parts.append((slice(queries, len(linear.weight)), None))
        for at, some in parts:
            bias = None if linear.bias is None else linear.bias[at]
            made = self.multiply(rows if some is None else rows[some], linear.weight[at], bias)
            if out is None:
                out = made.new_zeros(len(rows), len(linear.weight))
            if some is None:
                out[:, at] = made
            else:
                out[some, at] = made
        if out is None:  # nothing but padding
            out = rows.new_zeros(len(rows), len(linear.weight))
        now.chosen[self.layer] = choice
        return out.view(*x.shape[:-1], -1)

    def _choose(self, x: Tensor, rows: Tensor) -> HeadChoice:
        policy, passing = self.policy, self.switch.width_pass
        real = None if passing is None else passing.real(x)
        if policy.router is None:
            choice = the_same(len(rows), policy.heads_of(self.layer))
        else:
            router = policy.router.of(self.layer, x.device)
            assert policy.top_k is not None
            choice = best_heads(rows, router, policy.top_k, policy.weighted, real, self.layer)
        many = len(rows) if real is None else int(real.sum())
        choice = choice._replace(counted=many)
        log, every = self.switch.heads, policy.audit_every
        assert log is not None  # install made it
        due = every is not None and log.layer(self.layer).calls % every == 0
        if due and many and not torch.is_grad_enabled():
            places = (
                torch.arange(len(rows), device=x.device) if real is None else real.nonzero()[:, 0]
            )
            choice = choice._replace(
                audited=places[:: -(-many // AUDITED_ROWS)].contiguous(), full=[]
            )
        return choice


class OutputForward(_Projection):
    """Projects what the chosen heads gave, and counts."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the sum over the heads that ran. Differentiable."""
        linear: Any = self._linear()
        assert linear is not None  # it is what calls
        now = self.switch.head_pass
        choice = None if now is None else now.chosen.pop(self.layer, None)
        if not self.switch.on or choice is None:
            return type(linear).forward(linear, x)  # type: ignore[no-any-return]
        self.check(linear, "o_proj")
        rows = x.reshape(-1, x.shape[-1])
        out = rows.new_zeros((len(rows), len(linear.weight)), dtype=torch.float32)
        dtype = x.dtype
        for start, stop, some in choice.spans:
            at = self.columns(start, stop)
            part = rows[:, at] if some is None else rows[some, at]
            if choice.scales is not None:
                scales = (
                    choice.scales[:, start:stop]
                    if some is None
                    else choice.scales[some, start:stop]
                )
                part = part * scales.repeat_interleave(part.shape[1] // (stop - start), 1).to(
                    part.dtype
                )
            made = self.multiply(part, linear.weight[:, at])
            dtype = made.dtype  # autocast may have another one
            if some is None:
                out += made
            else:
                out.index_add_(0, some, made.float())
        if linear.bias is not None:
            out = out + linear.bias
        result = out.to(dtype)
        self._count(linear, choice, result)
        return result.view(*x.shape[:-1], -1)

    def _count(self, linear: Any, choice: HeadChoice, result: Tensor) -> None:
        log = self.switch.heads
        assert log is not None  # install made it
        runs, found = [0] * self.site.kv_heads, log.layer(self.layer)
        for start, stop, some in choice.spans:
            many = choice.counted if some is None else len(some)
            runs[start:stop] = [many] * (stop - start)
        if choice.audited is not None and choice.full:
            full = F.linear(choice.full[0].flatten(1), linear.weight, linear.bias)
            found.audit(result[choice.audited], full)
        found.count(choice.counted, runs, choice.kv_heads)


def problems(root: nn.Module, survey: Survey, policy: HeadRouting) -> list[str]:
    """Why some heads of the model cannot be left out; the first reason.

    Raises:
        ValueError: The router is for states of another width.
    """
    if not survey.layers or any(site.kind == ENCODER for site in survey.sites):
        return ["HeadRouting does not fit: it needs a decoder of transformers"]
    routed = [site for site in survey.sites if site.layer in (policy.layers or ())]
    if len({site.kv_heads for site in routed}) > 1:
        return ["HeadRouting does not fit: layers differ in their KV heads"]
    for site in routed:
        module: Any = root.get_submodule(site.name)
        reason = why_whole(module, site)
        if reason is not None:
            return [f"HeadRouting does not fit: attention of layer {site.layer} {reason}"]
        width = getattr(module, query_name(module)).weight.shape[1]
        if policy.router is not None and policy.router.width != width:
            raise ValueError(
                f"adaptive: HeadRouting.router must be for states of width {width}, "
                f"got {policy.router.width}"
            )
    return []


def query_name(module: nn.Module) -> str:
    """The name of the projection that gives the queries of an attention module."""
    return PACKED if hasattr(module, PACKED) else "q_proj"


def why_whole(module: Any, site: Site) -> str | None:
    """Why attention cannot run some of its heads; None if it can."""
    query = query_name(module)
    heads = site.heads + (2 * site.kv_heads if query == PACKED else 0)
    shapes = {query: (0, heads), "o_proj": (1, site.heads)}
    for name, (axis, many) in shapes.items():
        linear: Any = getattr(module, name, None)
        if not is_plain(linear) or "forward" in linear.__dict__:
            have = ", ".join(child for child, _ in module.named_children())
            return f"has no {name!r} that is a plain linear layer (it has {have})"
        if linear.weight.shape[axis] != many * site.head_dim:
            return f"has a {name!r} that is not of {many} heads of {site.head_dim}"
    norm = getattr(getattr(module, "q_norm", None), "weight", None)
    if norm is not None and norm.numel() != site.head_dim:
        return "normalises the queries of all heads together"
    if getattr(module, "sinks", None) is not None:
        return "shares its scores with sinks"
    if getattr(getattr(module, "config", None), "attn_logit_softcapping", None):
        return "caps its scores"
    try:
        source = inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return "has no source that says what it does"
    known = query != PACKED or "qkv[..., :query_pos]" in source
    if not known or any(source.count(f"self.{name}(") != 1 for name in shapes):
        return "uses its projections in a way that is not known"
    return None


def install(root: nn.Module, survey: Survey, record: PatchRecord, native: bool) -> None:
    """Give the projections of the routed layers their forwards, undoably.

    Args:
        root: The model.
        survey: What is there.
        record: Of the patch.
        native: Whether linear layers may be computed natively.
    """
    policy = next((p for p in record.policies if isinstance(p, HeadRouting)), None)
    if policy is None:
        return
    layers = policy.routed_layers(survey.shape.kv_heads)
    sites = [site for site in survey.sites if site.layer in layers]
    if not sites:
        return
    record.switch.heads = HeadLog(experts=sites[0].kv_heads)
    record.switch.head_pass = HeadPass()
    record.switch.width_pass = record.switch.width_pass or WidthPass()  # says what is padding
    for site in sites:
        query = query_name(root.get_submodule(site.name))
        for name, kind in ((query, QueryForward), ("o_proj", OutputForward)):
            path = f"{site.name}.{name}"
            linear = root.get_submodule(path)
            record.log.set(root, path, "forward", kind(linear, record.switch, site, policy, native))
