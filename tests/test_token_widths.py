"""TokenRouting with a router: every token of a call goes through an FFN of its own width."""

import copy
import pickle

import pytest
import torch
from models import greedy, make, padded, token_ids
from width_cases import always, masked, policy, router

import adaptive
from adaptive import RouterWeights
from adaptive.layers.hf_width import PrefixForward

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "granite", "olmo2"]


def close(made, expected):
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("case", FAMILIES)
def test_tokens_equal_those_of_the_masked_dense_model(case):
    model, ids = make(case, implementation="eager"), token_ids(tokens=24)
    stock, other = model(ids).logits, masked(case, router(), implementation="eager")
    expected = other(ids).logits
    assert len(torch.cat([n.flatten() for n in other.model.layers[0].mlp.seen]).unique()) == 4
    with adaptive.patch(model, policy()) as patched:
        made = model(ids).logits
        close(made, expected)
        assert not torch.allclose(made, stock, rtol=1e-2, atol=1e-2)
        assert not patched.report().exact
        with patched.disabled():
            assert torch.equal(model(ids).logits, stock)
    assert torch.equal(model(ids).logits, stock)


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_decoding_equals_the_prompt_read_at_once(case):
    model, ids = make(case, implementation="eager"), token_ids(tokens=14)
    expected = masked(case, router(), implementation="eager")(ids).logits
    with adaptive.patch(model, policy()):
        first = model(ids[:, :9], use_cache=True)
        close(first.logits, expected[:, :9])
        for at in range(9, 14):
            step = model(ids[:, at : at + 1], past_key_values=first.past_key_values)
            close(step.logits[:, 0], expected[:, at])


def test_generation_is_that_of_the_masked_model():
    model, ids = make("llama"), token_ids(tokens=12)
    expected = greedy(masked("llama", router()), ids)
    with adaptive.patch(model, policy()) as patched:
        assert torch.equal(greedy(model, ids), expected)
        found = patched.verify(ids, new_tokens=3)
        assert found.max_logit_error > 0


@torch.no_grad()
def test_all_at_full_width_is_stock_and_all_at_none_has_no_ffn():
    model, ids = make("llama"), token_ids(tokens=40)
    stock = model(ids).logits
    with adaptive.patch(model, exact_linear=False) as patched:
        exact = model(ids).logits
        close(exact, stock)
    with adaptive.patch(model, policy(router=always(3)), exact_linear=False) as patched:
        assert torch.equal(model(ids).logits, exact)
        assert patched.report().widths.used_share == 1
    silent = copy.deepcopy(model)
    for layer in silent.model.layers:
        layer.mlp.down_proj.weight.zero_()
    calls = []
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda *call: calls.append(call))
    with adaptive.patch(model, policy(router=always(0))) as patched:
        close(model(ids).logits, silent(ids).logits)
        assert patched.report().widths.used_share == 0
    assert not calls


@torch.no_grad()
def test_counts_are_those_of_the_masked_model_and_of_hooks():
    model, ids = make("llama"), token_ids(tokens=24)
    other = masked("llama", router())
    other(ids)
    computed = []
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda *call: computed.append(call[-1].numel()))
    with adaptive.patch(model, policy()) as patched:
        model(ids)
        log = patched.report().widths
        for number, layer in enumerate(other.model.layers):
            widths, many = torch.cat(layer.mlp.seen).flatten().unique(return_counts=True)
            expected = dict(zip(widths.tolist(), many.tolist(), strict=True))
            assert log.layers[number].tokens == expected
        assert sum(computed) == sum(layer.used for layer in log.layers.values())
        assert log.used_share == sum(computed) / (2 * 48 * 96)
        assert log.read_share == 1
        patched.reset_stats()
        assert patched.report().widths.used_share is None
        assert "no call yet" in str(patched.report())
        patched.verify(ids, new_tokens=2)
        assert patched.report().widths.used_share is None
        model(ids[:1, :1])
        read = [max(layer.tokens) for layer in patched.report().widths.layers.values()]
        assert patched.report().widths.read_share == sum(read) / (2 * 96)


