"""Why a model that is supported cannot do what the policies say."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from adaptive.layers import hf_ffn_experts, hf_head_routing, hf_width, token_reduction_passes
from adaptive.layers.changes import own_forward
from adaptive.layers.head_copy import can_copy
from adaptive.layers.hf_windows import sees_chunks
from adaptive.layers.state import ENCODER
from adaptive.layers.survey import Survey
from adaptive.policy import (
    EncoderExit,
    Exact,
    FeedForwardExperts,
    HeadRouting,
    LocalAttention,
    MixtureOfDepths,
    Plan,
    Policy,
    TokenMerging,
    TokenPruning,
    TokenRouting,
)
from adaptive.policy.plan import DENSE, GLOBAL_LOCAL, LOCAL, STOCK


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


def turned_layers(plan: Plan) -> list[int]:
    """Layers with heads that see tokens at other positions than those of the text."""
    if not any(isinstance(policy, LocalAttention) and policy.turns for policy in plan.policies):
        return []
    return [layer for layer, row in enumerate(plan.rows) if LOCAL in row]


def generation_problems(
    root: nn.Module, survey: Survey, policies: Sequence[Policy | Plan]
) -> list[str]:
    """Why the model cannot generate as the policies say."""
    found = []
    every = [p for each in policies for p in (each.policies if isinstance(each, Plan) else (each,))]
    fits = (Exact, *survey.fits)
    if survey.exact_only and (names := [type(p).__name__ for p in every if type(p) not in fits]):
        return [f"{', '.join(names)} does not fit {survey.family}: {survey.exact_only}"]
    for policy in every:
        found += _layer_problems(root, survey, policy)
        if not policy.generates:
            continue
        name = type(policy).__name__
        if not survey.layers or is_encoder(survey):
            found.append(f"{name} does not fit: it needs a decoder of transformers")
        elif not survey.base or not hasattr(root, "generate"):
            found.append(f"{name} needs a model that generates (...ForCausalLM), not a bare one")
        elif (needs := _needs_plain_head(policy)) and not _has_plain_head(root):
            found.append(f"{name}.{needs} needs an LM head that is a plain nn.Linear")
        elif needs == "draft_head" and not can_copy(width := _head_width(root)):
            rule = f"an LM head whose width is a multiple of 32, got {width}"
            found.append(f"{name}.draft_head needs {rule}")
        elif getattr(policy, "criterion", None) == "margin" and _tokens(root) < 2:  # noqa: PLR2004
            found.append(f"{name}.criterion='margin' needs a vocabulary of two tokens or more")
        elif getattr(policy, "skip", None) and len(survey.mlps) != len(survey.layers):
            found.append(f"{name}.skip does not fit: some layers have no MLP that is known")
        else:
            found += _own_forwards(root, name, [*survey.layers, *survey.mlps])
            found += _static_problems(root) if getattr(policy, "static", False) else []
    return found


def _static_problems(root: nn.Module) -> list[str]:
    """Why a step of the model needs the host: what it asks of tensors to go on."""
    config = root.config
    experts = ("num_local_experts", "num_experts", "n_routed_experts")
    ropes = [getattr(config, field, None) for field in ("rope_parameters", "rope_scaling")]
    ropes += [r for rope in ropes if isinstance(rope, dict) for r in rope.values()]
    kinds = {str(r.get("rope_type", r.get("type"))) for r in ropes if isinstance(r, dict)}
    found = []
    if any(getattr(config, field, None) for field in experts):
        found.append("which experts have tokens is asked by the host")
    if moving := sorted(kinds & {"dynamic", "longrope"}):
        found.append(f"angles of rope_type={moving[0]!r} follow the longest position of a pass")
    return [f"SelfSpeculative.static does not fit: {problem}" for problem in found]


def _layer_problems(root: nn.Module, survey: Survey, policy: Policy) -> list[str]:
    """Why layers of the model cannot be run as the policy says.

    Raises:
        ValueError: The policy is for a model of other sizes.
    """
    if isinstance(policy, TokenRouting):
        return hf_width.problems(root, survey, policy)
    if isinstance(policy, FeedForwardExperts):
        return hf_ffn_experts.problems(root, survey, policy)
    if isinstance(policy, HeadRouting):
        return hf_head_routing.problems(root, survey, policy)
    if isinstance(policy, MixtureOfDepths):
        return _routing_problems(root, survey, policy)
    name = type(policy).__name__
    if isinstance(policy, TokenMerging | TokenPruning):
        return _encoder_problems(root, survey, name) or _reduction_problems(survey, policy)
    if isinstance(policy, EncoderExit):
        return _encoder_problems(root, survey, name) or _exit_problems(root, survey, policy)
    if getattr(policy, "tree", False) and sees_chunks(getattr(root, "config", None)):
        return [f"{name}.tree does not fit: branches have no places in chunks of the text"]
    return []


def _encoder_problems(root: nn.Module, survey: Survey, policy: str) -> list[str]:
    """Why the model's layers cannot be given less to do, sequences or tokens."""
    if not is_encoder(survey):
        return [f"{policy} does not fit: it is for encoders of transformers, and this is none"]
    return _own_forwards(root, policy, survey.layers)


