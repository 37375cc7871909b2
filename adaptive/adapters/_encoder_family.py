"""Where a family of encoders keeps its parts: a row of data per family, as for decoders."""

import re
from dataclasses import dataclass

from torch import nn

_PATH = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """Dotted paths of the parts of a family of encoders, and which settings it cannot have.

    An encoder is useful with any head, or with none: all that counts is where its layers are. The
    attention modules must dispatch through transformers' ``AttentionInterface``, look both ways,
    and be called once per layer and pass.

    Each path may be "a|b" where versions of transformers or classes differ; the first that leads
    somewhere is taken.

    Attributes:
        name: What reports call the family.
        model_types: Values of ``config.model_type``, at least one.
        base: The module that holds the layers and makes the attention masks, from a model with a
            head. A model that *is* that module (built by ``AutoModel``) is found too.
        layers: The ``nn.ModuleList`` of layers, from the base.
        attention: The attention module, from a layer.
        mlp: The feed-forward module, from a layer, or the first of two, as in BERT. A layer may
            have none: policies that need it are refused then.
        unsupported: Settings that patch() must refuse: (field of the config, value, reason).
    """

    name: str
    model_types: tuple[str, ...]
    base: str
    layers: str = "encoder.layer"
    attention: str = "attention.self"
    mlp: str = "intermediate"
    unsupported: tuple[tuple[str, object, str], ...] = ()

    def __post_init__(self) -> None:
        for field in ("name", "base", "layers", "attention", "mlp"):
            path = getattr(self, field)
            names = path.split("|") if isinstance(path, str) else [path]
            if not all(isinstance(name, str) and _PATH.fullmatch(name) for name in names):
                raise ValueError(f"EncoderFamily: {field} must be a dotted path, got {path!r}")
        types = self.model_types
        if not isinstance(types, tuple) or not types or not all(isinstance(t, str) for t in types):
            raise ValueError(f"EncoderFamily: model_types must be a tuple of names, got {types!r}")
        for refusal in self.unsupported:
            if not isinstance(refusal, tuple) or len(refusal) != len(("field", "value", "reason")):
                raise ValueError(
                    f"EncoderFamily: unsupported must hold (field, value, reason), got {refusal!r}"
                )

    def base_name(self, model: nn.Module) -> str:
        """Dotted name of the base below ``model``; empty if the model is the base itself."""
        return "" if path_in(model, self.layers) else path_in(model, self.base) or self.base

    def layer_names(self, model: nn.Module) -> list[str]:
        """Dotted names of the layers below ``model``, in execution order."""
        base = self.base_name(model)
        path = path_in(_at(model, base), self.layers)
        if path is None:
            return []
        root = ".".join(filter(None, (base, path)))
        return [f"{root}.{index}" for index in range(len([*model.get_submodule(root).children()]))]

    def attention_names(self, model: nn.Module) -> list[str]:
        """Dotted names of the attention modules below ``model``, in execution order."""
        names = self.layer_names(model)
        found = [(name, path_in(model.get_submodule(name), self.attention)) for name in names]
        return [f"{name}.{attention}" for name, attention in found if attention]

    def mlp_names(self, model: nn.Module) -> list[str]:
        """Dotted names of the layers' feed-forward modules; fewer if some layers have none."""
        names = self.layer_names(model)
        found = [(name, path_in(model.get_submodule(name), self.mlp)) for name in names]
        return [f"{name}.{mlp}" for name, mlp in found if mlp]

    def problems(self, model: nn.Module) -> list[str]:
        """Say which parts ``model`` lacks and which of its settings are unsupported."""
        base = self.base_name(model)
        path = path_in(_at(model, base), self.layers)
        found = []
        if path is None:
            missing = ".".join(filter(None, (base, self.layers)))
            found.append(f"{type(model).__name__} has no layers at {missing!r}")
        else:
            root = ".".join(filter(None, (base, path)))
            found += [
                f"layer {index} has no attention at {self.attention!r}"
                for index, layer in enumerate(model.get_submodule(root).children())
                if path_in(layer, self.attention) is None
            ]
        config = getattr(_at(model, base) or model, "config", None)
        found += [
            f"config.{field}={value!r} is not supported: {reason}"
            for field, value, reason in self.unsupported
            if getattr(config, field, None) == value
        ]
        return found


def path_in(root: nn.Module | None, paths: str) -> str | None:
    """The first of the alternatives "a|b" that leads to a module below ``root``, if any."""
    return next((path for path in paths.split("|") if root and _at(root, path)), None)


def _at(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None
