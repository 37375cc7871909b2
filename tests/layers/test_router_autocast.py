"""Scores that decide what runs are the same under autocast: no choice is one of its rounding."""

import pytest
import torch

from adaptive import (
    EncoderExit,
    EncoderGate,
    ExpertRouterWeights,
    MixtureOfDepths,
    RouterPredictor,
    RouterWeights,
    TokenRouting,
    WidthRouter,
)
from adaptive.layers.best_heads import best_heads
from adaptive.layers.hf_encoder_exit import EncoderExits
from adaptive.layers.hf_routes import Routes
from adaptive.layers.linear_scores import linear_scores
from adaptive.layers.pooling import pool_weights, pooled
from adaptive.layers.switch import Switch
from adaptive.layers.width_choice import WidthPass, chosen_neurons
from adaptive.policy.router_predictor import PARTS
from adaptive.train._experts import LearningRouter
from adaptive.train._routers import Gates
from adaptive.train.tune_widths import _Choices

ROWS, CPU = 400, torch.device("cpu")
NATIVE, ODD = 64, 36
"""Widths of states that the kernel for linear layers takes, and that it does not."""


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heads(states):
    router = ExpertRouterWeights.random((0,), 8, states.shape[1]).of(0, CPU)
    spans = best_heads(states, router, 2, True, None, 0)
    return torch.cat([rows for _, _, rows in spans.spans]), spans.scales


def experts(states):
    return (
        linear_scores(states, *ExpertRouterWeights.random((0,), 8, states.shape[1]).of(0, CPU)),
    )


def two_widths(states):
    policy = TokenRouting(widths=(0.5, 1.0), router=RouterWeights.random((0,), states.shape[1]))
    return (chosen_neurons(policy, 0, states, None, 100, WidthPass()),)


def three_widths(states):
    router = WidthRouter.random((0,), states.shape[1], choices=3)
    policy = TokenRouting(widths=(0.25, 0.5, 1.0), router=router)
    return (chosen_neurons(policy, 0, states, None, 100, WidthPass()),)


def depths(states):
    width = states.shape[1]
    shapes = ((8, width), (8,), (8,), (1,))
    predictor = [{name: drawn(*shape) for name, shape in zip(PARTS, shapes, strict=True)}]
    weight = tuple(drawn(width).tolist())
    router = RouterWeights(
        layers=(0,), weight=(weight,), predictor=RouterPredictor.from_tensors(predictor)
    )
    routes = Routes(MixtureOfDepths(router=router, capacity=0.5), Switch(), (None,), False)
    return routes.logits(0, states[None]), routes._guesses(0, states[None])


def learning_depths(states):
    weight = drawn(1, states.shape[1])
    sequence = Gates((0,), "block", "sequence", weight).decide_on(0, states.view(40, 10, -1))
    predictor = [drawn(8, states.shape[1]), drawn(8), drawn(8), drawn(1)]
    gates = Gates((0,), "block", "token", weight, capacity=0.5, predictor=(predictor,))
    return sequence, gates.decide_on(0, states[None]), *gates.guesses[0]


def learning_widths(states):
    choices = _Choices((0,), (0.25, 0.5, 1.0), drawn(1, 3, states.shape[1]), drawn(1, 3))
    return choices.of(0, states[None], 100)


def learning_experts(states):
    order = torch.arange(8)
    weight = drawn(8, states.shape[1])
    router = LearningRouter(order=order, of=order, weight=weight, bias=drawn(8))
    return (router.choose(states, 2),)


def pools(states):
    batch = states.view(4, -1, states.shape[1])
    return (pooled(batch, pool_weights(batch, None, "mean")),)


def exits(states):
    weight = tuple(map(tuple, (drawn(4, states.shape[1]) / 8).tolist()))
    gate = EncoderGate(layers=(1, 2, 3), weight=weight, bias=(0.0,) * 4)
    found = EncoderExits(EncoderExit(gate=gate), 4, Switch())
    found.begin(None)
    found.enter(states[:, None])
    return (found._wanted,)


RUNNING = (heads, experts, two_widths, three_widths, depths, pools, exits)
LEARNING = (learning_depths, learning_widths, learning_experts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [NATIVE, ODD])
@pytest.mark.parametrize("decide", [*RUNNING, *LEARNING])
def test_autocast_changes_no_decision(decide, width, dtype):
    states = drawn(ROWS, width, seed=1)
    wanted = decide(states)
    with torch.autocast("cpu", dtype):
        found = decide(states)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
