"""Routers from the tensors of a checkpoint: what does not fit is named by layer and shape."""

import pytest
import torch

from adaptive import ExpertRouterWeights, RouterWeights, WidthRouter
from adaptive.policy.router_predictor import PARTS, RouterPredictor

ROWS = {"ExpertRouterWeights": "experts", "WidthRouter": "choices"}
KINDS = pytest.mark.parametrize(
    "kind", [ExpertRouterWeights, WidthRouter], ids=lambda k: k.__name__
)
EVERY = pytest.mark.parametrize(
    "kind", [ExpertRouterWeights, WidthRouter, RouterWeights], ids=lambda k: k.__name__
)


def ones(*shape):
    return torch.ones(shape)


def refused(error, message, call, *given):
    with pytest.raises(error) as found:
        call(*given)
    assert message in str(found.value)


@EVERY
def test_keys_that_name_no_layers(kind):
    rule = f"adaptive: {kind.__name__}.weight must have layer numbers from 0 on as keys, got"
    for keys in ([0, "1"], [0, -1], [0, True], ["layers.0.router.weight"], [None]):
        weights = dict.fromkeys(keys, ones(2, 4))
        refused(ValueError, f"{rule} {list(weights)}", kind.from_tensors, weights)
    refused(ValueError, f"{rule} []", kind.from_tensors, {})
    for given in ([ones(2, 4)], None, ones(2, 4)):
        rule = f"weight must map layers to tensors, got {type(given).__name__}"
        refused(TypeError, rule, kind.from_tensors, given)


@EVERY
def test_what_holds_no_numbers(kind):
    for value, got in (
        (ones(2, 4).to(torch.complex64), "real numbers, got torch.complex64 on cpu"),
        (torch.ones(2, 4, device="meta"), "real numbers, got torch.float32 on meta"),
    ):
        weights = {0: ones(2, 4), 3: value}
        refused(TypeError, f"weight of layer 3 must hold {got}", kind.from_tensors, weights)
    weights = {0: ones(2, 4), 3: ones(2, 4) * torch.nan}
    refused(ValueError, "weight of layer 3 must hold finite numbers", kind.from_tensors, weights)
    weights = {0: ones(2, 4), 3: ones(2, 0)}
    refused(
        ValueError, "weight of layer 3 must not be empty, got [2, 0]", kind.from_tensors, weights
    )


@KINDS
def test_shapes_that_do_not_agree(kind):
    shape = f"[{ROWS[kind.__name__]}, width]"
    for other in ([3, 8], [2, 6]):
        rule = "weight must have one shape in all layers, got {0: [2, 8], 5: "
        refused(ValueError, f"{rule}{other}}}", kind.from_tensors, {5: ones(*other), 0: ones(2, 8)})
    rule = f"weight of layer 5 must have shape {shape}, got [8]"
    refused(ValueError, rule, kind.from_tensors, {0: ones(2, 8), 5: ones(8)})
    weights = {0: ones(2, 8), 5: ones(2, 8)}
    for bias in (ones(3), ones(2, 1)):
        rule = f"bias of layer 5 must have shape [2], got {list(bias.shape)}"
        refused(ValueError, rule, kind.from_tensors, weights, {0: ones(2), 5: bias})
    for keys, found in (
        ([], "(missing [0, 5]), got []"),
        ([0], "(missing [5]), got [0]"),
        ([0, 5, 6], "(unknown [6]), got [0, 5, 6]"),
    ):
        rule = f"bias must be for layers [0, 5] {found}"
        refused(ValueError, rule, kind.from_tensors, weights, dict.fromkeys(keys, ones(2)))


def test_orders_of_experts():
    weights, make = {0: ones(4, 8), 1: ones(4, 8)}, ExpertRouterWeights.from_tensors
    orders = {0: torch.arange(8), 1: torch.arange(12)}
    assert make(weights, None, orders).order == (tuple(range(8)), tuple(range(12)))
    for order, error, rule in (
        (torch.arange(8.0), TypeError, "must hold whole numbers, got torch.float32 on cpu"),
        (torch.arange(8).view(2, 4), ValueError, "must have shape [neurons], got [2, 4]"),
    ):
        refused(error, f"order of layer 1 {rule}", make, weights, None, {**orders, 1: order})
    refused(ValueError, "order must be for layers [0, 1]", make, weights, None, {0: orders[0]})


def test_ragged_lists_of_experts():
    for weight, rule in (
        ((((1.0, 2.0),), ((1.0, 2.0), (3.0, 4.0))), "got {2: [1, 2], 7: [2, 2]}"),
        ((((1.0, 2.0),), ((1.0,), (3.0, 4.0))), "weight of layer 7 must hold numbers of 2"),
        ((((1.0, 2.0),),), "weight must have 2 entries, one per layer"),
    ):
        with pytest.raises(ValueError, match="adaptive: ExpertRouterWeights") as found:
            ExpertRouterWeights(layers=(2, 7), weight=weight)
        assert rule in str(found.value)


def test_routers_of_tokens_name_the_layer_of_another_width():
    rule = "weight must have rows of one width in all layers, got {1: 4, 2: 6}"
    refused(ValueError, rule, RouterWeights.from_tensors, {1: ones(4), 2: ones(2, 6)})


def test_predictors():
    good = dict(zip(PARTS, (ones(3, 4), ones(3), ones(3), ones(1)), strict=True))
    assert RouterPredictor.from_tensors([good, good]).width == 4
    for name, value, rule in (
        ("inner.weight", ones(3, 5), "inner.weight of item 1 must have shape [3, 4], got [3, 5]"),
        ("inner.bias", ones(4), "inner.bias of item 1 must have shape [3], got [4]"),
        ("outer.weight", ones(1, 3), "outer.weight of item 1 must have shape [3], got [1, 3]"),
        ("outer.bias", ones(2), "outer.bias of item 1 must have shape [1], got [2]"),
        ("more", ones(1), "item 1 must map the names inner.weight, inner.bias, outer.weight"),
    ):
        refused(ValueError, rule, RouterPredictor.from_tensors, [good, {**good, name: value}])
    less = {name: value for name, value in good.items() if name != "outer.bias"}
    rule = "got ['inner.weight', 'inner.bias', 'outer.weight']"
    refused(ValueError, rule, RouterPredictor.from_tensors, [less])
    rule = "inner.weight of item 0 must be [hidden, width], got [4]"
    refused(ValueError, rule, RouterPredictor.from_tensors, [{**good, "inner.weight": ones(4)}])
    rule = "outer.bias of item 0 must be a tensor, got float"
    refused(TypeError, rule, RouterPredictor.from_tensors, [{**good, "outer.bias": 1.0}])
