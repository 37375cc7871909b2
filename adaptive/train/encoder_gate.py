"""encoder_gate(model, batches): learns to tell from a sequence's embeddings how deep it must go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptive.adapters import EncoderFamily, family_for
from adaptive.errors import PatchConflict, UnsupportedModel
from adaptive.layers.changes import ChangeLog
from adaptive.layers.depth import Depth, LayerForward
from adaptive.layers.evaluating import evaluating
from adaptive.layers.pooling import pool_weights, pooled
from adaptive.layers.state import RECORD
from adaptive.policy import EncoderGate
from adaptive.policy.encoder_gate import POOLS

DECAY = 1e-3
"""Weight of the squared weights in the loss: few sequences must not be learned by heart."""

_ITERATIONS = 200


def encoder_gate(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    layers: Sequence[int],
    tolerance: float = 0.02,
    pool: str = "mean",
) -> EncoderGate:
    """Fit a gate for `adaptive.EncoderExit` to an encoder, whose weights stay as they are.

    Each sequence is labelled with the least of the ``layers`` after which its pooled output has a
    cosine of at least ``1 - tolerance`` with that of all layers, or with all layers. The gate is
    the logistic regression of the labels on the pooled embeddings, before the first layer, after
    ECO-M2F (Yao et al. 2024, arXiv:2404.15244), where a gate of this kind reads image features.

    The outputs are those of the model without its head, its last norm included. Every batch runs
    through all layers once, without gradients and in eval mode; afterwards the model is as before.

    Args:
        model: An encoder of transformers of a known family, not patched, on any device.
        batches: Token ids ``[batch, tokens]``, or mappings with what the encoder is called with,
            such as "input_ids" and "attention_mask" ``[batch, tokens]``, or "pixel_values".
        layers: Depths at which sequences may leave, ascending, below the model's layers.
        tolerance: How far from 1 the cosine may be; in (0, 2).
        pool: "mean" of the tokens without padding, or the "first".

    Raises:
        TypeError: ``model`` is no module, or a batch no tensor or mapping.
        UnknownFamily, UnsupportedModel: It is no encoder of a known family.
        PatchConflict: It is patched.
        ValueError: An argument is out of range, or there is no batch.
    """
    base, names = _encoder(model)
    depths = _depths(layers, len(names))
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float):
        raise TypeError(f"adaptive: tolerance must be a number, got {tolerance!r}")
    if not 0 < tolerance < 2:  # noqa: PLR2004 (cosines are from -1 to 1)
        raise ValueError(f"adaptive: tolerance must be above 0 and below 2, got {tolerance}")
    if pool not in POOLS:
        raise ValueError(f"adaptive: pool must be one of {', '.join(POOLS)}, got {pool!r}")
    seen = []
    first = model.get_submodule(names[0])
    log = ChangeLog()
    with evaluating(model), torch.no_grad():
        try:
            part = Depth(layers=len(names), end=len(names))
            for index, name in enumerate(names):
                forward = LayerForward(model.get_submodule(name), index, part)
                log.set(model, name, "forward", forward)
            for batch in batches:
                seen.append(_examine(base, first, part, batch, depths, pool))
        finally:
            log.undo(model)
    if not seen:
        raise ValueError("adaptive: batches must hold a batch, got none")
    features = torch.cat([features for features, _ in seen])
    cosines = torch.cat([cosines for _, cosines in seen], dim=1)
    enough = functional.pad(cosines >= 1 - tolerance, (0, 0, 0, 1), value=True)
    weight, bias = _fit(features, enough.int().argmax(0), len(depths) + 1)
    return EncoderGate(
        layers=depths,
        weight=tuple(map(tuple, weight.tolist())),
        bias=tuple(bias.tolist()),
        pool=pool,
    )


def _examine(
    base: nn.Module,
    first: nn.Module,
    part: Depth,
    batch: Tensor | Mapping[str, Any],
    depths: Sequence[int],
    pool: str,
) -> tuple[Tensor, Tensor]:
    """Return pooled embeddings ``[batch, width]`` and cosines ``[exits, batch]`` of one batch.

    The model is run up to the first exit, from there to the second, and so on: each time what
    follows the layers is its own code.
    """
    if not isinstance(batch, Tensor | Mapping):
        kind = type(batch).__name__
        raise TypeError(f"adaptive: batches must hold tensors or mappings, got {kind}")
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    device = next(base.parameters()).device
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
    if first.__dict__["forward"].parts is None:
        base(**given)  # layers that do not run must know whether they return tuples
    entered: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])

    handle = first.register_forward_pre_hook(note, with_kwargs=True)
    try:
        outputs, state, begin = [], None, 0
        for end in (*depths, part.layers):
            with part.run(begin, end, state):
                outputs.append(base(**given)[0])
            state, begin = part.take(), end
    finally:
        handle.remove()
    weights = pool_weights(entered[0], given.get("attention_mask"), pool)
    vectors = [pooled(output, weights) for output in outputs]
    cosines = [torch.cosine_similarity(vector, vectors[-1], dim=-1) for vector in vectors[:-1]]
    real = weights.sum(1) > 0  # rows of padding alone teach nothing
    return pooled(entered[0], weights)[real].cpu(), torch.stack(cosines)[:, real].cpu()


def _fit(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return weights ``[classes, width]`` and biases of the logistic regression, float32."""
    x = features.double()
    mean, spread = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    x = (x - mean) / spread
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(x @ weight.T + bias, labels)
        value = value + DECAY * weight.square().sum() / 2
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    # The scale of the embeddings goes into the weights: the gate reads them as they are.
    scaled = (weight / spread).detach()
    return scaled.float(), (bias.detach() - scaled @ mean).float()


def _encoder(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the module that holds the layers, and the names of the layers below ``model``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"adaptive: model must be an nn.Module, got {type(model).__name__}")
    if any(RECORD in module.__dict__ for module in model.modules()):
        raise PatchConflict("adaptive: the model is patched; unpatch() it to fit a gate")
    family = family_for(model)
    if not isinstance(family, EncoderFamily):
        raise UnsupportedModel(f"adaptive: {type(model).__name__} is no encoder")
    problems = family.problems(model)
    if problems:
        raise UnsupportedModel("adaptive: " + "\n".join(problems))
    return model.get_submodule(family.base_name(model)), tuple(family.layer_names(model))


def _depths(layers: Sequence[int], most: int) -> tuple[int, ...]:
    whole = isinstance(layers, list | tuple) and all(type(depth) is int for depth in layers)
    ascending = whole and len(layers) > 0 and list(layers) == sorted(set(layers))
    if ascending and layers[0] >= 1 and layers[-1] < most:
        return tuple(layers)
    raise ValueError(
        f"adaptive: layers must be ascending depths from 1 to {most - 1}, got {layers!r}"
    )
