"""Where a model family keeps its parts: a row of data per family, found by `config.model_type`."""

import re
from dataclasses import dataclass

from torch import nn

from adaptive.adapters._encoder_family import EncoderFamily
from adaptive.errors import UnknownFamily

FAMILIES: dict[str, "Family | EncoderFamily"] = {}
"""The registered family of each ``config.model_type``."""

_PATH = re.compile(r"\w+(\.\w+)*")

REFUSED: dict[str, str] = {}
"""Why some well-known model types have no family."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Dotted paths of the parts of a family of decoder models, and which settings it cannot have.

    A family that is built like a known one takes one call::

        adaptive.register_family(adaptive.Family(name="mine", model_types=("my_model",)))

    The attention modules must dispatch through transformers' ``AttentionInterface`` and be called
    once per layer and pass.

    Attributes:
        name: What reports call the family.
        model_types: Values of ``config.model_type``, at least one.
        base: The module that holds the layers and makes the attention masks, from the model. A
            model that *is* that module (built by ``AutoModel``) is found too.
        layers: The ``nn.ModuleList`` of decoder layers, from the base.
        attention: The attention module, from a layer.
        norm: The norm before the head, from the base.
        head: The output projection, from the model; "a|b" where versions of transformers differ.
        mlp: The feed-forward module, from a layer; "a|b" as in ``head``. What it returns is added
            to the hidden states.
        exact_only: Why only the exact policy fits these models; "": others do, too.
        input_norm: The norm that a layer's first module reads through, from a layer; empty if
            it reads the hidden states themselves.
        unsupported: Settings that patch() must refuse: (field of the config, value, reason).
    """

    name: str
    model_types: tuple[str, ...]
    base: str = "model"
    layers: str = "layers"
    attention: str = "self_attn"
    norm: str = "norm"
    head: str = "lm_head"
    mlp: str = "mlp"
    exact_only: str = ""
    input_norm: str = "input_layernorm"
    unsupported: tuple[tuple[str, object, str], ...] = ()

    def __post_init__(self) -> None:
        for field in ("name", "base", "layers", "attention", "norm", "head", "mlp"):
            path = getattr(self, field)
            several = field in ("head", "mlp") and isinstance(path, str)
            names = path.split("|") if several else [path]
            if not all(isinstance(name, str) and _PATH.fullmatch(name) for name in names):
                raise ValueError(f"Family: {field} must be a dotted path, got {path!r}")
        norm = self.input_norm
        if not isinstance(norm, str) or (norm and not _PATH.fullmatch(norm)):
            raise ValueError(f"Family: input_norm must be a dotted path or empty, got {norm!r}")
        types = self.model_types
        if not isinstance(types, tuple) or not types or not all(isinstance(t, str) for t in types):
            raise ValueError(f"Family: model_types must be a tuple of names, got {types!r}")
        for refusal in self.unsupported:
            if not isinstance(refusal, tuple) or len(refusal) != len(("field", "value", "reason")):
                raise ValueError(
                    f"Family: unsupported must hold (field, value, reason), got {refusal!r}"
                )

    def base_name(self, model: nn.Module) -> str:
        """Dotted name of the base below ``model``; empty if the model is the base itself."""
        bare = getattr(model, self.layers.split(".")[0], None)
        return "" if isinstance(bare, nn.Module) else self.base

    def layers_name(self, model: nn.Module) -> str:
        """Dotted name of the list of layers below ``model``."""
        return ".".join(filter(None, (self.base_name(model), self.layers)))

    def attention_names(self, model: nn.Module) -> list[str]:
        """Dotted names of the attention modules below ``model``, in execution order."""
        root = self.layers_name(model)
        return [
            f"{root}.{index}.{self.attention}"
            for index, layer in enumerate(self._layers(model))
            if _find(layer, self.attention) is not None
        ]

    def layer_names(self, model: nn.Module) -> list[str]:
        """Dotted names of the layers below ``model``, in execution order."""
        root = self.layers_name(model)
        return [f"{root}.{index}" for index in range(len(self._layers(model)))]

    def mlp_names(self, model: nn.Module) -> list[str]:
        """Dotted names of the layers' feed-forward modules; of those layers that have one."""
        return [
            f"{name}.{path}"
            for name in self.layer_names(model)
            for path in self.mlp.split("|")
            if _find(model.get_submodule(name), path) is not None
        ]

    def norm_names(self, model: nn.Module) -> list[str]:
        """Dotted names of the layers' input norms, empty where there is none by design.

        Fewer than layers if some lack the norm that they should have.
        """
        if not self.input_norm:
            return ["" for _ in self._layers(model)]
        return [
            f"{name}.{self.input_norm}"
            for name in self.layer_names(model)
            if _find(model.get_submodule(name), self.input_norm) is not None
        ]

    def problems(self, model: nn.Module) -> list[str]:
        """Say which parts ``model`` lacks and which of its settings are unsupported."""
        base = self.base_name(model)
        paths = {
            "layers": self.layers_name(model),
            "norm": ".".join(filter(None, (base, self.norm))),
        }
        if base:
            paths = {"base": base, **paths, "head": self.head}
        found = [
            f"{type(model).__name__} has no {part} at {path!r}"
            for part, path in paths.items()
            if _find(model, path) is None
        ]
        for index, layer in enumerate(self._layers(model)):
            if _find(layer, self.attention) is None:
                found.append(f"layer {index} has no attention at {self.attention!r}")
        config = getattr(model, "config", None)
        found += [
            f"config.{field}={value!r} is not supported: {reason}"
            for field, value, reason in self.unsupported
            if getattr(config, field, None) == value
        ]
        return found

    def _layers(self, model: nn.Module) -> list[nn.Module]:
        layers = _find(model, self.layers_name(model))
        return [] if layers is None else list(layers.children())


def _find(root: nn.Module, path: str) -> nn.Module | None:
    for alternative in path.split("|"):
        try:
            return root.get_submodule(alternative)
        except AttributeError:
            continue
    return None


def register_family(family: Family | EncoderFamily) -> None:
    """Let patch() support the models of ``family``.

    Raises:
        TypeError: ``family`` is neither a Family nor an EncoderFamily.
        ValueError: One of its model types has another family already.
    """
    if not isinstance(family, Family | EncoderFamily):
        raise TypeError(f"adaptive: family must be a Family, got {type(family).__name__}")
    for model_type in family.model_types:
        known = FAMILIES.get(model_type)
        if known is not None and known != family:
            raise ValueError(
                f"adaptive: model type {model_type!r} has the family {known.name!r} already"
            )
    FAMILIES.update(dict.fromkeys(family.model_types, family))


def family_for(model: nn.Module) -> Family | EncoderFamily:
    """Return the family registered for the ``config.model_type`` of ``model``.

    Raises:
        UnknownFamily: There is none. The message lists the known ones and shows how to add one.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    known = f"Known model types: {', '.join(sorted(FAMILIES))}."
    if model_type in REFUSED:
        raise UnknownFamily(
            f"adaptive: model type {model_type!r} is not supported. {REFUSED[model_type]} {known}"
        )
    raise UnknownFamily(
        f"adaptive: model type {model_type!r} of {type(model).__name__} belongs to no known "
        f"family. {known} If its attention dispatches through transformers' AttentionInterface, "
        "add it: adaptive.register_family(adaptive.Family(name='mine', "
        f"model_types=({model_type!r},), base=..., layers=..., attention=...))"
    )
