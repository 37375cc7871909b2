"""Compares a patched model with its own stock path, token by token, on real input."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.layers.evaluating import evaluating

_SET_HERE = (
    "cache_position",
    "labels",
    "past_key_values",
    "position_ids",
    "return_dict",
    "use_cache",
)
"""Arguments of a decoder's forward that `verify` sets itself, or that have no meaning in steps."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How far the patched model is from the stock one. Prints as one line.

    Attributes:
        max_logit_error: Largest absolute difference of a logit, over all steps; of an output, for a
            model without logits.
        max_logit: Largest absolute stock logit, the scale for it.
        token_agreement: Share of tokens, over rows and steps, that greedy decoding chose alike.
        tokens: How many tokens that is a share of; 0 for a model without tokens.
        first_disagreement: The first step with a different token, counted from 0; None: none.
        kind: What was chosen: "greedy tokens", or "largest logits" of an encoder, per token or row.
    """

    max_logit_error: float
    max_logit: float
    token_agreement: float
    tokens: int
    first_disagreement: int | None
    kind: str = "greedy tokens"

    def __str__(self) -> str:
        """Return the comparison in one line."""
        logits = f"max logit error {self.max_logit_error:.3g} (logits up to {self.max_logit:.3g})"
        if not self.tokens:
            return logits
        first = self.first_disagreement
        where = "" if first is None else f", first at step {first}"
        return f"{self.token_agreement:.1%} of {self.tokens} {self.kind} agree{where}; {logits}"


def verify(
    model: nn.Module,
    disabled: Callable[[], AbstractContextManager[Any]],
    inputs: Mapping[str, Any] | Tensor,
    new_tokens: int,
) -> Verification:
    """Run ``model`` stock, inside ``disabled()``, and patched; see `Patched.verify`."""
    if not isinstance(new_tokens, int):
        raise TypeError(f"adaptive: new_tokens must be an int, got {type(new_tokens).__name__}")
    if new_tokens < 1:
        raise ValueError(f"adaptive: new_tokens must be at least 1, got {new_tokens}")
    given = _arguments(model, inputs)
    with evaluating(model), torch.no_grad():
        if "input_ids" not in given:
            return _compare_outputs(model, disabled, given)
        with disabled():
            stock, chosen, headed = _decode(model, given, new_tokens, None)
        ours, *_ = _decode(model, given, new_tokens, chosen)
    if not headed:
        return _outputs_compared(stock, ours)
    agree = torch.stack([(a.argmax(-1) == b.argmax(-1)) for a, b in zip(stock, ours, strict=True)])
    wrong = (~agree).any(dim=1).nonzero()
    return Verification(
        max_logit_error=_error(stock, ours),
        max_logit=max(float(logits.abs().max()) for logits in stock),
        token_agreement=float(agree.float().mean()),
        tokens=agree.numel(),
        first_disagreement=int(wrong[0]) if len(wrong) else None,
    )


def verify_encoder(
    model: nn.Module,
    disabled: Callable[[], AbstractContextManager[Any]],
    inputs: Mapping[str, Any] | Tensor,
) -> Verification:
    """Run an encoder once stock, inside ``disabled()``, and once patched; see `Patched.verify`."""
    given = _arguments(model, inputs)
    with evaluating(model), torch.no_grad():
        with disabled():
            stock = model(**given)
        ours = model(**given)
    mask = given.get("attention_mask")
    before, after = ([_without_padding(t, mask) for t in _tensors(o)] for o in (stock, ours))
    found = _outputs_compared(before, after)
    if not isinstance(stock, Mapping) or "logits" not in stock:
        return found
    chosen = [_without_padding(out["logits"], mask).argmax(-1) for out in (stock, ours)]
    agree = (chosen[0] == chosen[1]).float()
    return replace(
        found, token_agreement=float(agree.mean()), tokens=agree.numel(), kind="largest logits"
    )


def _without_padding(output: Tensor, mask: Any) -> Tensor:
    """Outputs of the tokens that ``mask``, ``[batch, tokens]``, keeps, if it is one per token."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or output.shape[:2] != mask.shape:  # noqa: PLR2004
        return output
    return output[mask.bool()]


