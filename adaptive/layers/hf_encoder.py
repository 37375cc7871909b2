"""Takes hold of an encoder of transformers: what is there, and the changes that patch() makes."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import nn

from adaptive.layers import (
    hf_attention,
    hf_encoder_passes,
    hf_model,
    hf_reduction_passes,
    hf_width_pass,
    one_pass,
    token_reduction_passes,
)
from adaptive.layers.hf_config import ask_for
from adaptive.layers.state import ENCODER, PatchRecord
from adaptive.layers.survey import Survey
from adaptive.policy import GlobalLocalAttention, ModelShape
from adaptive.policy.plan import GLOBAL_LOCAL

FORWARD = "_adaptive_encoder"
"""Key of the PatchRecord in the ``__dict__`` of the base module, whose forward is hooked."""


def survey(
    root: nn.Module, family: str, base: str, attention: Sequence[str], problems: Sequence[str]
) -> Survey:
    """Say what is there and why patch() would refuse. Changes nothing.

    Args:
        root: A ``PreTrainedModel``.
        family: Name of its family.
        base: Dotted name of the module that holds the layers.
        attention: Dotted names of the attention modules, in execution order.
        problems: What the family says is wrong already.
    """
    modules = {name: root.get_submodule(name) for name in attention}
    foreign = [name for name, module in modules.items() if not _uses_interface(module)]
    found = [*problems, *_others(root, modules)]
    if foreign:
        kind = type(modules[foreign[0]]).__name__
        found.append(f"{foreign[0]} ({kind}) does not use AttentionInterface")
    if found:
        config: Any = root.config
        shape = ModelShape(model_type=config.model_type, heads=(), kv_heads=(), head_dim=())
        return Survey(
            family=family, shape=shape, problems=tuple(found), advice=_advice(bool(foreign))
        )
    module: Any = root.get_submodule(base)
    config = module.config
    protected = hf_reduction_passes.protected(config)
    seen = hf_model.survey(root, family, base, attention, (), config)
    return replace(
        seen,
        sites=tuple(replace(site, kind=ENCODER) for site in seen.sites),
        shape=replace(seen.shape, windows=_own_windows(modules.values())),
        width=getattr(config, "hidden_size", 0),
        protect=protected,
        class_token=protected > 0,
    )


def install(root: nn.Module, survey: Survey, record: PatchRecord) -> None:
    """Make the changes: one config copy per distinct config, and two hooks on the base module."""
    hf_attention.register()
    policies = [p for p in record.policies if isinstance(p, GlobalLocalAttention)]
    for state in record.states:
        state.how = policies[0] if set(state.row) == {GLOBAL_LOCAL} else None
    if policies:
        record.eager_only = "GlobalLocalAttention with an attention mask"
    base: Any = root.get_submodule(survey.base)
    ask_for(root, record.log, hf_attention.NAMES[base.config._attn_implementation])
    hf_encoder_passes.install(root, survey, record)
    token_reduction_passes.install(root, survey, record)
    record.log.set(root, survey.base, FORWARD, record)
    one_pass.install(root, survey.base, record, before_forward, after_forward)


def before_forward(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a pass of the base module: note what it must return."""
    record: PatchRecord = base.__dict__[FORWARD]
    if not record.enabled:
        return
    config: Any = base.config
    wanted = kwargs.get("output_attentions")
    record.want_weights = bool(config.output_attentions if wanted is None else wanted)
    record.in_graph = record.switch.in_graph = torch.compiler.is_compiling()
    hf_encoder_passes.begin(base, record, args, kwargs)
    hf_reduction_passes.begin(base, record, args, kwargs)
    hf_width_pass.begin(base, record, args, kwargs)
    if not record.in_graph:
        record.forward_start = perf_counter()


def after_forward(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
) -> None:
    """After a pass of the base module: count it."""
    record: PatchRecord = base.__dict__[FORWARD]
    if not record.enabled or torch.compiler.is_compiling():
        return
    record.forward_calls += 1
    seconds = perf_counter() - record.forward_start if record.timed else 0.0
    record.forward_seconds += seconds
    hf_encoder_passes.end(base, record, args, kwargs, output, seconds)
    hf_reduction_passes.end(base, record, args, kwargs, output, seconds)
    hf_width_pass.end(record)  # last: audits of the others run FFNs, too


def _uses_interface(module: nn.Module) -> bool:
    """Whether a module's forward dispatches through AttentionInterface, by its source."""
    if not hasattr(module, "config"):
        return False
    try:
        source = inspect.getsource(inspect.unwrap(type(module).forward))
    except (OSError, TypeError):
        return True  # defined where there is no source to read: the report will tell
    return "ALL_ATTENTION_FUNCTIONS" in source


def _others(root: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """What attends besides the family's layers, such as another tower or cross-attention."""
    return [
        f"{name} ({type(module).__name__}) attends, too, and is no part of the encoder's layers"
        for name, module in root.named_modules()
        if name not in modules
        and type(module).__module__.startswith("transformers.models.")
        and type(module).__name__.endswith("Attention")
        and hasattr(module, "config")
        and _uses_interface(module)
    ][:1]


def _own_windows(modules: Any) -> tuple[int | None, ...]:
    """Tokens that each layer sees by a window of its own, both sides and itself; None: all.

    The attention module knows: transformers hands the number to flash attention, where it counts
    the tokens less than this away.
    """
    sizes = (getattr(module, "sliding_window", None) for module in modules)
    return tuple(2 * size - 1 if size else None for size in sizes)


def _advice(foreign: bool) -> tuple[str, ...]:
    if not foreign:
        return ("patch the encoder inside it, such as model.vision_model, by itself",)
    return ("transformers 5 sends the attention of most encoders through AttentionInterface",)
