"""Takes hold of a plain PyTorch model: which of its attention modules patch() can help, and how.

Two kinds of module are helped. nn.MultiheadAttention, wherever it stands, gets the forward of
`torch_mha`; a module of a class given to `register_attention`, which calls
F.scaled_dot_product_attention itself, the one of `torch_sdpa`. The self-attention of PyTorch's own
transformer layers is left alone: at 1..16 tokens it attends to those tokens only, and in evaluation
nn.TransformerEncoderLayer runs a fused kernel that calls no submodule.
"""

import operator
import time
from collections import Counter
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn

from adaptive.layers import timm_vit
from adaptive.layers.state import RECORD, PatchRecord
from adaptive.layers.survey import Site, Survey
from adaptive.layers.torch_mha import mha_forward
from adaptive.layers.torch_sdpa import sdpa_forward
from adaptive.policy import ModelShape

LEFT = "_adaptive_left"
"""Key, in the ``__dict__`` of the patched model, of what the report says was left alone."""

_FORWARDS = {"mha": mha_forward, "sdpa": sdpa_forward}
_OWN_TOKENS: dict[type[Any], str] = {
    nn.TransformerEncoderLayer: "it sees its own tokens only, and is fused in evaluation",
    nn.TransformerDecoderLayer: "it sees its own tokens only",
}


@dataclass(frozen=True)
class _Sizes:
    """Attributes of a registered class that hold its sizes; None: it does not say."""

    heads: str | None
    kv_heads: str | None
    head_dim: str | None


_MULTIHEAD = _Sizes("num_heads", "num_heads", "head_dim")
_REGISTERED: dict[type[nn.Module], _Sizes] = {}


def register_attention(
    module_class: type[nn.Module],
    *,
    heads: str | None = None,
    kv_heads: str | None = None,
    head_dim: str | None = None,
) -> None:
    """Let patch() help modules that call ``F.scaled_dot_product_attention`` in their forward.

    While the forward of such a module runs, in its thread, its calls with 1..16 query tokens go to
    `decode_attention`; the module's code stays as it is. Register the class that makes the call,
    not one around it: inside, every PyTorch function costs about 3 microseconds more.

    Args:
        module_class: The class; subclasses count too.
        heads: Attribute of the module with its number of query heads, for plans and reports.
        kv_heads: The same for KV heads; None: as many as query heads.
        head_dim: The same for the head size.

    Raises:
        TypeError: ``module_class`` is no subclass of nn.Module, or is nn.MultiheadAttention.
        ValueError: The class is registered with other attributes already.
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise TypeError(f"adaptive: module_class must be an nn.Module class, got {module_class!r}")
    if issubclass(module_class, nn.MultiheadAttention):
        raise TypeError("adaptive: module_class must not be nn.MultiheadAttention, which is known")
    sizes = _Sizes(heads, kv_heads, head_dim)
    if _REGISTERED.setdefault(module_class, sizes) != sizes:
        raise ValueError(
            f"adaptive: {module_class.__name__} must be registered once, "
            f"got {sizes} after {_REGISTERED[module_class]}"
        )


def survey(root: nn.Module) -> Survey:
    """Find the attention modules that can be helped. Changes nothing."""
    left = _left_alone(root)
    sites: list[Site] = []
    problems: list[str] = []
    for name, module in root.named_modules():
        attributes = _attributes(module)
        if attributes is None or name in left:
            continue
        where = name or "the model"
        if "forward" in module.__dict__:
            problems.append(f"{where} has a forward of its own on the instance; patch before that")
        try:
            sites.append(_site(name, module, attributes, layer=len(sites)))
        except (AttributeError, TypeError) as error:
            problems.append(f"{where} ({type(module).__name__}) does not say its sizes: {error}")
    if not sites and not problems and (models := timm_vit.inside(root)):
        return timm_vit.survey(root, models)
    advice = []
    if not sites and not problems:
        problems.append("no attention module was found that patch() can help")
        problems += _sentences(left)
        advice.append(
            "if a module calls F.scaled_dot_product_attention, name its class: "
            "adaptive.register_attention(ThatClass)"
        )
    advice += timm_vit.advice(root)
    kinds = [site.kind for site in sites]
    have = [
        f"attention: {kinds.count('mha')} nn.MultiheadAttention, {kinds.count('sdpa')} modules "
        "registered as calling F.scaled_dot_product_attention"
    ]
    return Survey(
        family="plain PyTorch",
        shape=ModelShape(
            model_type=type(root).__name__,
            heads=tuple(site.heads for site in sites),
            kv_heads=tuple(site.kv_heads for site in sites),
            head_dim=tuple(site.head_dim for site in sites),
        ),
        sites=tuple(sites),
        have=(*have, *_sentences(left)),
        problems=tuple(problems),
        advice=tuple(advice),
        extra=tuple(_sentences(left)),
    )


def install(root: nn.Module, survey: Survey, record: PatchRecord) -> None:
    """Give each site its forward, and the model two hooks that count its passes."""
    if survey.layers:
        timm_vit.install(root, survey, record)
        return
    for site in survey.sites:
        forward = MethodType(_FORWARDS[site.kind], root.get_submodule(site.name))
        record.log.set(root, site.name, "forward", forward)
    record.log.set(root, "", LEFT, survey.extra)
    record.log.hook(root, "", "_forward_pre_hooks", before_forward)
    record.log.hook(root, "", "_forward_hooks", after_forward)


def before_forward(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a pass of the model: start its clock."""
    if not torch.compiler.is_compiling():
        root.__dict__[RECORD].forward_start = time.perf_counter()


