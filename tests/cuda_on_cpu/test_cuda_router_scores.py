"""The CUDA kernel of router_scores, run on the CPU, against float64; and bugs planted."""

import pytest
import torch
from simulated import DTYPES, planted
from simulated_routing import Routing, sources

from adaptive.ops import router_scores

SOURCE = "cuda/router_scores.cu"
FUNCTIONS = ("sigmoid", "softmax", "identity")


@pytest.fixture
def routing(builder):
    return Routing(builder.library(*builder.objects(*sources())))


def exact(hidden, weight, norm_weight=None, eps=1e-6, function="sigmoid"):
    """The formula of adaptive/ops/router_scores.py in float64."""
    x, weight = hidden.double(), weight.double()
    if norm_weight is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm_weight.double()
    logits = x @ weight.T
    if function == "softmax":
        return torch.softmax(logits, -1)[..., 1]
    return torch.sigmoid(logits[..., 0]) if function == "sigmoid" else logits[..., 0]


def check(routing, *arguments):
    made = routing.router_scores(*arguments)
    torch.testing.assert_close(made.double(), exact(*arguments), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", router_scores.edges, ids=str)
def test_edges(routing, sizes, dtype):
    check(routing, *router_scores.make_inputs(**sizes, dtype=dtype, device="cpu"))


def check_everything(routing):
    """Enough to notice a small bug."""
    for dtype in DTYPES:
        for width in (8, 64, 1032, 2600):
            for function in FUNCTIONS:
                for norm, eps in ((False, 1e-6), (True, 1e-6), (True, 0.5)):
                    arguments = router_scores.make_inputs(
                        2, 3, width, norm, eps, function, dtype=dtype, device="cpu"
                    )
                    check(routing, *arguments)
        hidden, weight, norm, *rest = router_scores.make_inputs(
            2, 3, 64, True, function="softmax", dtype=dtype, device="cpu"
        )
        for pad in (8, 3):
            far = torch.full((2, 5, 64 + pad), torch.nan, dtype=dtype)
            far[:, 1:4, pad:] = hidden
            apart = torch.full((2, 64 + pad), torch.nan, dtype=dtype)
            apart[:, pad:] = weight
            aside = torch.full((64 + pad,), torch.nan, dtype=dtype)
            aside[pad:] = norm
            check(routing, far[:, 1:4, pad:], apart[:, pad:], aside[pad:], *rest)


def test_widths_functions_and_strides(routing):
    check_everything(routing)


def test_a_token_depends_on_itself_alone(routing):
    hidden, *rest = router_scores.make_inputs(2, 9, 72, True, dtype=torch.bfloat16, device="cpu")
    right = routing.router_scores(hidden, *rest)
    assert torch.equal(routing.router_scores(hidden[1:, 4:5], *rest), right[1:, 4:5])
    hidden[0, 3] = torch.nan
    made = routing.router_scores(hidden, *rest)
    assert made[0, 3].isnan()
    assert made.isnan().sum() == 1
    assert torch.equal(made[1], right[1])


def test_refusals_name_the_argument(routing):
    arguments = list(router_scores.make_inputs(1, 2, 16, dtype=torch.float32, device="cpu"))
    arguments[0] = arguments[0][..., :12]
    with pytest.raises(RuntimeError, match="adaptive::router_scores: hidden must have a width"):
        routing.router_scores(*arguments)


MUTANTS = {
    "the first route": ("const T* last = first + (a.routes - 1) * a.weight_stride;",
                        "const T* last = first;"),
    "the other route forgotten": ("weight -= simt::to_float(other.x[e])",
                                  "weight -= 0.0f * simt::to_float(other.x[e])"),
    "no weight in the norm": ("weight *= simt::to_float(gain.x[e])",
                              "weight *= 0.0f * simt::to_float(gain.x[e]) + 1.0f"),
    "no eps": (" + a.eps)", ")"),
    "a sum in place of a mean": ("square / static_cast<float>(width)", "square"),
    "always a norm": ("if (norm) product /=", "product /="),
    "always a sigmoid": ("a.sigmoid ? ", "true ? "),
    "the weight of the router in the squares": ("square += value * value",
                                                "square += value * weight"),
    "one warp": ("for (int w = 0; w < kWarps; ++w)", "for (int w = 0; w < 1; ++w)"),
    "no barrier": ("  __syncthreads();\n", ""),
    "half of the lanes": ("int lanes = 1; lanes < kLanes; lanes", "int lanes = 2; lanes < kLanes; "
                          "lanes"),
    "the row's stride": ("token % a.tokens * a.hidden_stride[1]", "token % a.tokens * a.width"),
    "the batch's stride": ("token / a.tokens * a.hidden_stride[0]",
                           "token / a.tokens * a.tokens * a.width"),
    "the first turn alone": ("at < width; at += kThreads * kElements", "at < width; at += width"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(builder, tmp_path, name):
    mutant = planted(tmp_path / "csrc", SOURCE, SOURCE, *MUTANTS[name])
    objects = builder.objects(*sources("router_scores", mutant))
    routing = Routing(builder.library(*objects))
    with pytest.raises((AssertionError, RuntimeError)):
        check_everything(routing)
