"""Why a model that is supported cannot do what the policies say."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from adaptive.layers.changes import own_forward
from adaptive.layers.state import ENCODER
from adaptive.layers.survey import Survey
from adaptive.policy import EncoderExit, Plan, Policy, TokenMerging
from adaptive.policy.plan import DENSE, GLOBAL_LOCAL, STOCK


def modes_of(policy: Policy | Plan) -> set[str]:
    """Modes that skip keys: those of a plan, or those that a policy is for."""
    if isinstance(policy, Plan):
        skips = {mode for row in policy.rows for mode in row} - {DENSE, STOCK}
        return skips.union(*(p.modes for p in policy.policies if p.prefill_layers(policy)))
    return set(policy.modes)


def plan_problems(survey: Survey, modes: set[str]) -> list[str]:
    """Why the model cannot do what the plan says."""
    if is_encoder(survey):
        others = ", ".join(sorted(modes - {GLOBAL_LOCAL}))
        return [
            f"modes that skip keys while decoding ({others}) do not fit: an encoder has no "
            "decoding; GlobalLocalAttention is for encoders"
        ] * bool(others)
    if GLOBAL_LOCAL in modes:
        return [
            "GlobalLocalAttention does not fit: its tokens see both ways, and those of a decoder "
            "must not; LocalAttention is for decoders"
        ]
    if modes and any(site.kind != "hf" for site in survey.sites):
        return [
            f"modes that skip keys ({', '.join(sorted(modes))}) need a decoder of transformers and "
            "its cache; plain PyTorch modules can only be exact"
        ]
    return []


def generation_problems(
    root: nn.Module, survey: Survey, policies: Sequence[Policy | Plan]
) -> list[str]:
    """Why the model cannot generate as the policies say."""
    found = []
    every = [p for each in policies for p in (each.policies if isinstance(each, Plan) else (each,))]
    for policy in every:
        if isinstance(policy, EncoderExit):
            found += _layer_problems(root, survey, "EncoderExit")
        if isinstance(policy, TokenMerging):
            found += _layer_problems(root, survey, "TokenMerging")
            found += _place_problems(survey)
        if not policy.generates:
            continue
        name = type(policy).__name__
        if not survey.layers or is_encoder(survey):
            found.append(f"{name} does not fit: it needs a decoder of transformers")
        elif not survey.base or not hasattr(root, "generate"):
            found.append(f"{name} needs a model that generates (...ForCausalLM), not a bare one")
        elif getattr(policy, "draft_vocabulary", None) and not _has_plain_head(root):
            found.append(f"{name}.draft_vocabulary needs an LM head that is a plain nn.Linear")
        elif getattr(policy, "skip", None) and len(survey.mlps) != len(survey.layers):
            found.append(f"{name}.skip does not fit: some layers have no MLP that is known")
    return found


def _layer_problems(root: nn.Module, survey: Survey, policy: str) -> list[str]:
    """Why the model's layers cannot be given less to do, sequences or tokens."""
    if not is_encoder(survey):
        return [f"{policy} does not fit: it is for encoders of transformers, and this is none"]
    return [
        f"{policy} does not fit: {name!r} has a forward of its own, set by someone else"
        for name in survey.layers
        if own_forward(root.get_submodule(name)) is not None
    ][:1]


def _place_problems(survey: Survey) -> list[str]:
    """Why tokens of the model cannot merge: its layers must not ask where a token stands."""
    if survey.family in ("modernbert", "dinov3_vit"):
        return [
            "TokenMerging does not fit: the layers of this family turn queries and keys by their "
            "places, and merged tokens have none"
        ]
    return []


def _has_plain_head(root: nn.Module) -> bool:
    return type(root.get_output_embeddings()) is nn.Linear  # type: ignore[operator]


def is_encoder(survey: Survey) -> bool:
    """Whether tokens of the model see both ways."""
    return any(site.kind == ENCODER for site in survey.sites)