def _arguments(model: nn.Module, inputs: Mapping[str, Any] | Tensor) -> dict[str, Any]:
    """Return ``inputs`` as keyword arguments of the model's forward, all of them checked by name.

    The forward of the class: that of the instance may be ours, and take anything.
    """
    parameters = inspect.signature(type(model).forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    taken = [n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    taken = taken[1:]
    wanted = f"the keyword arguments of {type(model).__name__}.forward ({', '.join(taken)})"
    if isinstance(inputs, Tensor):
        if "input_ids" not in taken and not anything:
            raise TypeError(f"adaptive: inputs must be a dict of {wanted}, got a Tensor")
        inputs = {"input_ids": inputs}
    elif not isinstance(inputs, Mapping):
        kind = type(inputs).__name__
        raise TypeError(f"adaptive: inputs must be a Tensor or a dict of {wanted}, got {kind}")
    given = {name: value for name, value in inputs.items() if value is not None}
    unknown = [] if anything else [name for name in given if name not in taken]
    if unknown:
        raise TypeError(f"adaptive: inputs must be {wanted}, got {unknown[0]!r}")
    if "input_ids" not in given:
        return given
    refused = sorted(given.keys() & set(_SET_HERE))
    if refused:
        raise ValueError(
            f"adaptive: inputs must not have {refused[0]!r}, which verify sets itself, step by "
            f"step, got {', '.join(given)}"
        )
    ids = given["input_ids"]
    if not isinstance(ids, Tensor):
        raise TypeError(f"adaptive: input_ids must be a Tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int32, torch.int64) or ids.dim() != 2 or not ids.numel():  # noqa: PLR2004
        raise ValueError(
            "adaptive: input_ids must be whole numbers [batch, tokens], at least one token, "
            f"got {ids.dtype} {list(ids.shape)}"
        )
    return given


def _decode(
    model: nn.Module, inputs: dict[str, Any], steps: int, forced: list[Tensor] | None
) -> tuple[list[Tensor], list[Tensor], bool]:
    """Prefill, then decode greedily, or along ``forced`` tokens.

    A model without a head chooses no tokens: it gets those of the prompt once more.

    Returns:
        For each step the logits of the next token, ``[batch, vocabulary]`` in float32 (the hidden
        state, ``[batch, width]``, without a head), and the token that was appended, ``[batch, 1]``;
        and whether there is a head.
    """
    accepted = inspect.signature(model.forward).parameters
    ids = prompt = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    extra = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = 1
    logits, tokens = [], []
    cache = None
    headed = True
    for step in range(steps):
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        cache = out.past_key_values
        headed = "logits" in out
        logits.append((out.logits if headed else out.last_hidden_state)[:, -1].float())
        if forced is not None:
            ids = forced[step]
        elif headed:
            ids = logits[-1].argmax(-1, keepdim=True)
        else:
            ids = prompt[:, step % prompt.shape[1], None]
        tokens.append(ids)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return logits, tokens, headed


def _compare_outputs(
    model: nn.Module,
    disabled: Callable[[], AbstractContextManager[Any]],
    inputs: dict[str, Any],
) -> Verification:
    with disabled():
        stock = _tensors(model(**inputs))
    ours = _tensors(model(**inputs))
    return _outputs_compared(stock, ours)


def _outputs_compared(stock: list[Tensor], ours: list[Tensor]) -> Verification:
    return Verification(
        max_logit_error=_error(stock, ours),
        max_logit=max((float(t.abs().max()) for t in stock if t.numel()), default=0.0),
        token_agreement=1.0,
        tokens=0,
        first_disagreement=None,
    )


def _tensors(output: Any) -> list[Tensor]:
    """All floating tensors of a model's output, in order."""
    if isinstance(output, Tensor):
        return [output.float()] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = output.values()
    elif not isinstance(output, (tuple, list)):
        return []
    return [tensor for part in output for tensor in _tensors(part)]


def _error(stock: list[Tensor], ours: list[Tensor]) -> float:
    """Largest absolute difference; infinity where one is not a number and the other is."""
    worst = 0.0
    for a, b in zip(stock, ours, strict=True):
        same = (a == b) | (a.isnan() & b.isnan())
        difference = (a - b).abs().masked_fill(same, 0.0).nan_to_num(nan=torch.inf)
        worst = max(worst, float(difference.max()) if difference.numel() else 0.0)
    return worst
