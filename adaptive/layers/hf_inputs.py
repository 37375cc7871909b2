"""What `generate` hands to a decoding loop: the cache and the mask, or why the loop cannot run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from adaptive.layers.hf_cache import AdaptiveCacheLayer

_KNOWN = {
    "attention_mask",
    "cache_position",
    "logits_to_keep",
    "past_key_values",
    "position_ids",
    "use_cache",
}


def cache_and_mask(
    policy: str, input_ids: Tensor, model_kwargs: dict[str, Any], synced_gpus: bool
) -> tuple[Cache, Tensor | None]:
    """Return the cache, and which slots hold tokens, ``[batch, slots]``; None: all do.

    Args:
        policy: Name of the policy, for errors.
        input_ids: The prompt.
        model_kwargs: As `generate` prepared them; what has no meaning here is refused.
        synced_gpus: Refused if True: ranks would make different numbers of passes.

    Raises:
        NotImplementedError: The call asks for what the loop cannot do, named.
    """
    cache = model_kwargs.get("past_key_values")
    unknown = sorted(k for k, v in model_kwargs.items() if k not in _KNOWN and v is not None)
    problem = _why_no_cache(cache)
    if synced_gpus:
        problem = "synced_gpus=True would need the same number of passes on every GPU"
    if unknown:
        problem = f"model arguments {', '.join(unknown)} are not supported"
    if input_ids.shape[1] == 0:
        problem = "it needs input_ids; inputs_embeds alone are not supported"
    elif _moves_tokens(model_kwargs, input_ids.shape[1]):
        problem = "position_ids must count the tokens that attention_mask holds"
    if problem:
        raise NotImplementedError(f"adaptive: {policy}: {problem}")
    assert cache is not None
    mask: Tensor | None = model_kwargs.get("attention_mask")
    return cache, None if mask is None or bool(mask.all()) else mask.long()


def _moves_tokens(model_kwargs: dict[str, Any], tokens: int) -> bool:
    """Whether the caller gives tokens other positions than their places, padding left out."""
    given, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    if given is None:
        return False
    if mask is None:
        mask = torch.ones(1, tokens, dtype=torch.long, device=given.device)
    places = (mask.cumsum(-1) - 1)[:, -given.shape[-1] :]
    held = mask[:, -given.shape[-1] :].bool()
    return bool(((given != places) & held).any())


def refuse_moving_angles(
    policy: str, config: Any, input_ids: Tensor, mask: Tensor | None, most: int
) -> None:
    """Raise if some tokens would be rotated by other angles than in plain decoding.

    Two kinds of rotary embeddings turn a token by angles that depend on the last position of its
    pass. In a pass for several tokens those are not the angles that each gets in a pass of its own.

    Args:
        policy: Name of the policy, for errors.
        config: Of the model.
        input_ids: The prompt, ``[batch, tokens]``.
        mask: Which slots hold tokens, ``[batch, tokens]``; None: all do.
        most: The most tokens that a row may come to, padding included.

    Raises:
        NotImplementedError: They might, for so many tokens.
    """
    tokens = input_ids.shape[1]
    longest = tokens if mask is None else int(mask.sum(-1).max())
    most -= tokens - longest
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for rope in (given, *(each for each in given.values() if isinstance(each, dict))):
        kind = rope.get("rope_type", rope.get("type"))
        limit = config.max_position_embeddings
        if kind == "longrope":  # one set of angles up to there, and another for all that is longer
            of_model = getattr(config, "original_max_position_embeddings", None)
            limit = rope.get("original_max_position_embeddings", of_model or limit)
        if (kind == "longrope" and longest <= limit < most) or (kind == "dynamic" and limit < most):
            raise NotImplementedError(
                f"adaptive: {policy}: prompt and new tokens must stay within {limit} tokens, got "
                f"up to {most}: angles of rope_type={kind!r} depend on the longest of a pass; use "
                "`with patched.disabled():` for that call"
            )


def _why_no_cache(cache: object) -> str | None:
    """Say why tokens cannot be taken back from a cache; None if they can."""
    if not isinstance(cache, Cache):
        return "it needs use_cache=True"
    if getattr(cache, "offloading", False):
        return "an offloaded cache cannot be taken back from"
    layers: Sequence[Any] = cache.layers
    for layer in layers:
        if isinstance(layer, AdaptiveCacheLayer):
            continue
        if type(layer) is DynamicLayer and layer.get_seq_length() == 0:
            continue  # it is taken over when the prompt runs
        if type(layer) is DynamicSlidingWindowLayer and layer.get_seq_length() == 0:
            continue
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            return "the cache holds tokens of a pass without this patch; start with a new one"
        return f"tokens cannot be taken back from a {type(layer).__name__}; use a DynamicCache"
    return None
