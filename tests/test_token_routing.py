"""TokenRouting in models: prefixes of gated FFNs, as if the other neurons were 0."""

import copy

import pytest
import torch
from models import greedy, make, token_ids

import adaptive
from adaptive import TokenRouting
from adaptive.layers.hf_width import PrefixForward
from adaptive.policy import Policy
from adaptive.policy.token_routing import neurons_of

GATED = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "granite", "olmo2"]
BAD = {
    "none": ({"widths": ()}, "widths must be shares above 0 and up to 1, got ()"),
    "zero": ({"widths": 0}, "widths must be shares above 0"),
    "above one": ({"widths": (0.5, 1.5)}, "widths must be shares above 0"),
    "a word": ({"widths": "half"}, "widths must be shares above 0"),
    "too few": ({"widths": (0.5,), "layers": (0, 1)}, "widths must be one number or one for each"),
    "layers": ({"widths": 0.5, "layers": (1, 0)}, "layers must be ascending layer numbers"),
}


def masked(model, shares):
    """The same model, dense, with the weights of the neurons left out at 0."""
    model = copy.deepcopy(model)
    for layer, share in shares.items():
        down = model.model.layers[layer].mlp.down_proj
        with torch.no_grad():
            down.weight[:, neurons_of(share, down.in_features) :] = 0
    return model


def narrowed(model):
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    return [name for name, forward in forwards.items() if isinstance(forward, PrefixForward)]


@torch.no_grad()
@pytest.mark.parametrize("case", GATED)
def test_a_prefix_equals_the_masked_dense_model(case):
    model, ids = make(case, implementation="eager"), token_ids(tokens=20)
    stock = model(ids).logits
    seen = []
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda *call: seen.append(call[-1].shape[-1]))
    with adaptive.patch(model, TokenRouting(widths=(0.5, 0.34), audit_every=None)) as patched:
        expected = masked(make(case, implementation="eager"), {0: 0.5, 1: 0.34})(ids).logits
        seen.clear()
        made = model(ids).logits
        assert seen == [48, 32]  # of 96 neurons
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(made, stock, rtol=1e-2, atol=1e-2)
        assert not patched.report().exact
        with patched.disabled():
            assert torch.equal(model(ids).logits, stock)
    assert narrowed(model) == []
    assert torch.equal(model(ids).logits, stock)


@torch.no_grad()
def test_full_width_is_stock_bit_for_bit_and_layers_are_chosen():
    model, ids = make("llama"), token_ids(tokens=40)
    stock = model(ids).logits
    with adaptive.patch(model, TokenRouting(widths=1.0)):
        assert narrowed(model) == []
        assert torch.equal(model(ids).logits, stock)
    with adaptive.patch(model, TokenRouting(widths=0.5, layers=(1,))):
        assert narrowed(model) == ["model.layers.1.mlp"]
    with adaptive.patch(model, TokenRouting(widths=(1.0, 0.5))):
        assert narrowed(model) == ["model.layers.1.mlp"]


@torch.no_grad()
def test_native_products_of_slices():
    """Large enough for the linear kernels: slices go through them, and give the same."""
    fields = {"hidden_size": 1024, "intermediate_size": 1536, "num_hidden_layers": 1}
    model, ids = make("llama", **fields), token_ids(tokens=6)[:1]
    expected = masked(model, {0: 0.5})(ids).logits
    with adaptive.patch(model, TokenRouting(widths=0.5, audit_every=None)) as patched:
        patched.reset_stats()
        made = model(ids).logits
        # the three slices; projections of attention and the head are too small
        assert patched.report().native_calls["skinny_linear:cpu"] == 3
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_masked_model():
    model, ids = make("llama"), token_ids(tokens=9)
    other = masked(model, {0: 0.5, 1: 0.5})
    with adaptive.patch(model, TokenRouting(widths=0.5)):
        model(ids).logits.square().mean().backward()
    other(ids).logits.square().mean().backward()
    for name in ("gate_proj", "up_proj"):
        ours, right = (getattr(m.model.layers[0].mlp, name).weight.grad for m in (model, other))
        torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-6)
        assert not ours[48:].any()
        assert ours[:48].any()


