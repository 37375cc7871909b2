"""patch(model, *policies): all checks first, then changes that can be undone, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from adaptive import _native
from adaptive.adapters import EncoderFamily, family_for
from adaptive.errors import PatchConflict, UnknownFamily, UnsupportedModel
from adaptive.layers import hf_ffn_experts, hf_head_routing, hf_linear, hf_sparse_ffn, hf_width
from adaptive.layers.fingerprint import fingerprint
from adaptive.layers.state import RECORD, STATE, LayerState, PatchRecord
from adaptive.layers.survey import Survey
from adaptive.patch_checks import (
    generation_problems,
    is_encoder,
    modes_of,
    plan_problems,
    turned_layers,
)
from adaptive.patched import Patched
from adaptive.policy import Exact, ModelShape, Plan, Policy

_WRAPPERS = {
    "DataParallel": "it copies the model on every call; patch model.module instead",
    "DistributedDataParallel": "patch model.module before wrapping it",
    "FullyShardedDataParallel": "patch the model before wrapping it",
    "OptimizedModule": "patch first, then torch.compile: adaptive.patch(model._orig_mod)",
    "ScriptModule": "a scripted model cannot be changed; patch it before scripting",
}
"""Classes of torch that hide the model in a way that patching through them would not survive."""


@dataclass(frozen=True, kw_only=True)
class Support:
    """What `check` found. Prints as a few lines that a person reads.

    Attributes:
        model: Class of the model.
        family: Its family, or "unknown".
        have: What is supported, one line each.
        problems: Why patch() would refuse, one line each; empty if it would not.
        advice: What would help, one line each.
        error: The error that patch() would raise; None if it would not.
    """

    model: str
    family: str
    have: tuple[str, ...]
    problems: tuple[str, ...]
    advice: tuple[str, ...]
    error: type[Exception] | None = None

    @property
    def ok(self) -> bool:
        """Whether patch() would succeed."""
        return not self.problems

    def __str__(self) -> str:
        """Return the answer, what was found, what is wrong and what would help."""
        answer = "can be patched" if self.ok else "cannot be patched"
        lines = [f"{self.model} ({self.family}) {answer}"]
        lines += [f"  has      {line}" for line in self.have]
        lines += [f"  problem  {line}" for line in self.problems]
        lines += [f"  advice   {line}" for line in self.advice]
        return "\n".join(lines)


def patch(model: nn.Module, *policies: Policy | Plan, exact_linear: bool = True) -> Patched:
    """Make ``model`` do less work, in place; by default with the same mathematics.

    Everything is checked before anything is changed, and an exception on the way, Ctrl-C too,
    leaves the model as it was. No other model is touched, and nothing is written to its config.

    Args:
        model: A decoder or encoder of transformers of a known family, bare or inside PEFT or
            another module; or a plain PyTorch module with attention layers that are known.
        policies: What to do; none: `Exact`, the same mathematics through native kernels. Or one
            Plan, made earlier or loaded from a file.
        exact_linear: Whether large linear layers of a model of transformers on a CPU are computed
            faster, too: by a native kernel where there are 1..16 rows, and by slices of weights
            widened to float32 where there are 32 or more, the weights have 16 bits and the
            processor has no units for them; and whether FFNs that leave most neurons at 0
            (Gemma 3n) compute the others alone. The same mathematics, summed in float32.

    Returns:
        The handle: a context manager, with reports, verification and `unpatch()`.

    Raises:
        UnknownFamily: No family is registered for the model's type.
        UnsupportedModel: The model or its setup is not supported; all reasons are listed.
        PatchConflict: It is patched already.
        PlanMismatch: The plan is for another model.
        TypeError: An argument is no model, policy or plan; or there is a plan beside others.
        ValueError: A policy does not fit the model.
    """
    root, survey, support, plan = examine(model, policies)
    if isinstance(plan, ValueError):
        raise plan
    if support.error is not None or plan is None:
        error = support.error or UnsupportedModel
        raise error("adaptive: " + "\n".join((*support.problems, *support.advice)))
    record = PatchRecord(policies=plan.policies, plan=plan, family=survey.family, base=survey.base)
    try:
        record.log.set(root, "", RECORD, record)
        for site in survey.sites:
            state = LayerState(record=record, site=site, row=plan.rows[site.layer])
            record.states.append(state)
            record.log.set(root, site.name, STATE, state)
        _install(root, survey, record, exact_linear)
        if exact_linear and _is_pretrained(root):
            hf_linear.install(root, record)
            hf_sparse_ffn.install(root, record)
        record.reset(_native.calls())
    except BaseException:
        record.log.undo(root)
        raise
    return Patched(model, root, record)


def check(model: nn.Module, *policies: Policy | Plan) -> Support:
    """Say whether `patch` would work on ``model``, what is missing, and what would help.

    Changes nothing, runs nothing but a few single tokens for a policy that rebases positions (to
    measure how the model rotates its keys), and does not raise for a model that is not supported,
    nor for policies or a plan that do not fit it: those are problems that it reports.

    Raises:
        TypeError: An argument is no model, policy or plan; or there is a plan beside others.
    """
    return examine(model, policies)[2]


def patched(model: nn.Module) -> Patched:
    """Return a handle for a model that is patched already, such as a deepcopy of a patched one.

    Raises:
        PatchConflict: It is not patched.
    """
    root = _find_root(model)[0]
    record = root.__dict__.get(RECORD)
    if not isinstance(record, PatchRecord):
        raise PatchConflict(f"adaptive: this {type(model).__name__} is not patched")
    return Patched(model, root, record)


def examine(
    model: nn.Module, policies: Sequence[Policy | Plan]
) -> tuple[nn.Module, Survey, Support, Plan | ValueError | None]:
    """Return the module to patch, what is there, what to say about it, and the plan for it.

    Instead of the plan: the error of policies that do not fit, or None if nothing would.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"adaptive: model must be an nn.Module, got {type(model).__name__}")
    for policy in policies:
        if not isinstance(policy, Policy | Plan):
            raise TypeError(
                f"adaptive: policies must be Policy or Plan objects, got {type(policy).__name__}"
            )
    root, problem = _find_root(model)
    if problem is None and RECORD in root.__dict__:
        problem = "the model is patched already; give all policies in one call, or unpatch() it"
    survey = _survey(root) if problem is None else _nothing(root, problem)
    problems = list(survey.problems)
    plan: Plan | ValueError | None = None
    error: type[Exception] | None = None
    if RECORD in root.__dict__:
        error = PatchConflict
    elif not survey.known:
        error = UnknownFamily
    elif problems:
        error = UnsupportedModel
    else:
        try:
            problems = plan_problems(survey, {m for p in policies for m in modes_of(p)})
            problems += generation_problems(root, survey, policies)
            plan = _plan(root, survey.shape, policies) if not problems else None
            survey, more = _with_rotations(root, survey, plan)
            problems += more
        except ValueError as misfit:  # a PlanMismatch, or a policy's own
            plan, error = misfit, type(misfit)
            problems = [str(misfit).removeprefix("adaptive: ")]
        else:
            error = UnsupportedModel if problems else None
    support = Support(
        model=type(model).__name__,
        family=survey.family,
        have=survey.have,
        problems=tuple(problems),
        advice=survey.advice,
        error=error,
    )
    return root, survey, support, plan


