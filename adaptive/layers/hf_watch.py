"""Watches the attention of a transformers model during a pass, without changing what it computes.

Two names are registered with transformers for it and stay known, as those of `hf_attention`; they
run the stock function, and show query and key to whoever watches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from adaptive.layers.changes import ChangeLog
from adaptive.layers.hf_call import Attended, stock_function
from adaptive.layers.hf_config import ask_for
from adaptive.layers.survey import Site, Survey

WATCHER = "_adaptive_watcher"
"""Key of the Watcher and the layer's number in the ``__dict__`` of each attention module."""

NAMES = {"sdpa": "adaptive_watch", "eager": "adaptive_watch_eager"}
"""The name that takes the place of each stock implementation."""


class Watcher(Protocol):
    """What wants to see the attention of a model."""

    def attention(
        self, layer: int, query: Tensor, key: Tensor, scale: float | None, softcap: float
    ) -> None:
        """See one call.

        Args:
            layer: Number of the layer.
            query: ``[batch, heads, tokens, head_dim]``, positions encoded.
            key: ``[batch, kv_heads, tokens, head_dim]``.
            scale: Factor on the scores; None: ``1 / sqrt(head_dim)``.
            softcap: Bound of the scores; 0: none.
        """

    def hidden(self, layer: int, before: Tensor, after: Tensor) -> None:
        """See the residual stream around one decoder layer, ``[batch, tokens, width]``."""


@contextmanager
def watching(root: nn.Module, survey: Survey, watcher: Watcher) -> Iterator[nn.Module]:
    """Show ``watcher`` all attention inside the block; yields the base module, to be called.

    Afterwards, after errors too, the model is as it was.

    Args:
        root: A ``PreTrainedModel`` that can be patched and is not.
        survey: Of it.
        watcher: Is called in the order of the layers, under whatever gradient mode the caller set.
    """
    config: Any = root.config
    implementation = config._attn_implementation
    _register()
    log = ChangeLog()
    handles = []
    try:
        for site in survey.sites:
            log.set(root, site.name, WATCHER, (watcher, site.layer))
            layer = root.get_submodule(_decoder_layer(root, survey, site))
            handles.append(layer.register_forward_hook(_Hidden(watcher, site.layer), **_KWARGS))
        ask_for(root, log, NAMES[implementation])
        yield root.get_submodule(survey.base)
    finally:
        for handle in handles:
            handle.remove()
        log.undo(root)


_KWARGS = {"with_kwargs": True}


class _Hidden:
    """A forward hook of one decoder layer."""

    def __init__(self, watcher: Watcher, layer: int) -> None:
        self._watcher, self._layer = watcher, layer

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output if isinstance(output, Tensor) else output[0]
        self._watcher.hidden(self._layer, before, after)


def _decoder_layer(root: nn.Module, survey: Survey, site: Site) -> str:
    """The longest name above the attention module that ends in a number: an item of a list."""
    parts = site.name.split(".")
    while parts and not parts[-1].isdecimal():
        parts.pop()
    return ".".join(parts)


def _register() -> None:
    for kind, (attention, mask) in {
        "sdpa": (_watched, _mask),
        "eager": (_watched_eager, _eager_mask),
    }.items():
        AttentionInterface.register(NAMES[kind], attention)
        AttentionMaskInterface.register(NAMES[kind], mask)


def _mask(*args: Any, **kwargs: Any) -> Any:
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


def _eager_mask(*args: Any, **kwargs: Any) -> Any:
    return ALL_MASK_ATTENTION_FUNCTIONS["eager"](*args, **kwargs)


def _watched(module: nn.Module, *args: Any, **kwargs: Any) -> Attended:
    _show(module, *args, **kwargs)
    return stock_function(module, "sdpa")(module, *args, **kwargs)


def _watched_eager(module: nn.Module, *args: Any, **kwargs: Any) -> Attended:
    _show(module, *args, **kwargs)
    return stock_function(module, "eager")(module, *args, **kwargs)


def _show(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> None:
    watcher, layer = module.__dict__[WATCHER]
    watcher.attention(layer, query, key, scaling, kwargs.get("softcap") or 0.0)