def test_generation_copies_and_early_exit():
    model, ids = make("llama"), token_ids(tokens=12)[:1]
    expected = greedy(masked(model, {0: 0.5, 1: 0.5}), ids)
    with adaptive.patch(model, TokenRouting(widths=0.5)):
        assert torch.equal(greedy(model, ids), expected)
        twin = copy.deepcopy(model)
        assert torch.equal(greedy(twin, ids), expected)
        adaptive.patched(twin).unpatch()
        assert narrowed(twin) == []
    policies = TokenRouting(widths=0.5), adaptive.EarlyExit(layers=(1,), threshold=2.0)
    with adaptive.patch(model, *policies):
        assert torch.equal(greedy(model, ids), expected)
    with adaptive.patch(model, adaptive.LocalAttention(window=64), policies[0]):  # sees it all
        assert torch.equal(greedy(model, ids), expected)


@torch.no_grad()
def test_weights_are_read_anew_and_wrapped_ones_refused():
    model, ids = make("llama"), token_ids(tokens=12)[:1]
    with adaptive.patch(model, TokenRouting(widths=0.5)):
        mlp = model.model.layers[0].mlp
        mlp.up_proj.weight.mul_(2)
        made = model(ids).logits
        handle = mlp.up_proj.register_forward_hook(lambda *_: None)
        with pytest.raises(adaptive.PatchConflict, match="'up_proj', which someone wrapped"):
            model(ids)
        handle.remove()
    expected = masked(model, {0: 0.5, 1: 0.5})(ids).logits
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_compiled():
    model = make("llama")
    with adaptive.patch(model, TokenRouting(widths=0.5)):
        mlp, x = model.model.layers[0].mlp, torch.randn(1, 5, 128)
        torch.testing.assert_close(torch.compile(mlp, backend="eager")(x), mlp(x))


@pytest.mark.parametrize("case", ["phi3", "gpt2", "mixtral"])
def test_ffns_of_another_kind_are_refused(case):
    model = make(case)
    with pytest.raises(adaptive.UnsupportedModel, match="TokenRouting does not fit: layer 0 has"):
        adaptive.patch(model, TokenRouting(widths=0.5))


def test_an_ffn_that_does_more_is_refused():
    """Its last lines are those of a gated FFN; what it does before them would be lost."""
    model = make("llama")
    mlp = model.model.layers[0].mlp

    class Scaled(type(mlp)):
        def forward(self, x):
            x = x * 2
            down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
            return down_proj

    mlp.__class__ = Scaled
    with pytest.raises(adaptive.UnsupportedModel, match="layer 0 has an FFN, Scaled, that is no"):
        adaptive.patch(model, TokenRouting(widths=0.5))


def test_what_does_not_fit_is_refused():
    model = make("llama")
    with pytest.raises(ValueError, match="layers must be below the model's 2 layers, got 2"):
        adaptive.patch(model, TokenRouting(widths=0.5, layers=(1, 2)))
    with pytest.raises(ValueError, match="one for each of the model's 2 layers"):
        adaptive.patch(model, TokenRouting(widths=(0.5, 0.5, 0.5)))
    router = adaptive.RouterWeights(layers=(1,), weight=((0.5,) * 128,))
    for other in (adaptive.SelfSpeculative(exit_layer=1), adaptive.MixtureOfDepths(router=router)):
        with pytest.raises(ValueError, match="be combined: both decide what of an FFN runs"):
            adaptive.patch(model, TokenRouting(widths=0.5), other)
    with pytest.raises(adaptive.UnsupportedModel, match="needs a decoder or encoder of tr"):
        adaptive.patch(torch.nn.MultiheadAttention(64, 2).eval(), TokenRouting(widths=0.5))


@pytest.mark.parametrize("name", BAD)
def test_bad_fields_are_refused_by_name(name):
    fields, message = BAD[name]
    with pytest.raises(ValueError, match="adaptive: TokenRouting") as found:
        TokenRouting(**fields)
    assert message in str(found.value)


def test_a_policy_is_a_value():
    policy = TokenRouting(widths=[0.25, 1], layers=[0, 3])
    assert Policy.from_dict(policy.to_dict()) == policy
    assert str(policy) == "TokenRouting(widths=(0.25, 1), layers=(0, 3))"
    assert policy.shares(5) == {0: 0.25}
    assert [neurons_of(share, 96) for share in (0.01, 0.5, 0.52, 0.6, 1)] == [32, 48, 48, 56, 96]
    assert neurons_of(0.5, 24) == 24
