"""Whole passes of a decoder whose layers are routed: what is installed, before, and after."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from adaptive.layers import hf_adopt, hf_routing_audit
from adaptive.layers.hf_cache import AdaptiveCacheLayer
from adaptive.layers.hf_kept_cache import KeptCacheLayer
from adaptive.layers.hf_routes import Routes
from adaptive.layers.hf_routing import RoutedForward, WeightedForward
from adaptive.layers.hf_row_cache import RowCacheLayer
from adaptive.layers.hf_token_cache import TokenCacheLayer
from adaptive.layers.routing_log import RoutingLog
from adaptive.layers.state import PatchRecord
from adaptive.layers.survey import Survey
from adaptive.policy import MixtureOfDepths

_PER_TOKEN = 2
_KINDS = (RowCacheLayer, TokenCacheLayer)  # KeptCacheLayer is a RowCacheLayer


def check_fit(root: nn.Module, survey: Survey, policy: MixtureOfDepths) -> None:
    """Look, before anything is changed, whether the policy is for this model.

    Raises:
        ValueError: The router is for states of another width, or positions cannot be compact.
    """
    base: Any = root.get_submodule(survey.base)
    width = base.config.hidden_size
    if policy.router is not None and policy.router.width != width:
        raise ValueError(
            f"adaptive: MixtureOfDepths.router must be for states of width {width}, "
            f"got {policy.router.width}"
        )
    if policy.positions == "compact" and not _makes_positions(base):
        raise ValueError(
            "adaptive: MixtureOfDepths.positions must be 'original': this model has no rotary_emb "
            "that makes the positions of all its layers, got 'compact'"
        )


def install(root: nn.Module, survey: Survey, record: PatchRecord, eager: bool) -> None:
    """Give each routed module a RoutedForward, undoably, if a policy routes."""
    policy = next((p for p in record.policies if isinstance(p, MixtureOfDepths)), None)
    if policy is None:
        return
    routes = Routes(policy, record.switch, record.plan.shape.windows, eager)
    record.routes = routes
    record.routing_log = RoutingLog(unit=policy.unit, decide=policy.decide)
    record.eager_only = record.eager_only or "MixtureOfDepths"
    names = names_of(policy, survey)
    for index in sorted({0, *policy.routed} if policy.unit != "mlp" else policy.routed):
        norm = survey.norms[index] if policy.unit == "block" else ""
        path = norm.removeprefix(f"{survey.layers[index]}.")
        forward = RoutedForward(root.get_submodule(names[index]), index, path, routes)
        record.log.set(root, names[index], "forward", forward)
        if policy.weighted == "mlp" and index in policy.routed:
            mlp = survey.mlps[index]
            weighted = WeightedForward(root.get_submodule(mlp), index, "", routes)
            record.log.set(root, mlp, "forward", weighted)


def names_of(policy: MixtureOfDepths, survey: Survey) -> tuple[str, ...]:
    """Names of the modules that the policy's unit stands for, by layer."""
    attention = tuple(site.name for site in survey.sites)
    units = {"block": survey.layers, "attention": attention, "mlp": survey.mlps}
    return units[policy.unit]


