"""Takes hold of a transformers model: what is there, and the changes that patch() makes to it."""

import inspect
from collections.abc import Sequence
from time import perf_counter
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from adaptive.layers import (
    hf_adopt,
    hf_attention,
    hf_generate,
    hf_routing_passes,
    hf_width_pass,
    one_pass,
)
from adaptive.layers.correction import correct, note_pass
from adaptive.layers.hf_config import ask_for
from adaptive.layers.hf_layer_rows import LayerRows
from adaptive.layers.hf_windows import own_windows
from adaptive.layers.how import set_up
from adaptive.layers.state import PatchRecord
from adaptive.layers.survey import Site, Survey
from adaptive.ops import decode_attention
from adaptive.ops.decode_attention import (
    DTYPES,
    HEAD_DIM_STEP,
    MAX_HEAD_DIM,
    MIN_HEAD_DIM,
    supports,
)
from adaptive.policy import ModelShape

FORWARD = "_adaptive_forward"
"""Key of the PatchRecord in the ``__dict__`` of the base module, whose forward is hooked."""

CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching")
OLDEST, NEWEST = (4, 57), 5


def survey(
    root: nn.Module,
    family: str,
    base: str,
    attention: Sequence[str],
    problems: Sequence[str],
    config: Any = None,
) -> Survey:
    """Say what is there and why patch() would refuse. Changes nothing.

    Args:
        root: A ``PreTrainedModel``.
        family: Name of its family.
        base: Dotted name of the module that holds the layers.
        attention: Dotted names of the attention modules, in execution order.
        problems: What the family says is wrong already.
        config: Of the layers, where that of ``root`` is for more than them.
    """
    own: Any = root.config
    config = own if config is None else config
    heads = getattr(config, "num_attention_heads", None) or 0
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    modules = {name: root.get_submodule(name) for name in attention}
    sites = tuple(
        Site(
            name=name,
            kind="hf",
            layer=layer,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=_head_dim(module, config),
        )
        for layer, (name, module) in enumerate(modules.items())
    )
    shape = ModelShape(
        model_type=own.model_type,
        heads=tuple(site.heads for site in sites),
        kv_heads=tuple(site.kv_heads for site in sites),
        head_dim=tuple(site.head_dim for site in sites),
        windows=own_windows(config, len(sites)),
    )
    found = [*problems, *_version_problems(), *_implementation_problems(root, modules)]
    found += _tensor_problems(root)
    sizes = sorted({site.head_dim for site in sites})
    found += [
        f"head size {size} is not supported: the kernels take {MIN_HEAD_DIM}..{MAX_HEAD_DIM} "
        f"in steps of {HEAD_DIM_STEP}"
        for size in sizes
        if not supports(size, torch.float32)
    ]
    if not sites:
        found.append("it has no attention layer, so there is nothing to patch")
    if not heads:
        found.append("config.num_attention_heads is not set")
    elif heads % kv_heads:
        found.append(f"{heads} query heads are no multiple of {kv_heads} KV heads")
    if not getattr(config, "is_causal", True):
        found.append("config.is_causal=False is not supported: an encoder has no decoding")
    return Survey(
        family=family,
        shape=shape,
        sites=sites,
        base=base,
        have=(
            f"attention: {len(sites)} layers, {heads} query heads, {kv_heads} KV heads, "
            f"head size {', '.join(map(str, sizes))}",
            f"implementation: {config._attn_implementation}",
            f"dtype {root.dtype}, device {root.device.type}",
        ),
        problems=tuple(found),
        advice=tuple(_advice(found)),
    )


def install(root: nn.Module, survey: Survey, record: PatchRecord) -> None:
    """Make the changes: one config copy per distinct config, and two hooks on the base module."""
    hf_attention.register()
    set_up(record)
    for layer, rotation in (survey.extra or {}).items():
        record.states[layer].rotation = rotation
    original: Any = root.config
    name = hf_attention.NAMES[original._attn_implementation]
    ask_for(root, record.log, name)
    for entry in CONTINUOUS_BATCHING:
        if hasattr(root, entry):
            record.log.set(root, "", entry, refuse_continuous_batching)
    record.log.set(root, survey.base, FORWARD, record)
    one_pass.install(root, survey.base, record, before_forward, after_forward)
    hf_generate.install(root, survey, record)
    eager = name == hf_attention.ADAPTIVE_EAGER
    hf_routing_passes.install(root, survey, record, eager)


def refuse_continuous_batching(*_: object, **__: object) -> NoReturn:
    """Stand in for the entries of continuous batching, whose paged cache the kernels do not read.

    A plain function, not a method: a bound one would keep the model alive through itself.
    """
    raise NotImplementedError(
        "adaptive: generate_batch (continuous batching) is not supported on a patched model; "
        "unpatch() it first, or use generate()"
    )