def _own_forwards(root: nn.Module, policy: str, modules: Sequence[str]) -> list[str]:
    """Why layers cannot be left out: the first whose forward would be replaced, and is no class's.

    accelerate and others wrap forwards; to call the class's instead would drop what they do.
    """
    return [
        f"{policy} does not fit: {name!r} has a forward of its own, set by someone else"
        for name in modules
        if own_forward(root.get_submodule(name)) is not None
    ][:1]


def _needs_plain_head(policy: Policy | Plan) -> str:
    """The field of the policy that takes the LM head apart; "" if none does."""
    fields = ("draft_head", "draft_vocabulary")
    return next((field for field in fields if getattr(policy, field, None)), "")


def _tokens(root: nn.Module) -> int:
    """Size of the vocabulary."""
    weight = getattr(root.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    return int(root.config.vocab_size) if weight is None else len(weight)  # type: ignore[union-attr,arg-type]


def _head_width(root: nn.Module) -> int:
    return int(root.get_output_embeddings().weight.shape[1])  # type: ignore[operator]


def _routing_problems(root: nn.Module, survey: Survey, policy: MixtureOfDepths) -> list[str]:
    """Why the model's layers cannot be run for some of the tokens or sequences alone."""
    if not survey.layers or is_encoder(survey):
        return ["MixtureOfDepths does not fit: it is for decoders of transformers"]
    needs = {
        "an MLP": survey.mlps if policy.unit == "mlp" or policy.weighted == "mlp" else None,
        "an input norm": survey.norms if policy.unit == "block" else None,
    }
    for what, names in needs.items():
        if names is not None and len(names) != len(survey.layers):
            return [f"MixtureOfDepths does not fit: some layers have no {what} that is known"]
    attention = tuple(site.name for site in survey.sites)
    unit = {"block": survey.layers, "attention": attention, "mlp": survey.mlps}[policy.unit]
    modules = {name: root.get_submodule(name) for name in unit}
    kinds = {type(module).__name__ for module in modules.values()}
    if policy.unit != "mlp" and len(kinds) > 1:
        return [f"MixtureOfDepths does not fit: layers differ, {', '.join(sorted(kinds))}"]
    from adaptive.layers import hf_routing_passes

    hf_routing_passes.check_fit(root, survey, policy)
    return [
        f"MixtureOfDepths does not fit: {name!r} has a forward of its own, set by someone else"
        for name, module in modules.items()
        if own_forward(module) is not None
    ][:1]


def _reduction_problems(survey: Survey, policy: TokenMerging | TokenPruning) -> list[str]:
    """Why tokens of the model cannot merge or go: layers must not ask where a token stands."""
    if survey.family in ("modernbert", "dinov3_vit"):
        merges = isinstance(policy, TokenMerging)
        those = "merged tokens have none" if merges else "tokens that stay move to others"
        return [
            f"{type(policy).__name__} does not fit: the layers of this family turn queries and "
            f"keys by their places, and {those}"
        ]
    return token_reduction_passes.problems(survey, policy)


def _exit_problems(root: nn.Module, survey: Survey, policy: EncoderExit) -> list[str]:
    from adaptive.layers import hf_encoder_passes

    hf_encoder_passes.check_fit(root, survey, policy)
    return []


def _has_plain_head(root: nn.Module) -> bool:
    return type(root.get_output_embeddings()) is nn.Linear  # type: ignore[operator]


def is_encoder(survey: Survey) -> bool:
    """Whether tokens of the model see both ways."""
    return any(site.kind == ENCODER for site in survey.sites)
