"""Answers `generate` of a patched transformers model by the policy that has passes of its own."""

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from transformers import StoppingCriteriaList, StopStringCriteria

from adaptive.layers.depth import install as install_depth
from adaptive.layers.exit_log import ExitLog
from adaptive.layers.hf_compiled import refuse_graphs
from adaptive.layers.hf_decoding import Loop, decode_by
from adaptive.layers.hf_exit import exit_early
from adaptive.layers.hf_speculate import speculate
from adaptive.layers.hf_static import speculate_static
from adaptive.layers.skip_search import SkipSearch
from adaptive.layers.speculation_log import SpeculationLog
from adaptive.layers.state import PatchRecord
from adaptive.layers.static_steps import StaticSteps
from adaptive.layers.survey import Survey
from adaptive.layers.token_tree import Successors
from adaptive.policy import EarlyExit, Policy, SelfSpeculative

_MODES = "do_sample=True or False with num_beams=1"
_OTHER_WAYS = {
    "assistant_model": "an assistant model drafts already",
    "prompt_lookup_num_tokens": "prompt lookup drafts already",
    "assistant_early_exit": "assistant_early_exit drafts already",
    "custom_generate": "custom_generate is another way of decoding",
}

_NOT_HANDED_ON = ("streamer", "synced_gpus")
"""What `generate` of transformers 5.23 does not hand to a custom way of decoding."""


