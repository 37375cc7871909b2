"""calibrate(model, policies): finds select layers and retrieval heads, without data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from adaptive.calibrate_heads import HeadScores, choose_heads
from adaptive.calibrate_layers import Similarity, choose_layers
from adaptive.calibrate_run import LEAST_TOKENS, Run, prompts, repeated_tokens, run
from adaptive.errors import UnsupportedModel
from adaptive.layers.fingerprint import fingerprint
from adaptive.layers.survey import Survey
from adaptive.patch import examine
from adaptive.policy import Plan, Policy, RazorAttention, TidalDecode

SELECT_LAYERS = 2
"""Layers that select if the policy names none."""


def calibrate(
    model: nn.Module,
    policies: Policy | Sequence[Policy],
    batches: Iterable[Tensor | Mapping[str, Any]] | None = None,
    *,
    tokens: int = 4096,
    progress: bool = True,
) -> Plan:
    """Measure what sparse policies need to know about ``model``, and return the plan for it.

    Without data: random tokens, repeated four times, show which heads look for earlier copies, and
    which layers agree on the keys that matter. The model runs once, as it is, and is afterwards as
    before, bit for bit. The weights of all queries over all keys never exist at once.

    - `TidalDecode` gets its select layers: as many as ``select_layers`` names, otherwise two, but
      always fewer than may skip keys. The first is the first layer that may.
    - `RazorAttention` gets its heads: of those in layers that may skip keys the share ``induction``
      with the best induction scores and the share ``echo`` with the best echo scores, rounded up.
    - Other policies stay as they are.

    Args:
        model: A decoder of transformers of a known family, not patched, in eval mode.
        policies: One policy, or several in the order in which `patch` would get them.
        batches: Prompts without padding for TidalDecode, instead of random tokens: token ids
            ``[batch, tokens]``, or mappings with "input_ids".
        tokens: Length of the random prompt, at least 32; less if the model has fewer positions.
        progress: Whether to show a bar, if stderr is a terminal, after two seconds.

    Returns:
        The plan, for `patch`, with the fingerprint of the weights, and as ``scores`` what was
        measured: "similarity" ``[layers, layers]`` and "importance" ``[layers]``, "echo" and
        "induction" ``[layers, kv_heads]``.

    Raises:
        UnknownFamily, UnsupportedModel, PatchConflict: As `patch`.
        TypeError: An argument is of the wrong type.
        ValueError: A policy does not fit the model, a prompt is too short or padded, or the model
            is in training mode.
    """
    given = tuple(policies) if isinstance(policies, list | tuple) else (policies,)
    if not given:
        raise ValueError("adaptive: policies must name at least one policy, got none")
    root, survey = _survey(model, given)
    if type(tokens) is not int or tokens < LEAST_TOKENS:
        raise ValueError(
            f"adaptive: tokens must be a whole number from {LEAST_TOKENS} on, got {tokens!r}"
        )
    # Whatever is wrong with the policies is said before the model runs.
    dry = [replace(p, heads=()) if isinstance(p, RazorAttention) else p for p in given]
    table = Plan.make(survey.shape, dry)
    tidal = next((policy for policy in given if isinstance(policy, TidalDecode)), None)
    razor = next((policy for policy in given if isinstance(policy, RazorAttention)), None)

    ids, period = repeated_tokens(root, tokens)
    similarity = (
        None if tidal is None else Similarity(tidal.may_select(table), tidal, len(table.rows))
    )
    heads = None if razor is None else HeadScores(survey.shape, period)
    if batches is None:
        runs = [Run(ids, similarity, heads)] if similarity or heads else []
    elif similarity is None:
        raise ValueError(
            "adaptive: batches must be None without TidalDecode: heads are found on random tokens"
        )
    else:
        runs = [Run(prompt, similarity, None) for prompt in prompts(batches)]
        runs += [Run(ids, None, heads)] if heads else []
    run(root, survey, runs, progress)

    scores: dict[str, Tensor] = {}
    found: dict[type[Policy], Policy] = {}
    if tidal is not None and similarity is not None:
        shares, importance = similarity.result()
        scores |= {"similarity": shares, "importance": importance}
        layers = tidal.may_select(table)
        count = min(len(tidal.select_layers or range(SELECT_LAYERS)), len(layers) - 1)
        chosen = choose_layers(shares[layers][:, layers], importance[layers], count)
        found[TidalDecode] = replace(tidal, select_layers=tuple(layers[i] for i in chosen))
    if razor is not None and heads is not None:
        scores |= {"echo": heads.echo, "induction": heads.induction}
        found[RazorAttention] = replace(
            razor, heads=choose_heads(heads.echo, heads.induction, razor, razor.may_drop(table))
        )
    plan = Plan.make(survey.shape, [found.get(type(policy), policy) for policy in given])
    return replace(plan, fingerprint=fingerprint(root, survey.shape), scores=scores or None)


def _survey(model: nn.Module, policies: Sequence[object]) -> tuple[nn.Module, Survey]:
    """Return the model of transformers inside ``model``, and what is there."""
    for policy in policies:
        if not isinstance(policy, Policy):
            raise TypeError(
                f"adaptive: policies must be Policy objects, got {type(policy).__name__}"
            )
    root, survey, support, _ = examine(model, ())
    if support.error is not None:
        raise support.error("adaptive: " + "\n".join((*support.problems, *support.advice)))
    if any(site.kind != "hf" for site in survey.sites):
        raise UnsupportedModel(
            f"adaptive: only decoders of transformers can be calibrated, got {type(model).__name__}"
        )
    if any(module.training for module in root.modules()):
        raise ValueError("adaptive: model must be in eval mode, got one in training mode")
    return root, survey