def after_forward(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
) -> None:
    """After a pass of the model: count it, and say what took no part."""
    record: PatchRecord = root.__dict__[RECORD]
    if torch.compiler.is_compiling() or not record.enabled:
        return
    record.forward_calls += 1
    if record.timed:
        record.forward_seconds += time.perf_counter() - record.forward_start
    for sentence in root.__dict__[LEFT]:
        record.note(sentence)


def _attributes(module: nn.Module) -> _Sizes | None:
    """Where the module keeps its sizes; None if it is no attention module that we know."""
    if isinstance(module, nn.MultiheadAttention):
        return _MULTIHEAD if type(module).forward is nn.MultiheadAttention.forward else None
    known = (_REGISTERED[kind] for kind in type(module).__mro__ if kind in _REGISTERED)
    return next(known, None)


def _site(name: str, module: nn.Module, attributes: _Sizes, layer: int) -> Site:
    def read(attribute: str | None, default: int) -> int:
        return default if attribute is None else operator.index(getattr(module, attribute))

    heads = read(attributes.heads, 1)
    return Site(
        name=name,
        kind="mha" if isinstance(module, nn.MultiheadAttention) else "sdpa",
        layer=layer,
        heads=heads,
        kv_heads=read(attributes.kv_heads, heads),
        head_dim=read(attributes.head_dim, 0),
    )


def _left_alone(root: nn.Module) -> dict[str, str]:
    """Names of attention modules that patch() does not touch, and why."""
    left = {}
    for name, module in root.named_modules():
        for kind, why in _OWN_TOKENS.items():
            if isinstance(module, kind) and _is_stock(module, kind):
                left[f"{name}.self_attn".lstrip(".")] = f"self_attn of nn.{kind.__name__} ({why})"
        if isinstance(module, nn.MultiheadAttention):
            if type(module).forward is not nn.MultiheadAttention.forward:
                left[name] = f"{type(module).__name__} (it has a forward of its own)"
            elif module.bias_k is not None or module.add_zero_attn:
                left[name] = "nn.MultiheadAttention with bias_k or add_zero_attn"
    return left


def _is_stock(layer: nn.Module, kind: type[Any]) -> bool:
    own = type(layer)
    return own.forward is kind.forward and own._sa_block is kind._sa_block  # type: ignore[attr-defined]


def _sentences(left: dict[str, str]) -> list[str]:
    return [f"left to PyTorch: {n} {what}" for what, n in Counter(left.values()).items()]