def _find_root(model: nn.Module) -> tuple[nn.Module, str | None]:
    """Return the module to patch, and why it cannot be.

    It is the model of transformers inside ``model``, such as the one that PEFT wraps, or ``model``
    itself if there is none.
    """
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch."):
                return model, f"{type(module).__name__} is in the way: {_WRAPPERS[kind.__name__]}"
        if _is_pretrained(module):
            inside = set(module.modules())
            others = [m for m in model.modules() if _is_pretrained(m) and m not in inside]
            if others:
                return model, "there are several models of transformers inside; patch each alone"
            return module, None
    return model, None


def _is_pretrained(module: nn.Module) -> bool:
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__ == "transformers.modeling_utils"
        for kind in type(module).__mro__
    )


def _survey(root: nn.Module) -> Survey:
    if not _is_pretrained(root):
        from adaptive.layers import torch_attention

        return torch_attention.survey(root)
    from adaptive.layers import hf_encoder, hf_model

    try:
        family = family_for(root)
    except UnknownFamily as error:
        return replace(_nothing(root, str(error).removeprefix("adaptive: ")), known=False)
    survey = hf_encoder.survey if isinstance(family, EncoderFamily) else hf_model.survey
    found = survey(
        root,
        family.name,
        family.base_name(root),
        family.attention_names(root),
        family.problems(root),
    )
    if found.problems:
        return found
    layers = family.layer_names(root)
    found = replace(found, layers=tuple(layers), mlps=tuple(family.mlp_names(root)))
    if isinstance(family, EncoderFamily):
        return found
    return replace(found, norms=tuple(family.norm_names(root)), exact_only=family.exact_only)


def _nothing(root: nn.Module, problem: str) -> Survey:
    kind = getattr(getattr(root, "config", None), "model_type", type(root).__name__)
    shape = ModelShape(model_type=str(kind), heads=(), kv_heads=(), head_dim=())
    return Survey(family="unknown", shape=shape, problems=(problem,))


def _with_rotations(root: nn.Module, survey: Survey, plan: Plan | None) -> tuple[Survey, list[str]]:
    """Add how layers rotate their keys, if the plan must know; also, what is in the way."""
    layers = turned_layers(plan) if plan is not None else []
    if not layers:
        return survey, []
    from adaptive.layers import hf_rotation

    names = [site.name for site in survey.sites]
    found, problem = hf_rotation.measure(root, survey.base, names, layers)
    words = "LocalAttention(positions='rebased') does not fit: "
    return replace(survey, extra=found), [words + problem] if problem else []


def _install(root: nn.Module, survey: Survey, record: PatchRecord, native: bool) -> None:
    if _is_pretrained(root):
        from adaptive.layers import hf_encoder, hf_model

        (hf_encoder if is_encoder(survey) else hf_model).install(root, survey, record)
        hf_width.install(root, survey, record)
        hf_ffn_experts.install(root, survey, record)
        hf_head_routing.install(root, survey, record, native)
    else:
        from adaptive.layers import torch_attention

        torch_attention.install(root, survey, record)


def _plan(root: nn.Module, shape: ModelShape, policies: Sequence[Policy | Plan]) -> Plan:
    plans = [policy for policy in policies if isinstance(policy, Plan)]
    if not plans:
        chosen = [policy for policy in policies if isinstance(policy, Policy)]
        return Plan.make(shape, chosen or [Exact()])
    if len(policies) > 1:
        raise TypeError("adaptive: give either one Plan or policies, got both or several plans")
    plans[0].check_shape(shape)
    plans[0].check_policies()
    plans[0].check_rowless()
    if plans[0].fingerprint is not None:
        plans[0].check_fingerprint(fingerprint(root, shape))
    return plans[0]
