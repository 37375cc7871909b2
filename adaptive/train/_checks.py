"""What early_exit() demands of its settings, its model and its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.adapters import EncoderFamily, Family, family_for
from adaptive.errors import PatchConflict, UnsupportedModel
from adaptive.layers.state import RECORD
from adaptive.train._schedule import LEAST_LAYERS

_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "layer_dropout": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "exit_scale": (lambda x: 0 <= x < math.inf, "a number of 0 or more"),
    "learning_rate": (lambda x: 0 < x < math.inf, "a positive number, or None"),
}
_COUNTS = ("steps", "rotation")
_CHOICES = {
    "curriculum": ("rotational", "gradual", None),
    "timescale": ("exponential", "constant"),
}


def check_settings(settings: Mapping[str, object]) -> None:
    """Raise the ValueError of the first setting that is out of range, by name."""
    for name, value in settings.items():
        if name in _COUNTS and (type(value) is not int or value < 1):
            raise ValueError(f"adaptive: {name} must be a whole number from 1 on, got {value!r}")
        if name in _CHOICES and value not in _CHOICES[name]:
            choices = " or ".join(map(repr, _CHOICES[name]))
            raise ValueError(f"adaptive: {name} must be {choices}, got {value!r}")
        if name in _NUMBERS and not (name == "learning_rate" and value is None):
            fits, rule = _NUMBERS[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
                raise ValueError(f"adaptive: {name} must be {rule}, got {value!r}")


def causal_lm(model: nn.Module, layer_dropout: float) -> tuple[nn.Module, Family, int]:
    """Return the causal LM to train, its family and its number of layers.

    It is ``model``, or what PEFT wraps. Other wrappers, of several devices or of a compiler, would
    not see what is done here, and are refused.

    Raises:
        TypeError, UnknownFamily, UnsupportedModel, PatchConflict: As `early_exit`.
    """
    root, family = _root(model)
    if isinstance(family, EncoderFamily):
        raise UnsupportedModel(
            f"adaptive: {type(root).__name__} is an encoder: it has no next token to learn"
        )
    problems = _problems(root, family, layer_dropout)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        problems.append("PEFT's learned prompts are no part of the model inside it")
    if problems:
        raise UnsupportedModel("adaptive: " + "\n".join(problems))
    layers = len(list(root.get_submodule(family.layers_name(root)).children()))
    if layers < LEAST_LAYERS:
        raise UnsupportedModel(f"adaptive: the model must have 2 layers or more, got {layers}")
    return root, family, layers


def any_model(model: nn.Module) -> tuple[nn.Module, Family | EncoderFamily, int]:
    """Return what `causal_lm` does, or the encoder to train.

    Raises:
        TypeError, UnknownFamily, UnsupportedModel, PatchConflict: As `early_exit`.
    """
    root, family = _root(model)
    if not isinstance(family, EncoderFamily):
        return causal_lm(model, 0.0)
    problems = [*family.problems(root), *_checkpointing(root)]
    if problems:
        raise UnsupportedModel("adaptive: " + "\n".join(problems))
    return root, family, len(family.layer_names(root))


def _root(model: nn.Module) -> tuple[nn.Module, Family | EncoderFamily]:
    """The model of transformers, bare or inside PEFT, and its family."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"adaptive: model must be an nn.Module, got {type(model).__name__}")
    peft = type(model).__module__.startswith("peft.")
    inside = [module for module in model.modules() if _is_pretrained(module)]
    if not inside or not (inside[0] is model or peft):
        raise UnsupportedModel(
            "adaptive: only a model of transformers can be trained here, bare or inside PEFT, "
            f"got {type(model).__name__}"
        )
    if any(RECORD in module.__dict__ for module in model.modules()):
        raise PatchConflict("adaptive: the model is patched; unpatch() it to train it")
    return inside[0], family_for(inside[0])


def check_finite(step: int, losses: Mapping[int, float], trained: Sequence[Tensor]) -> None:
    """Raise a FloatingPointError if a loss or a gradient of ``step`` is not finite."""
    kept = f"the weights are those after {step} steps"
    for layer, loss in losses.items():
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"adaptive: the loss must be finite, got {loss} at step {step}, exit layer "
                f"{layer + 1}; {kept}"
            )
    slopes = [parameter.grad for parameter in trained if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(slopes).item()
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"adaptive: the gradient must be finite, got a norm of {norm} at step {step}; {kept}"
        )


def _problems(root: nn.Module, family: Family, layer_dropout: float) -> list[str]:
    config: Any = root.config
    problems = list(family.problems(root))
    if not family.base_name(root):
        problems.append(f"{type(root).__name__} has no LM head: load it as a causal LM")
    problems += _checkpointing(root)
    if getattr(config, "output_router_logits", False):
        problems.append(
            "config.output_router_logits=True: the balancing loss of experts is not trained here"
        )
    if layer_dropout and getattr(config, "_attn_implementation", "") == "flex_attention":
        problems.append("flex_attention has a mask that cannot be cut into rows: use sdpa")
    return problems


def _checkpointing(root: nn.Module) -> list[str]:
    on = any(getattr(module, "gradient_checkpointing", False) for module in root.modules())
    return ["gradient checkpointing would drop layers anew: switch it off"] if on else []


def _is_pretrained(module: nn.Module) -> bool:
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__ == "transformers.modeling_utils"
        for kind in type(module).__mro__
    )
