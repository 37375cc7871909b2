"""Finds out how a transformers model rotates keys by their positions: by measurement, not by name.

Rows of one token each, at different positions, see nothing but themselves. So all that a position
may change in any layer is the rotation of its key, and the cache shows it.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from adaptive.layers.rotation import Rotation

NEAR = (0, 1, 7)
"""Positions that every model was made for."""

FAR = 2**17
"""A text length beyond the context of a model that does not tell its own."""

TOKENS = 4
ROUNDINGS = 8


def measure(
    root: nn.Module, base: str, names: Sequence[str], layers: Sequence[int]
) -> tuple[dict[int, Rotation], str | None]:
    """Return how some layers rotate their keys, or why that is not known.

    Runs the model on a few single tokens, three times, and leaves it as it was.

    Args:
        root: A ``PreTrainedModel`` that is not patched.
        base: Dotted name of the module that holds the layers.
        names: Of the attention modules.
        layers: Numbers of those that matter.

    Returns:
        The rotation of each of ``layers``, but for those that give keys no position; and what is
        in the way, None if nothing is.
    """
    model: Any = root.get_submodule(base)
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}, f"{type(model).__name__} takes no position_ids"
    known = _frequencies(model)
    if not known:
        return {}, "no module of it has the frequencies of a rotary embedding (a buffer 'inv_freq')"
    near = _keys(root, model, NEAR)
    if not near:
        return (
            {},
            f"{type(model).__name__} kept no keys, as in training with gradient checkpointing",
        )
    candidates = _candidates(known)  # layers that rotate alike share one
    found = {}
    for layer in layers:
        if _still(near[layer]):
            continue
        fitting = [each for each in candidates if _fits(each, near[layer], NEAR)]
        if not fitting:
            also = "; call model.eval() first, dropout may be why" if root.training else ""
            return {}, (
                f"the keys of {names[layer]} at two positions differ by more than a rotation by "
                f"frequencies that the model has{also}"
            )
        found[layer] = fitting
    if not found:
        return {}, "none of these layers rotates its keys"
    # Beyond its context a model may recompute its frequencies, and keep them until a short text
    # comes: that is what the last pass is for.
    beyond = 2 * int(getattr(model.config, "max_position_embeddings", None) or FAR)
    places = tuple(beyond + place for place in NEAR)
    far = _keys(root, model, places)
    _keys(root, model, NEAR)
    chosen = {}
    for layer, fitting in found.items():
        keys = torch.cat([near[layer][:1], far[layer]])
        fitting = [each for each in fitting if _fits(each, keys, (0, *places))]
        if not fitting:
            return {}, (
                f"the frequencies of {names[layer]} depend on the length of the text (dynamic or "
                "long RoPE), so keys that are cached cannot be turned"
            )
        chosen[layer] = fitting[0]
    return chosen, None


def _frequencies(model: nn.Module) -> list[Tensor]:
    """Copies of all frequencies that some module of the model has, each once."""
    found: list[Tensor] = []
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dim() == 1 and buffer.is_floating_point():
            one = buffer.detach().float().cpu().clone()
            if not any(torch.equal(one, other) for other in found):
                found.append(one)
    return found


def _candidates(known: Sequence[Tensor]) -> list[Rotation]:
    return [Rotation(one, interleaved) for one in known for interleaved in (False, True)]


@torch.no_grad()
def _keys(root: Any, model: Any, places: Sequence[int]) -> list[Tensor]:
    """Keys of the same tokens at several positions, as cached by each layer.

    Returns:
        For each layer ``[places, tokens, kv_heads, head_dim]``, on the CPU; nothing if some layer
        has kept none.
    """
    table = root.get_input_embeddings().weight
    tokens = torch.linspace(0, table.shape[0] - 1, TOKENS, device=table.device).long()
    positions = torch.tensor(places, device=table.device).repeat_interleave(len(tokens))
    cache = DynamicCache(config=model.config)
    model(
        input_ids=tokens.repeat(len(places))[:, None],
        position_ids=positions[:, None],
        past_key_values=cache,
        use_cache=True,
    )
    layers: Any = cache.layers
    if not layers or any(layer.keys is None for layer in layers):
        return []
    return [layer.keys[:, :, -1].unflatten(0, (len(places), -1)).cpu() for layer in layers]


def _still(keys: Tensor) -> bool:
    """Whether a layer's keys are the same at all positions."""
    return _close(keys[0].float(), keys[1:], 0)


def _fits(rotation: Rotation, keys: Tensor, places: Sequence[int]) -> bool:
    """Whether a layer's keys at ``places``, the first of them 0, are rotations of the first."""
    if 2 * len(rotation.frequencies) > keys.shape[3]:
        return False
    return all(
        _close(rotation.turn(keys[:1], rotation.angles(torch.tensor([[place]])))[0], keys[i], place)
        for i, place in enumerate(places)
    )


def _close(ours: Tensor, keys: Tensor, place: int) -> bool:
    """Whether keys are the same up to the rounding of keys and of angles, feature by feature."""
    sizes = keys.float().abs().flatten(0, -2).amax(0)
    sizes = torch.maximum(sizes, ours.abs().flatten(0, -2).amax(0))
    sizes = sizes + torch.finfo(keys.dtype).eps * sizes.amax()
    bound = ROUNDINGS * torch.finfo(keys.dtype).eps + place * torch.finfo(torch.float32).eps
    return bool(((keys.float() - ours).abs() <= bound * sizes).all())
