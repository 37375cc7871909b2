"""Takes hold of a vision transformer of timm: what is there, and the changes that patch() makes.

timm is not imported: its classes are known by their names. Of a VisionTransformer, DeiT's with its
distillation token too, tokens may merge or go between blocks; all else of it stays as it is.
"""

import inspect
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from adaptive.layers import token_reduction_passes
from adaptive.layers.changes import own_forward
from adaptive.layers.one_pass import PASSES, OnePass
from adaptive.layers.state import ENCODER, PatchRecord
from adaptive.layers.survey import Site, Survey
from adaptive.layers.timm_forwards import (
    FORWARD,
    REDUCTION,
    AttentionForward,
    Features,
    Intermediates,
    keep_query,
    see_key,
)
from adaptive.policy import ModelShape, TokenMerging, TokenPruning

_FILE = "timm.models.vision_transformer"
_MODELS = ((_FILE, "VisionTransformer"),)
_BLOCKS = ((_FILE, "Block"), (_FILE, "ResPostBlock"))
_ATTENTION = (("timm.layers.attention", "Attention"), (_FILE, "Attention"))
_TURNED = "its blocks turn queries and keys by their places, and merged tokens have none"
_PAIRS = "its attention adds a number for each pair of places, and merged tokens have none"
_WINDOWS = "its blocks attend in windows of places, and merged tokens have none"
_WHY_NOT = {
    **dict.fromkeys(("Eva", "VisionTransformerRope"), _TURNED),
    **dict.fromkeys(("Beit", "VisionTransformerRelPos", "VisionTransformerSAM"), _PAIRS),
    **dict.fromkeys(("SwinTransformer", "SwinTransformerV2", "SwinTransformerV2Cr"), _WINDOWS),
}
_WAY_OUT = (
    "of timm's models TokenMerging and TokenPruning take VisionTransformer (ViT, DeiT, DINOv2, "
    "CLIP, SigLIP); for more, take the model of that name of transformers"
)


def inside(root: nn.Module) -> dict[str, Any]:
    """The vision transformers of timm in a model, itself included, by their dotted names."""
    return {
        name: module
        for name, module in root.named_modules()
        if any(_name(kind) in _MODELS for kind in type(module).__mro__)
    }


def advice(root: nn.Module) -> Iterator[str]:
    """What to say to whom patch() refuses a model, if timm has to do with it."""
    found = next((m for m in root.modules() if _is_timms(type(m))), None)
    if found is None:
        return
    if names := [name for name in inside(root) if name]:
        yield f"timm's models are patched by themselves: {', '.join(names)}"
    kinds = [kind.__name__ for kind in type(found).__mro__ if kind.__name__ in _WHY_NOT]
    yield f"{type(found).__name__} of timm: {_WHY_NOT[kinds[0]]}; {_WAY_OUT}" if kinds else _WAY_OUT


def survey(root: nn.Module, models: dict[str, Any]) -> Survey:
    """Say what is there and why patch() would refuse. Changes nothing.

    Args:
        root: The model that is to be patched.
        models: What of it is timm's, as `inside` says; at least one.
    """
    base, model = next(iter(models.items()))
    problems = list(_problems(models))[:1]
    blocks = () if problems else model.blocks
    names = [f"{base}.blocks.{number}".lstrip(".") for number in range(len(blocks))]
    sites = tuple(
        Site(
            name=f"{name}.attn",
            kind=ENCODER,
            layer=layer,
            heads=block.attn.num_heads,
            kv_heads=block.attn.num_heads,
            head_dim=block.attn.head_dim,
        )
        for layer, (name, block) in enumerate(zip(names, blocks, strict=True))
    )
    heads = tuple(site.heads for site in sites)
    return Survey(
        family="timm",
        shape=ModelShape(
            model_type=type(model).__name__,
            heads=heads,
            kv_heads=heads,
            head_dim=tuple(site.head_dim for site in sites),
        ),
        sites=sites,
        have=(f"attention: {len(sites)} blocks of timm, whose tokens may merge or go",),
        problems=tuple(problems),
        advice=(_WAY_OUT,) if problems else (),
        base=base,
        layers=tuple(names),
        exact_only="of timm's models only TokenMerging and TokenPruning know the parts",
        fits=(TokenMerging, TokenPruning),
        width=0 if problems else model.embed_dim,
        protect=0 if problems else model.num_prefix_tokens,
        class_token=not problems and bool(model.has_class_token),
    )


