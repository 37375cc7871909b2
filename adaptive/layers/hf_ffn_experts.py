"""FFNs of a transformers model whose tokens go through a few experts of their neurons."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.layers.balanced_clusters import balanced_clusters
from adaptive.layers.expert_log import AUDITED_ROWS, ExpertLog
from adaptive.layers.expert_weights import Expert, ExpertWeights
from adaptive.layers.feed_forward import FeedForward, feed_forward, ffn_name
from adaptive.layers.hf_linear import SLOW_DTYPES, _can_run, fast_linear, most_rows
from adaptive.layers.linear_scores import linear_scores
from adaptive.layers.state import PatchRecord
from adaptive.layers.survey import Survey
from adaptive.layers.switch import Switch
from adaptive.layers.widened_linear import MIN_ROWS
from adaptive.layers.width_choice import WidthPass
from adaptive.ops.skinny_linear import skinny_linear, supports
from adaptive.policy.ffn_experts import FeedForwardExperts

Groups = list[tuple[int, Tensor | None]]
"""Experts that run, ascending, and the rows that run each, ascending; None: all of them."""


class ExpertsForward:
    """The forward of one patched FFN, set on the instance: of each row its best experts.

    Copies and pickles arrive without copied weights and make their own.
    """

    def __init__(
        self,
        ffn: FeedForward,
        switch: Switch,
        index: int,
        policy: FeedForwardExperts,
        weights: ExpertWeights,
    ) -> None:
        """Know the FFN, whose parts are read anew in every call, and how it is split."""
        self.ffn = ffn
        self.switch = switch
        self.index = index
        self.policy = policy
        self.weights = weights

    def __getstate__(self) -> tuple[Any, ...]:
        """What a copy is made of: the copy of the FFN, and how it is split."""
        return self.ffn, self.switch, self.index, self.policy, self.weights.settings()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state[:-1], ExpertWeights(*state[-1]))  # type: ignore[misc]

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the FFN would if, for each row, only its best experts had weights.

        Rows of padding run none: what they get is 0. Differentiable but for the choice.

        Raises:
            NotImplementedError: torch.compile or torch.jit.trace is at work.
            PatchConflict: Someone wrapped a projection.
            ValueError: A score is NaN.
        """
        ffn = self.ffn
        if not self.switch.on or not ffn.complete or x.numel() == 0:
            return ffn.stock(x)
        _refuse(ffn, self.switch.in_graph)
        every, real = x.reshape(-1, x.shape[-1]), self._real(x)
        rows = every if real is None else every[real]
        result = self._run(rows)
        if real is not None:
            nothing = result.new_zeros((len(every), result.shape[1]))
            result = nothing.index_put((real,), result)
        return result.view(*x.shape[:-1], result.shape[1])

    def _run(self, rows: Tensor) -> Tensor:
        """What the experts make of rows, ``[rows, width]``, none of which is padding."""
        ffn = self.ffn
        experts, weight, bias = self.weights.of(ffn)
        if torch.is_grad_enabled() and _wants_gradient(ffn):
            experts = self.weights.split(ffn)
        groups = self._groups(_scores(rows, weight, bias, self.index)) if len(rows) else []
        run = _run_few if _few(ffn, rows, experts[0]) else _run
        out = rows.new_zeros((len(rows), ffn.down.weight.shape[0]), dtype=torch.float32)
        dtype = rows.dtype
        for expert, chosen in groups:
            made = run(ffn, experts[expert], rows if chosen is None else rows[chosen])
            dtype = made.dtype  # autocast may have another one
            if chosen is None:
                out += made
            else:
                out.index_add_(0, chosen, made.float())
        if self.policy.scaled:
            out = out * (self.policy.experts / self.policy.top_k)
        if ffn.down.bias is not None:
            out = out + ffn.down.bias
        result = ffn.finish(out.to(dtype))
        self._count(rows, groups, result)
        return result

    def _groups(self, scores: Tensor) -> Groups:
        """Which rows run which experts, of their scores ``[rows, experts]``."""
        top, (rows, experts) = self.policy.top_k, scores.shape
        if top == experts:
            return [(expert, None) for expert in range(experts)]
        chosen = scores.argsort(dim=1, descending=True, stable=True)[:, :top]
        if rows == 1:
            return [(expert, None) for expert in sorted(chosen[0].tolist())]
        runs = torch.zeros((experts, rows), dtype=torch.bool, device=scores.device)
        runs.scatter_(0, chosen.T, True)
        counts = runs.sum(1).tolist()
        places = runs.nonzero()[:, 1].split(counts)
        return [
            (expert, None if count == rows else places[expert])
            for expert, count in enumerate(counts)
            if count
        ]

    def _real(self, x: Tensor) -> Tensor | None:
        """Which rows are no padding, ``[rows]``; None: all."""
        now = self.switch.width_pass
        return None if now is None else now.real(x)

    def _count(self, rows: Tensor, groups: Groups, result: Tensor) -> None:
        log = self.switch.experts
        assert log is not None  # install made it
        runs, many = [0] * self.policy.experts, len(rows)
        for expert, chosen in groups:
            runs[expert] = many if chosen is None else len(chosen)
        found = log.layer(self.index)
        every = self.policy.audit_every
        if every is not None and found.calls % every == 0 and many and not self.ffn.drops:
            at = slice(None, None, -(-many // AUDITED_ROWS))
            with torch.no_grad():
                full = self.ffn.dense(rows.detach()[at])
            found.audit(result[at], full)
        found.count(many, runs, len(groups) if many else 0)


def _refuse(ffn: FeedForward, in_graph: bool) -> None:
    """Raise where the choice of a call would be frozen, or projections are not what they were."""
    if in_graph or torch.compiler.is_compiling() or torch._C._is_tracing():
        raise NotImplementedError(
            "adaptive: FeedForwardExperts cannot run under torch.compile or torch.jit.trace: which "
            "experts run depends on the tokens"
        )
    ffn.check("FeedForwardExperts")


def _wants_gradient(ffn: FeedForward) -> bool:
    return any(p.requires_grad for linear in ffn.linears for p in linear.parameters())


def _scores(rows: Tensor, weight: Tensor, bias: Tensor, index: int) -> Tensor:
    """Scores of the experts, ``[rows, experts]``, float32; a row's depend on it alone on a CPU.

    Raises:
        ValueError: One is NaN; the layer is named.
    """
    scores = linear_scores(rows, weight, bias)
    if bool(scores.isnan().any()):
        raise ValueError(
            f"adaptive: FeedForwardExperts: scores of layer {index} must be numbers, got NaN"
        )
    return scores


def _few(ffn: FeedForward, rows: Tensor, expert: Expert) -> bool:
    """Whether the kernel for few rows answers for all experts."""
    return (
        0 < len(rows) <= most_rows(rows.dtype)
        and ffn.native
        and supports(expert.down.shape[1], rows.dtype)
        and _can_run(rows, expert.up, expert.up_bias)
    )


def _run_few(ffn: FeedForward, expert: Expert, rows: Tensor) -> Tensor:
    """What `_run` does, where `_few` says so once for all."""
    gate: Tensor | None
    if expert.both is None or expert.gate_bias is not None:
        gate = None if expert.gate is None else skinny_linear(rows, expert.gate, expert.gate_bias)
        up = skinny_linear(rows, expert.up, expert.up_bias)
    else:
        gate, up = skinny_linear(rows, expert.both).chunk(2, 1)
    return skinny_linear(ffn.hidden(gate, up), expert.down)


def _run(ffn: FeedForward, expert: Expert, rows: Tensor) -> Tensor:
    """What an expert makes of rows, without the bias of the last projection."""
    multiply = _multiply if ffn.native else F.linear
    gate = None if expert.gate is None else multiply(rows, expert.gate, expert.gate_bias)
    return multiply(ffn.hidden(gate, multiply(rows, expert.up, expert.up_bias)), expert.down, None)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product with a part of a layer of which the product with all of it is ours."""
    few = most_rows(x.dtype)
    if few < len(x) < MIN_ROWS and x.dtype in SLOW_DTYPES:
        # Too few to widen the weights for, which are in the cache for the second half
        halves = [_multiply(half, weight, bias) for half in x.tensor_split(2)]
        return torch.cat(halves)
    out = fast_linear(x, weight, bias)
    return F.linear(x, weight, bias) if out is None else out


def problems(root: nn.Module, survey: Survey, policy: FeedForwardExperts) -> list[str]:
    """Why FFNs of the model cannot run a few experts of their neurons; the first reason.

    Raises:
        ValueError: The policy is for FFNs of another size.
    """
    if not survey.layers or not survey.mlps:
        return ["FeedForwardExperts does not fit: it needs a decoder or encoder of transformers"]
    for layer in policy.split_layers(len(survey.layers)):
        if layer >= len(survey.layers):
            continue  # the policy's plan says that better
        ffn = feed_forward(root, survey, layer)
        if isinstance(ffn, str):
            return [f"FeedForwardExperts does not fit: {ffn}"]
        _check_sizes(policy, layer, ffn.neurons, ffn.width)
    return []


def _check_sizes(policy: FeedForwardExperts, layer: int, neurons: int, width: int) -> None:
    if neurons % policy.experts:
        raise ValueError(
            f"adaptive: FeedForwardExperts.experts must divide the {neurons} neurons of layer "
            f"{layer}, got {policy.experts}"
        )
    router = policy.router
    if isinstance(router, str):
        return
    if router.width != width:
        raise ValueError(
            f"adaptive: FeedForwardExperts.router must be for states of width {width}, "
            f"got {router.width}"
        )
    order = router.order_of(layer)
    if order is not None and len(order) != neurons:
        raise ValueError(
            f"adaptive: FeedForwardExperts.router must order the {neurons} neurons of layer "
            f"{layer}, got {len(order)}"
        )


def install(root: nn.Module, survey: Survey, record: PatchRecord) -> None:
    """Give the FFNs of the split layers an ExpertsForward, undoably."""
    policy = next((p for p in record.policies if isinstance(p, FeedForwardExperts)), None)
    if policy is None or not (layers := policy.split_layers(len(survey.layers))):
        return
    record.switch.experts = ExpertLog(experts=policy.experts)
    record.switch.width_pass = WidthPass()  # says what is padding
    for layer in layers:
        name, ffn = ffn_name(survey, layer), feed_forward(root, survey, layer)
        assert name is not None  # or it would have been refused
        assert isinstance(ffn, FeedForward)
        weights = ExpertWeights(policy.experts, *_split(policy, layer, ffn.scored[0]))
        forward = ExpertsForward(ffn, record.switch, layer, policy, weights)
        ffn.replace(root, name, record.log, forward, record.switch)


def _split(
    policy: FeedForwardExperts, layer: int, scored: Tensor
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """The order of a layer's neurons, and its router, where they are not made of the weights."""
    if isinstance(policy.router, str):
        order, router = None, None
    else:
        order, router = policy.router.order_of(layer), policy.router.of(layer, scored.device)
    if policy.split == "clusters" and order is None:
        order = balanced_clusters(scored, policy.experts)
    return order, router