def begin(
    base: nn.Module, record: PatchRecord, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Before a pass of the base module, whose cache is in ``kwargs``.

    Raises:
        NotImplementedError: The pass asks for what routing cannot do, named.
        ValueError: The mask does not tell which tokens are padding.
    """
    routes: Routes | None = record.routes
    if routes is None:
        return
    routes.end()
    if base.training and torch.is_grad_enabled():
        raise NotImplementedError(
            "adaptive: MixtureOfDepths is for inference: call model.eval(), or unpatch() it to "
            "train; adaptive.train.tune_router trains routers"
        )
    if record.want_weights:
        raise NotImplementedError(
            "adaptive: output_attentions is not supported with MixtureOfDepths: what does not run "
            "has no attention weights"
        )
    cache = _argument(base, "past_key_values", args, kwargs)
    _check_kind(cache)  # before the mask, which a static cache makes of another shape
    mask = _argument(base, "attention_mask", args, kwargs)
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == _PER_TOKEN):
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            "adaptive: attention_mask must be [batch, tokens] with MixtureOfDepths, to tell "
            f"padding from tokens, got {shape}"
        )
    if cache is None and routes.policy.kv == "kept":
        raise NotImplementedError(
            "adaptive: MixtureOfDepths(kv='kept') keeps keys in a cache: use_cache must be True"
        )
    past = 0 if cache is None else int(cache.get_seq_length())
    if cache is not None:
        take_over(cache, routes.policy, len(record.states), past)
    known = None if mask is None or bool((mask != 0).all()) else mask != 0
    rotary = getattr(base, "rotary_emb", None) if routes.policy.positions == "compact" else None
    routes.begin(cache, past, known, rotary)


def end(
    base: nn.Module,
    record: PatchRecord,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    """After a pass of the base module, which returned ``output``: count it, audit if it is due."""
    routes: Routes | None = record.routes
    log: RoutingLog | None = record.routing_log
    if routes is None or log is None or not routes.active:
        return
    decoding = routes.past > 0 and output[0].shape[1] == 1
    valid = routes.valid(output[0].shape[1])
    for index, (offered, ran) in routes.end().items():
        log.count(index, offered, ran, decoding)
    if routes.policy.audit_every is not None and not base.training:
        given = named_arguments(base, args, kwargs)
        hf_routing_audit.after_pass(base, record, given, output[0], routes.past, valid)


def take_over(cache: Cache, policy: MixtureOfDepths, layers: int, past: int) -> None:
    """Put the policy's layers into an empty cache.

    Raises:
        NotImplementedError: The cache was filled without the policy, or by one that holds other
            keys.
    """
    if policy.unit == "mlp" and policy.decide == "token":
        return
    if not past:
        hf_adopt.adopt(cache)
        while len(cache.layers) < layers:
            cache.layers.append(AdaptiveCacheLayer())
    form = form_of(policy)
    layer: Any
    for index, layer in enumerate(cache.layers):
        routed, ours = index in policy.routed, isinstance(layer, _KINDS)
        if (ours and layer.form == form) if routed else not ours:
            if ours and not _goes_on(layer, past):
                raise ValueError(
                    f"adaptive: the layers of a cache must hold the same tokens, got {layer.seen} "
                    f"in layer {index} and {past} before it: an exception ended a pass in between; "
                    "start with a new cache"
                )
            continue
        if past or ours or not isinstance(layer, AdaptiveCacheLayer):
            of = " of another policy" if ours else ""
            raise NotImplementedError(
                "adaptive: MixtureOfDepths needs a cache that it filled from the start, got one "
                f"whose layer {index} is a {type(layer).__name__}{of}; start with a new cache"
            )
        cache.layers[index] = _layer_for(policy, layer)


def _check_kind(cache: Any) -> None:
    if cache is not None and (not isinstance(cache, DynamicCache) or cache.offloading):
        raise NotImplementedError(
            "adaptive: MixtureOfDepths needs a DynamicCache that is not offloaded, "
            f"got {type(cache).__name__}"
        )


def form_of(policy: MixtureOfDepths) -> tuple[object, ...]:
    """What policies must have in common to go on with each other's caches: which keys they hold."""
    return policy.decide, policy.unit == "mlp", policy.kv, policy.positions


def _goes_on(layer: Any, past: int) -> bool:
    """Whether a pass behind ``past`` tokens goes on where the last one in ``layer`` ended."""
    every = isinstance(layer, RowCacheLayer) and not layer.drops
    return past == layer.seen or (every and past == layer.inner.get_seq_length())


def _layer_for(policy: MixtureOfDepths, layer: AdaptiveCacheLayer) -> Any:
    made: RowCacheLayer | TokenCacheLayer
    if policy.decide == "sequence":
        made = RowCacheLayer(layer, drops=policy.unit != "mlp")
    elif policy.kv == "kept":
        made = KeptCacheLayer(layer)
    else:
        made = TokenCacheLayer(getattr(layer, "sliding_window", None))
    made.form = form_of(policy)
    return made


def _makes_positions(base: nn.Module) -> bool:
    rotary = getattr(base, "rotary_emb", None)
    if not isinstance(rotary, nn.Module) or hasattr(base, "rotary_emb_local"):
        return False
    return list(inspect.signature(rotary.forward).parameters) == ["x", "position_ids"]


def _argument(base: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the base module was given for an argument, by name or by position."""
    if name in kwargs or not args:
        return kwargs.get(name)
    return named_arguments(base, args, kwargs).get(name)


def named_arguments(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All that the base module was given, by name."""
    names = list(inspect.signature(type(base).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}