def install(root: nn.Module, survey: Survey, record: PatchRecord) -> None:
    """Give model, blocks and attention their own methods, and show queries and keys."""
    base: Any = root.get_submodule(survey.base)
    log = record.log
    token_reduction_passes.install(root, survey, record)
    log.set(root, survey.base, FORWARD, record)
    log.set(root, survey.base, "forward_features", Features(base))
    for site in survey.sites:
        attention = root.get_submodule(site.name)
        log.set(root, site.name, "forward", AttentionForward(attention))
        if record.token_reduction is not None:
            for norm, hook in (("q_norm", keep_query), ("k_norm", see_key)):
                log.set(root, f"{site.name}.{norm}", REDUCTION, record.token_reduction)
                log.hook(root, f"{site.name}.{norm}", "_forward_hooks", hook)
    if record.token_reduction is not None:
        log.set(root, survey.base, "forward_intermediates", Intermediates(base))
        policy = type(record.token_reduction.policy).__name__
        log.set(root, survey.base, PASSES, OnePass(policy, record.switch))


def _is_timms(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "timm"


def _name(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__name__


def _runs(module: nn.Module, method: str, names: Collection[tuple[str, str]]) -> bool:
    """Whether a method of a module is that of one of timm's classes, and of no heir's."""
    return _name(next(k for k in type(module).__mro__ if method in k.__dict__)) in names


def _problems(models: dict[str, Any]) -> Iterator[str]:
    """Why the models cannot be patched: what is not as it must be."""
    if len(models) > 1:
        yield f"there are several models of timm inside ({', '.join(models)}); patch each alone"
    for name, model in models.items():
        kind = type(model).__name__
        blocks = getattr(model, "blocks", ())
        if not _runs(model, "forward_features", _MODELS):
            yield f"{name or kind} has a forward_features of its own, which is not timm's"
        if "forward_features" in model.__dict__:
            yield f"{name or kind} has a forward_features of its own, set by someone else"
        if not len(blocks):
            yield f"{name or kind} has no blocks"
        known: dict[nn.Module, str] = {}
        for number, block in enumerate(blocks):
            yield from _block_problems(f"{name}.blocks.{number}".lstrip("."), block, known)


def _block_problems(name: str, block: Any, known: dict[nn.Module, str]) -> Iterator[str]:
    """Why a block cannot be patched; ``known`` are the parts of those before it, by name."""
    if not _runs(block, "forward", _BLOCKS):
        yield (
            f"{name} is a {type(block).__name__}, which does not run attention and then an MLP as "
            f"timm's {' and '.join(name for _, name in _BLOCKS)} do"
        )
        return
    attention = block.attn
    kind = type(attention)
    if not _runs(attention, "forward", _ATTENTION):
        yield f"{name}.attn is a {kind.__name__}, which does not attend as timm's Attention does"
    elif "attn_mask" not in inspect.signature(kind.forward).parameters:
        yield f"{name}.attn takes no attn_mask, where sizes of tokens go: timm 1.0.16 or newer does"
    elif own_forward(attention) is not None:
        yield f"{name}.attn has a forward of its own, set by someone else"
    else:
        norms = {".attn.q_norm": attention.q_norm, ".attn.k_norm": attention.k_norm}
        for part, module in {"": block, ".attn": attention, **norms}.items():
            if (first := known.setdefault(module, name + part)) != name + part:
                yield f"{name}{part} is {first} once more; give each block modules of its own"