def before_forward(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a pass of the base module: take over an empty cache, note what the pass must return.

    The cache that the model would make for itself is made here, so that it can be taken over.
    """
    record: PatchRecord = base.__dict__[FORWARD]
    if not record.enabled:
        return None
    config: Any = base.config
    wanted = kwargs.get("output_attentions")
    record.want_weights = bool(config.output_attentions if wanted is None else wanted)
    record.selection = None
    record.in_graph = record.switch.in_graph = torch.compiler.is_compiling()
    if record.in_graph:
        # An error here would be swallowed, and this hook run again outside of the graph that is
        # made of the rest. So attention says what cannot run in one, and caches stay locked.
        if record.routes is not None:
            record.routes.in_graph = True
        hf_width_pass.begin(base, record, args, kwargs)
        return None
    changed = None
    if not torch.is_grad_enabled() or record.routes is not None:
        cache = kwargs.get("past_key_values")
        if cache is None and len(args) <= 1 and _uses_cache(base, kwargs):
            cache = DynamicCache(config=config)
            changed = (args, {**kwargs, "past_key_values": cache})
        if isinstance(cache, Cache):
            hf_adopt.adopt(cache)
            hf_adopt.lock(cache, False)
            if record.correct_every:
                correct(base, record, kwargs, cache, record.correct_every)
    hf_routing_passes.begin(base, record, *(changed or (args, kwargs)))
    hf_width_pass.begin(base, record, *(changed or (args, kwargs)))
    record.forward_start = perf_counter()
    return changed


def after_forward(
    base: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: object,
) -> None:
    """After a pass of the base module: count it, and what each layer of the cache holds."""
    record: PatchRecord = base.__dict__[FORWARD]
    if not record.enabled or torch.compiler.is_compiling():
        return
    record.forward_calls += 1
    if record.timed:
        record.forward_seconds += perf_counter() - record.forward_start
    hf_routing_passes.end(base, record, args, kwargs, output)
    hf_width_pass.end(record)
    cache = kwargs.get("past_key_values")
    hf_adopt.lock(cache, True)
    if record.correct_every and not torch.is_grad_enabled():
        note_pass(record, kwargs, cache)
    for state, layer in zip(record.states, getattr(cache, "layers", ()), strict=False):
        state.count_held(*_held(layer))


def _uses_cache(base: nn.Module, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("use_cache")
    uses = getattr(base.config, "use_cache", False) if asked is None else asked
    return bool(uses) and not base.training


def _held(layer: Any) -> tuple[str, int, int]:
    """Return class name, bytes allocated and bytes in use of one cache layer."""
    layer = layer.whole if isinstance(layer, LayerRows) else layer
    name = type(layer).__name__
    if hasattr(layer, "held_bytes"):
        return name, layer.held_bytes(), layer.used_bytes()
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor):
        return name, 0, 0
    held = keys.nbytes + values.nbytes
    return name, held, held


def _head_dim(module: nn.Module, config: Any) -> int:
    sizes = (getattr(module, name, None) for name in ("head_dim", "head_size"))
    known = next((size for size in sizes if isinstance(size, int)), None)
    return int(config.hidden_size // config.num_attention_heads) if known is None else known


def _version_problems() -> list[str]:
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version >= OLDEST and version[0] <= NEWEST:
        return []
    return [
        f"transformers {transformers.__version__} is not supported: "
        f">={OLDEST[0]}.{OLDEST[1]},<{NEWEST + 1} is"
    ]


def _implementation_problems(root: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    configs: list[Any] = [module.config for module in (root, *modules.values())]
    used = {config._attn_implementation for config in configs}
    if len(used) > 1:
        return [f"attention implementations differ between layers: {sorted(map(str, used))}"]
    name = used.pop()
    if name not in hf_attention.NAMES:
        return [f"attention implementation {name!r} is not supported: 'sdpa' and 'eager' are"]
    problems = []
    for path, module in modules.items():
        try:
            source = inspect.getsource(inspect.unwrap(type(module).forward))
        except (OSError, TypeError):
            continue  # defined where there is no source to read: the report will tell
        if "ALL_ATTENTION_FUNCTIONS" not in source:
            problems.append(f"{path} ({type(module).__name__}) does not use AttentionInterface")
    return problems


def _tensor_problems(root: nn.Module) -> list[str]:
    problems = []
    if root.dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        problems.append(f"dtype {root.dtype} is not supported: {names} are")
    devices = {parameter.device.type for parameter in root.parameters()}
    for device in sorted(devices - set(decode_attention.native)):
        here = ", ".join(decode_attention.native)
        problems.append(f"device {device!r} is not supported: this build has kernels for {here}")
    return problems


def _advice(problems: list[str]) -> list[str]:
    advice = []
    for problem in problems:
        if problem.startswith("attention implementation"):
            advice.append("model.set_attn_implementation('sdpa') first")
        elif problem.startswith("device 'cuda'"):
            advice.append("build with CUDA: ADAPTIVE_CUDA=1 pip install .")
        elif problem.startswith("device 'meta'"):
            advice.append("load the weights first; a model on the meta device has none")
        elif " has no head at " in problem:
            advice.append(
                "a classifier runs once and never decodes, so there is nothing to speed up: patch "
                "the model that generates (...ForCausalLM), or the bare one that AutoModel makes"
            )
        elif problem.startswith("dtype"):
            advice.append("model.to(torch.float32) or model.to(torch.bfloat16)")
    return advice