@torch.no_grad()
def test_padding_goes_the_narrowest_way_and_counts_nothing():
    given = padded(batch=3)
    model, other = make("llama"), masked("llama", router())
    with adaptive.patch(model, policy(widths=(0.34, 0.4, 0.5, 1))) as patched:
        alone = model(given["input_ids"][2:, 6:]).logits
        patched.reset_stats()
        computed = []
        for layer in model.model.layers:
            layer.mlp.act_fn.register_forward_hook(lambda *call: computed.append(call[-1].numel()))
        made = model(**given)
        close(made.logits[2:, 6:], alone)
        log = patched.report().widths
        assert sum(log.layers[0].tokens.values()) == 60 - 9
        assert sum(computed) == sum(layer.used + 9 * 32 for layer in log.layers.values())
        assert model.model.layers[0].mlp.forward.now.known is None
        patched.reset_stats()
        mask = torch.cat([given["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
        mask[1, -1] = 0  # a row that is through already
        cache = made.past_key_values
        step = model(token_ids(3, 1), attention_mask=mask, past_key_values=cache)
        assert step.logits.isfinite().all()
        assert sum(patched.report().widths.layers[0].tokens.values()) == 2
    expected = greedy(other, given)
    with adaptive.patch(model, policy()):
        assert torch.equal(greedy(model, given), expected)


@torch.no_grad()
def test_one_logit_chooses_between_two():
    model, ids = make("llama"), token_ids(tokens=24)
    one = RouterWeights.random((0, 1), 128, seed=3)
    pairs = {
        layer: torch.stack([torch.zeros(128), torch.tensor(row)])
        for layer, row in zip(one.layers, one.weight, strict=True)
    }
    two = adaptive.WidthRouter.from_tensors(pairs)
    with adaptive.patch(model, policy(widths=(0.34, 1), router=two)):
        expected = model(ids).logits
    with adaptive.patch(model, policy(widths=(0.34, 1), router=one)) as patched:
        assert torch.equal(model(ids).logits, expected)
        assert set(patched.report().widths.layers[0].tokens) == {32, 96}


def test_gradients_are_those_of_the_masked_model():
    model, ids = make("llama"), token_ids(tokens=12)
    other = masked("llama", router())
    with adaptive.patch(model, policy(audit_every=1)):
        model(ids).logits.square().mean().backward()
    other(ids).logits.square().mean().backward()
    for ours, right in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, right.grad, rtol=1e-3, atol=1e-5)


def test_copies_pickles_and_plans():
    model, ids = make("llama"), token_ids(tokens=12)
    with adaptive.patch(model, policy()) as patched:
        expected = greedy(model, ids)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(greedy(twin, ids), expected)
            forward, ours = (m.model.layers[0].mlp.forward for m in (twin, model))
            assert forward.switch is not ours.switch
            assert forward.now is twin.model.layers[1].mlp.forward.now
            adaptive.patched(twin).unpatch()
            kept = [type(vars(m).get("forward")) for m in twin.modules()]
            assert PrefixForward not in kept
        plan = patched.plan
    again = adaptive.Plan.from_dict(plan.to_dict())
    with adaptive.patch(model, again):
        assert torch.equal(greedy(model, ids), expected)


def test_an_exception_in_a_layer_leaves_nothing():
    given, model = padded(batch=2), make("llama")
    with adaptive.patch(model, policy()) as patched, torch.no_grad():
        expected = model(**given).logits

        def stop(*_):
            raise KeyboardInterrupt

        handle = model.model.layers[1].self_attn.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(**given)
        handle.remove()
        assert model.model.layers[0].mlp.forward.now.known is not None
        assert copy.deepcopy(model).model.layers[0].mlp.forward.now.known is None
        assert torch.equal(model(**given).logits, expected)
        patched.reset_stats()
        model(given["input_ids"])  # no mask: nothing of the last one
        assert sum(patched.report().widths.layers[0].tokens.values()) == 40


@torch.no_grad()
@pytest.mark.parametrize("fullgraph", [True, False])
def test_graphs_are_refused(fullgraph):
    model, ids = make("llama", num_hidden_layers=1), token_ids(1, 5)
    with adaptive.patch(model, policy(router=router(layers=(0,)))):
        expected = model(ids).logits
        with pytest.raises(Exception, match=r"router=...\) cannot run under torch\.compile"):
            torch.compile(model.model, backend="eager", fullgraph=fullgraph)(ids, use_cache=False)
        assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_traces_keep_fixed_widths_and_refuse_routers():
    model = make("llama", num_hidden_layers=1)
    ffn, x = model.model.layers[0].mlp, torch.randn(2, 5, 128)
    with adaptive.patch(model, adaptive.TokenRouting(widths=0.5)):
        traced = torch.jit.trace(ffn, x)
        assert torch.equal(traced(x * 3), ffn(x * 3))
    with adaptive.patch(model, policy(router=router(layers=(0,)))):
        with pytest.raises(NotImplementedError, match=r"cannot run under.* torch\.jit"):
            torch.jit.trace(ffn, x)
        assert ffn(x).isfinite().all()


def test_with_other_policies():
    model, ids = make("llama"), token_ids(tokens=12)
    expected = greedy(masked("llama", router()), ids)
    for others in (
        [adaptive.EarlyExit(layers=(1,), threshold=2.0)],
        [adaptive.LocalAttention(window=64, layers=(0, 1))],
    ):
        for policies in ([*others, policy()], [policy(), *others]):
            with adaptive.patch(model, *policies):
                assert torch.equal(greedy(model, ids), expected)
    weights = RouterWeights(layers=(1,), weight=((0.5,) * 128,))
    for other in (
        adaptive.SelfSpeculative(exit_layer=1),
        adaptive.MixtureOfDepths(router=weights),
        policy(),
    ):
        for policies in ([other, policy()], [policy(), other]):
            with pytest.raises(ValueError, match="cannot be combined"):
                adaptive.patch(model, *policies)


@torch.no_grad()
def test_nan_names_the_layer():
    model, ids = make("llama"), token_ids(tokens=5)
    model.model.layers[1].post_attention_layernorm.weight[3] = torch.nan
    for given in (policy(), policy(widths=(0, 1), router=RouterWeights.random((0, 1), 128))):
        with (
            adaptive.patch(model, given),
            pytest.raises(ValueError, match="scores of layer 1 must be numbers, got NaN"),
        ):
            model(ids)
