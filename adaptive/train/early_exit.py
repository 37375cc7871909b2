"""early_exit(model, batches): trains a causal LM so that its earlier layers predict tokens, too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.progress import ProgressBar
from adaptive.train._batch import read_batch, read_batches
from adaptive.train._checks import causal_lm, check_finite, check_settings
from adaptive.train._exits import held
from adaptive.train._result import EarlyExitTraining
from adaptive.train._schedule import (
    Curriculum,
    Timescale,
    curriculum_mask,
    dropout_probabilities,
    exit_weights,
)

LEARNING_RATE = 5e-5
"""Of the optimizer that is made where none is given."""


def early_exit(  # noqa: PLR0913 (a training has many settings; all but two have a default)
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    steps: int,
    optimizer: torch.optim.Optimizer | None = None,
    learning_rate: float | None = None,
    layer_dropout: float = 0.1,
    exit_scale: float = 0.2,
    curriculum: Curriculum | None = "rotational",
    rotation: int = 8,
    timescale: Timescale = "exponential",
    held_out: Tensor | Mapping[str, Any] | None = None,
    progress: bool = True,
    on_step: Callable[[int, float], object] | None = None,
) -> EarlyExitTraining:
    """Train ``model`` by LayerSkip's recipe, in place: every layer becomes an exit.

    Each step drops layers for some rows of the batch, deeper ones more often, and does not compute
    what it drops. Its loss is a weighted sum of those after several layers, each read out by the
    model's own last norm and head; no parameter is added (Elhoushi et al., arXiv:2404.16710).

    Only parameters that require gradients are trained. The model may be in ``torch.autocast`` of
    the caller, and inside PEFT. What is installed for the training is removed at the end, after
    errors and Ctrl-C too; gradients are None then. Random numbers are torch's: `torch.manual_seed`.

    Args:
        model: A causal LM of transformers of a known family, not patched, on any device.
        batches: Token ids ``[batch, tokens]``, or mappings with "input_ids" and, if wanted,
            "attention_mask", "labels" (-100: not learned) and "position_ids". At least ``steps``.
        steps: Of the optimizer, one per batch.
        optimizer: Over parameters of the model; None: AdamW over all that require gradients.
        learning_rate: Of that AdamW, 5e-5 if None.
        layer_dropout: Probability with which the last layer is dropped in the end; in [0, 1).
        exit_scale: How much the exits before the last count; 0: not at all.
        curriculum: Which exits count at a step: "rotational": every ``rotation``-th, in turns;
            "gradual": from the last layer downward over the first half; None: all, the slowest.
        rotation: Of the rotational curriculum.
        timescale: "exponential": layer dropout begins at 0 and rises over the steps; "constant".
        held_out: Batch on which the exits are measured; None: the first one of ``batches``.
        progress: Whether to show a bar, if stderr is a terminal, after two seconds.
        on_step: Called after each step with its number, from 0, and its loss; the place to step a
            schedule of the learning rate, or to log.

    Returns:
        The losses of all steps, and of every exit before and after.

    Raises:
        UnknownFamily, UnsupportedModel: The model is no causal LM of a known family, or set up in
            a way that cannot be trained here; all by name.
        PatchConflict: It is patched.
        TypeError: An argument or a batch is of the wrong type.
        ValueError: A setting is out of range, a batch does not fit, or there are too few.
        FloatingPointError: A loss or a gradient is not finite. The weights are those before that
            step.
    """
    settings: dict[str, float | int | str | None] = {
        "layer_dropout": layer_dropout,
        "exit_scale": exit_scale,
        "curriculum": curriculum,
        "rotation": rotation,
        "timescale": timescale,
        "learning_rate": learning_rate,
    }
    check_settings({"steps": steps, **settings})
    if optimizer is not None and learning_rate is not None:
        raise ValueError("adaptive: learning_rate must be None beside an optimizer, got both")
    root, family, layers = causal_lm(model, layer_dropout)
    trained = [p for p in root.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("adaptive: model must have a parameter that requires gradients, got none")
    if optimizer is None:
        settings["learning_rate"] = LEARNING_RATE if learning_rate is None else learning_rate
        optimizer = torch.optim.AdamW(trained, lr=settings["learning_rate"])  # type: ignore[arg-type]

    device = root.get_input_embeddings().weight.device  # type: ignore[operator]
    found = read_batches(batches, steps, device)
    first = next(found)
    measured = first if held_out is None else read_batch(held_out, device)
    losses: list[float] = []
    with held(root, family) as exits, ProgressBar("training", steps, progress) as bar:
        try:
            before = exits.losses(measured)
            start = perf_counter()
            for step in range(steps):
                batch = first if step == 0 else next(found)
                chances = dropout_probabilities(
                    step, steps=steps, layers=layers, highest=layer_dropout, timescale=timescale
                )
                mask = curriculum_mask(
                    step, steps=steps, layers=layers, curriculum=curriculum, rotation=rotation
                )
                weights = exit_weights(mask, exit_scale)
                root.zero_grad()
                kept = _draw(chances, len(batch.inputs["input_ids"]))
                each = exits.gradients(batch, weights, kept)
                losses.append(sum(weights[layer] * loss for layer, loss in each.items()))
                check_finite(step, each, trained)
                optimizer.step()
                # The caller's autocast would go on with the casts of the weights before the step.
                torch.clear_autocast_cache()
                bar.step(f"loss {losses[-1]:.3f}")
                if on_step is not None:
                    on_step(step, losses[-1])
            seconds = perf_counter() - start
            after = exits.losses(measured)
        finally:
            root.zero_grad()
    return EarlyExitTraining(
        model=type(root).__name__,
        family=family.name,
        steps=steps,
        seconds=seconds,
        losses=tuple(losses),
        exit_losses_before=tuple(before),
        exit_losses_after=tuple(after),
        settings=settings,
    )


def _draw(chances: Sequence[float], rows: int) -> list[Tensor | None]:
    """Draw for each layer the rows that it runs for; None: all, without a draw if that is sure."""
    kept: list[Tensor | None] = []
    for chance in chances:
        runs = torch.rand(rows) >= chance if chance else None
        kept.append(None if runs is None or bool(runs.all()) else runs.nonzero().flatten())
    return kept
