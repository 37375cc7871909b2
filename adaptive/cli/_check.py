"""``check``: build the model of a configuration without its weights and ask ``adaptive.check``."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import nn

import adaptive
from adaptive.adapters import FAMILIES, EncoderFamily
from adaptive.cli._console import UsageError


@dataclass(frozen=True)
class Outcome:
    """What ``adaptive.check`` said about a model, and how that model was found."""

    source: str
    model_class: str
    support: Any

    @property
    def ok(self) -> bool:
        """Whether the model can be patched."""
        return bool(self.support.ok)

    def show(self, console: Console) -> None:
        """Print the answer."""
        console.print(f"[bold]{self.model_class}[/] from {escape(self.source)}", highlight=False)
        console.print(str(self.support), markup=False, highlight=False)


def run(model: str, dtype: str) -> Outcome:
    """Check the model folder or model type ``model`` for exact acceleration.

    Raises:
        UsageError: ``model`` is neither, transformers is missing, or it cannot build the model.
    """
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            "`check` builds models with transformers, which is not installed: "
            "pip install 'adaptive[hf]'"
        ) from error
    transformers.logging.set_verbosity_error()
    source, config = _config(model)
    built = _build(config, getattr(torch, dtype))
    return Outcome(source, type(built).__name__, adaptive.check(built))


def to_dict(outcome: Outcome) -> dict[str, Any]:
    """Return the answer as JSON values."""
    return {
        "source": outcome.source,
        "model_class": outcome.model_class,
        "ok": outcome.ok,
        "have": [str(line) for line in outcome.support.have],
        "problems": [str(line) for line in outcome.support.problems],
        "advice": [str(line) for line in outcome.support.advice],
    }


def _config(model: str) -> tuple[str, Any]:
    """Return where the configuration came from, and the configuration."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"{folder} holds no config.json; give the folder of one model")
        try:
            return str(folder), AutoConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # a wrong field can raise anything in there
            raise UsageError(f"{folder / 'config.json'} cannot be read: {_said(error)}") from error
    known = sorted(CONFIG_MAPPING.keys())
    if model in known:
        return f"the default configuration of {model!r}", AutoConfig.for_model(model)
    if folder.is_absolute() or model.startswith("."):
        raise UsageError(f"{folder} is not a folder; give one with a config.json, or a model type")
    if "/" in model:
        raise UsageError(
            f"{model} is not a folder. Models are not downloaded here: fetch it first "
            f"(hf download {model} config.json --local-dir DIR), then check DIR"
        )
    close = difflib.get_close_matches(model.lower(), known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "examples: llama, qwen3, gpt_neox"
    raise UsageError(f"{model!r} is neither a folder nor a model type of transformers; {hint}")


def _build(config: Any, dtype: torch.dtype) -> nn.Module:
    """Return the model with its real shapes and no contents.

    Built on the meta device; then every tensor becomes one number, seen through strides of zero.
    So a model of any size costs nothing.
    """
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    known = FAMILIES.get(config.model_type)
    kind: Any = AutoModel if isinstance(known, EncoderFamily) else AutoModelForCausalLM
    if kind is AutoModelForCausalLM and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(
            f"transformers has no causal language model of type {config.model_type!r}; encoders, "
            "encoder-decoders and models of images or sound do not decode this way"
        )
    try:
        with torch.device("meta"):
            model = kind.from_config(config, dtype=dtype)
    except Exception as error:  # as above
        raise UsageError(f"transformers cannot build a model of it: {_said(error)}") from error
    built: nn.Module = model._apply(lambda t: torch.zeros((), dtype=t.dtype).expand(t.shape))
    return built.eval()


def _said(error: Exception) -> str:
    """What kind of error it is, and what it says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