class Generate:
    """The `generate` of one patched model, set on the instance.

    It calls the model's own, which prepares inputs, logits processors and stopping criteria, and
    has it decode by `speculate` or `exit_early`. It holds no strong reference, as `LinearForward`.
    """

    def __init__(self, model: nn.Module, policy: Policy) -> None:
        """Know the model and what to do."""
        self._model = weakref.ref(model)
        self.policy = policy
        self._steps = StaticSteps()

    def __getstate__(self) -> tuple[nn.Module | None, Policy]:
        """Let copies and pickles arrive with the copy of the model."""
        return self._model(), self.policy

    def __setstate__(self, state: tuple[nn.Module, Policy]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as `transformers.GenerationMixin.generate` does, and return what it returns.

        Raises:
            NotImplementedError: The call asks for what the policy cannot do, named; or it, or what
                holds attention, is compiled or traced.
            RuntimeError: Another thread is generating with the model.
        """
        model: Any = self._model()
        assert model is not None  # it is what calls
        own = type(model).generate
        if not model.__dict__[_RECORD].enabled:
            return own(model, *args, **kwargs)
        refuse_graphs(f"adaptive: {type(self.policy).__name__}: generate", model)
        kwargs = _by_name(own, model, args, kwargs)
        _refuse_modes(self.policy, model, kwargs)
        options = {name: kwargs[name] for name in _NOT_HANDED_ON if kwargs.get(name) is not None}
        options["keeps_cache"] = kwargs.get("past_key_values") is not None
        options["loop"] = self._loop()
        given = with_stop_strings(model, dict(kwargs))
        given["custom_generate"] = functools.partial(decode_by, **options)
        taken = "tokenizer" in kwargs and "tokenizer" not in given
        depth = model.__dict__[_RECORD].depth
        with depth.owned(type(self.policy).__name__), silenced(model) if taken else nullcontext():
            return own(model, **given)

    def _loop(self) -> Loop:
        """The way of decoding of the policy."""
        policy = self.policy
        if isinstance(policy, EarlyExit):
            return functools.partial(exit_early, policy=policy)
        assert isinstance(policy, SelfSpeculative)  # no other generates
        if policy.static:
            return functools.partial(speculate_static, policy=policy, steps=self._steps)
        return functools.partial(speculate, policy=policy)


_RECORD = "_adaptive_generate"
"""Key of the PatchRecord in the ``__dict__`` of a model whose generate is replaced."""


def install(root: nn.Module, survey: Survey, record: PatchRecord) -> None:
    """Replace `generate`, undoably, if a policy has passes of its own."""
    policy = next((p for p in record.policies if p.generates), None)
    if policy is None:
        return
    attention = tuple(site.name for site in survey.sites)
    skips = isinstance(policy, SelfSpeculative) and policy.skip is not None
    sublayers = (attention, survey.mlps) if skips else ((), ())
    if isinstance(policy, SelfSpeculative) and policy.searches:
        attention_layers, mlp_layers = policy.candidates(record.plan)
        record.skip_search = SkipSearch(attention_layers, mlp_layers, policy.skip_ratio)
    if isinstance(policy, SelfSpeculative) and policy.recycles:
        record.successors = Successors()
    record.depth = install_depth(root, record, survey.layers, sublayers)
    if isinstance(policy, EarlyExit):
        record.exits = ExitLog(layers=len(survey.layers))
    else:
        record.speculation = SpeculationLog()
    record.log.set(root, "", _RECORD, record)
    record.log.set(root, "", "generate", Generate(root, policy))


def _by_name(
    own: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All arguments of a call of `generate` by name, those that were given by position too."""
    signature = inspect.signature(own)
    signature.bind(model, *args, **kwargs)  # raises for too many, or one that is given twice
    names = list(signature.parameters)[1 : 1 + len(args)]
    return {**dict(zip(names, args, strict=True)), **kwargs}


def with_stop_strings(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with ``stop_strings`` made into the criterion that they stand for."""
    tokenizer, config = kwargs.get("tokenizer"), kwargs.get("generation_config")
    strings = kwargs.get("stop_strings")
    for each in (config, model.generation_config):
        strings = getattr(each, "stop_strings", None) if strings is None else strings
    if strings is None or tokenizer is None:
        return kwargs
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, strings)])
    criteria.extend(kwargs.get("stopping_criteria") or [])
    left = {k: v for k, v in kwargs.items() if k not in ("stop_strings", "tokenizer")}
    if config is not None:
        left["generation_config"] = _without_strings(config)
    return {**left, "stopping_criteria": criteria}


def _without_strings(config: Any) -> Any:
    """The configuration, or a copy of it without stop strings."""
    if config is None or getattr(config, "stop_strings", None) is None:
        return config
    config = copy.deepcopy(config)
    config.stop_strings = None
    return config


@contextmanager
def silenced(model: Any) -> Iterator[None]:
    """Keep the stop strings of the model's own configuration from `generate`.

    It would fill them in wherever a call has none, and ask for the tokenizer, which it does not
    hand to a custom way of decoding.
    """
    own = model.generation_config
    model.generation_config = _without_strings(own)
    try:
        yield
    finally:
        model.generation_config = own


def _refuse_modes(policy: Policy, model: Any, kwargs: dict[str, Any]) -> None:
    """Raise if the call asks for another way of decoding than greedy search or sampling."""
    problem = why_not_mode(model, kwargs)
    if problem is not None:
        raise NotImplementedError(
            f"adaptive: {type(policy).__name__}: {problem}; use `with patched.disabled():` for "
            "that call"
        )


def why_not_mode(model: Any, kwargs: dict[str, Any]) -> str | None:
    """Say what of a call is another way of decoding than greedy search or sampling, if anything."""
    config = kwargs.get("generation_config") or model.generation_config

    def asked(name: str, default: Any) -> Any:
        value = kwargs.get(name, getattr(config, name, None))
        return default if value is None else value

    for name, why in _OTHER_WAYS.items():
        if asked(name, None) is not None:
            return f"{name} cannot be used with it: {why}"
    for name, plain in (
        ("num_beams", 1),
        ("num_beam_groups", 1),
        ("penalty_alpha", 0.0),
        ("dola_layers", ""),
        ("constraints", []),
        ("force_words_ids", []),
        ("guidance_scale", 1),
        ("output_scores", False),
        ("output_logits", False),
        ("output_attentions", False),
        ("output_hidden_states", False),
    ):
        value = asked(name, plain)
        if value != plain:
            return f"{name}={value!r} is not supported: {_MODES} is"
    return None
