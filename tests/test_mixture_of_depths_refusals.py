"""What MixtureOfDepths is refused for, aloud: models, policies beside it, and calls."""

import copy
import pickle

import pytest
import torch
from encoder_models import make as make_encoder
from models import greedy, padded, token_ids
from refused_calls import Logits
from routed_models import ROUTED, deep, forward, router
from torch import nn

import adaptive
from adaptive import MixtureOfDepths, RouterWeights

DROP = MixtureOfDepths.drop(ROUTED)


def test_models_that_are_no_decoders():
    for model in (make_encoder("vit"), nn.MultiheadAttention(64, 2).eval()):
        with pytest.raises(adaptive.UnsupportedModel, match="MixtureOfDepths does not fit: it is"):
            adaptive.patch(model, DROP)


@pytest.mark.parametrize(
    ("case", "policy", "message"),
    [
        ("llama", MixtureOfDepths.drop((4,)), "layers must be below the model's 4 layers, got 4"),
        ("llama", MixtureOfDepths.drop((0, 2)), "layers must leave out the first layer, and the"),
        ("gemma2", MixtureOfDepths.drop((1,)), "layers must leave out the first layer, and the"),
        (
            "llama",
            MixtureOfDepths.mindskip(RouterWeights.random((2,), 64)),
            "router must be for states of width 128, got 64",
        ),
        (
            "gpt2",
            MixtureOfDepths.gamma_mod(RouterWeights.random((2,), 128)),
            "positions must be 'original': this model has no rotary_emb",
        ),
        (
            "gemma3",
            MixtureOfDepths.gamma_mod(RouterWeights.random((2,), 128)),
            "positions must be 'original': this model has no rotary_emb",
        ),
    ],
)
def test_what_is_not_in_the_model(case, policy, message):
    model = deep(case)
    before = set(model.__dict__)
    with pytest.raises(ValueError, match=f"MixtureOfDepths.{message}"):
        adaptive.patch(model, policy)
    assert set(model.__dict__) == before
    found = adaptive.check(model, policy)
    assert not found.ok
    assert message in found.problems[0]


def test_an_mlp_of_the_first_layer_may_be_routed():
    model = deep("llama")
    with adaptive.patch(model, MixtureOfDepths.drop((0,), unit="mlp")) as patched:
        forward(model, {"input_ids": token_ids()})
        assert patched.report().routing.layers[0].ran == 0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            adaptive.EarlyExit(layers=(2,), threshold=0.9),
            "both choose the layers that a token runs",
        ),
        (adaptive.SelfSpeculative(exit_layer=2), "both choose the layers that a token runs"),
        (adaptive.TidalDecode(budget=256), "a routed layer holds keys of some rows or tokens"),
        (adaptive.Quest(budget=256), "a routed layer holds keys of some rows or tokens"),
        (adaptive.StreamingLLM(), "a routed layer holds keys of some rows or tokens"),
        (adaptive.LocalAttention(window=8), "a routed layer holds keys of some rows or tokens"),
        (DROP, "a second MixtureOfDepths cannot be combined"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_policies_that_have_no_meaning_beside_it(other, message):
    for policies in ((DROP, other), (other, DROP)):
        with pytest.raises(ValueError, match=message):
            adaptive.patch(deep("llama"), *policies)


def test_exact_attention_beside_it_changes_nothing():
    model, given = deep("llama"), padded(3)
    with adaptive.patch(model, DROP):
        wanted = forward(model, given)
    with adaptive.patch(model, adaptive.Exact(), DROP):
        assert torch.equal(forward(model, given), wanted)


def test_scores_that_are_no_numbers_name_the_layer():
    model = deep("llama")
    bad = model.get_input_embeddings().register_forward_hook(lambda *_: _[2] * float("nan"))
    for decide in ("sequence", "token"):
        policy = MixtureOfDepths(router=router(model), decide=decide)
        with (
            adaptive.patch(model, policy),
            pytest.raises(ValueError, match="scores of layer 2 must be numbers, got NaN"),
        ):
            forward(model, {"input_ids": token_ids()})
    bad.remove()


def test_one_token_and_one_row():
    model = deep("llama")
    for fields in ({"decide": "sequence"}, {"capacity": 0.125}, {"threshold": 0.5}):
        policy = MixtureOfDepths(router=router(model), **fields)
        with adaptive.patch(model, policy):
            assert forward(model, {"input_ids": token_ids(1, 1)}).isfinite().all()
            greedy(model, token_ids(1, 1), 5)


def test_masks_that_do_not_tell_padding():
    model = deep("llama")
    mask = torch.zeros(2, 1, 20, 20)
    with (
        adaptive.patch(model, DROP),
        pytest.raises(ValueError, match=r"attention_mask must be \[batch, tokens\] with Mixture"),
    ):
        forward(model, {"input_ids": token_ids(), "attention_mask": mask})


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("fields", [{}, {"decide": "sequence"}], ids=str)
def test_graphs(fields, whole):
    model = deep("llama")
    policy = MixtureOfDepths(router=router(model), **fields)
    refused = pytest.raises(Exception, match="MixtureOfDepths cannot run under torch")
    with adaptive.patch(model, policy), torch.no_grad():
        with refused:
            torch.compile(model, backend="eager", fullgraph=whole)(token_ids())
        assert model(token_ids()).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("decide", ["sequence", "token"])
def test_traces_would_keep_what_is_decided(decide):
    model = deep("llama")
    policy = MixtureOfDepths(router=router(model), decide=decide, audit_every=None)
    with adaptive.patch(model, policy), torch.no_grad():
        with pytest.raises(NotImplementedError, match=r"MixtureOfDepths cannot run.* torch\.jit"):
            torch.jit.trace(Logits(model), token_ids(), check_trace=False)
        assert model(token_ids()).logits.isfinite().all()


def test_attention_weights_and_training():
    model = deep("llama")
    with adaptive.patch(model, DROP):
        with pytest.raises(NotImplementedError, match="output_attentions is not supported with"):
            model(token_ids(), output_attentions=True)
        model.train()
        with pytest.raises(NotImplementedError, match="MixtureOfDepths is for inference"):
            model(token_ids())
        model.eval()


@pytest.mark.parametrize("fields", [{"decide": "sequence"}, {"threshold": 0.5}], ids=str)
def test_gradients_of_a_pass_are_those_of_what_ran(fields):
    model = deep("llama")
    policy = MixtureOfDepths(router=router(model), **fields)
    with adaptive.patch(model, policy):
        wanted = forward(model, {"input_ids": token_ids(3)})
        ours = model(token_ids(3)).logits
        assert torch.allclose(ours, wanted, atol=1e-5)
        ours.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    model.zero_grad()


@pytest.mark.parametrize("fields", [{"decide": "sequence"}, {"threshold": 0.5}], ids=str)
def test_caches_of_others(fields):
    from transformers import DynamicCache, StaticCache

    model = deep("llama")
    policy = MixtureOfDepths(router=router(model, seed=1), **fields)
    with adaptive.patch(model, policy) as patched, torch.no_grad():
        with patched.disabled():
            full = model(token_ids(4), use_cache=True).past_key_values
        with pytest.raises(NotImplementedError, match="a cache that it filled from the start"):
            model(token_ids(4, 1), past_key_values=full)
        ours = DynamicCache()
        model(token_ids(4), past_key_values=ours)
        with (
            patched.disabled(),
            pytest.raises(NotImplementedError, match="this cache belongs to MixtureOfDepths"),
        ):
            model(token_ids(4, 1), past_key_values=ours)
        static = StaticCache(config=model.config, max_cache_len=64)
        with pytest.raises(NotImplementedError, match="needs a DynamicCache"):
            model(token_ids(4), past_key_values=static)
        with pytest.raises(NotImplementedError, match=r"needs a DynamicCache .*, got StaticCache"):
            model.generate(token_ids(4), max_new_tokens=2, cache_implementation="static")
    kept = MixtureOfDepths(router=router(model), threshold=0.5, kv="kept")
    with adaptive.patch(model, kept), pytest.raises(NotImplementedError, match="use_cache must be"):
        model(token_ids(4), use_cache=False)


def test_caches_of_policies_that_hold_other_keys():
    """Keys of skipped rows, of skipped tokens, or turned by other places are not there."""
    model = deep("llama")
    weights = router(model, seed=1)
    forms = [
        MixtureOfDepths(router=weights, unit="attention", decide="sequence"),
        MixtureOfDepths(router=weights, unit="mlp", decide="sequence"),
        *(MixtureOfDepths(router=weights, kv=kv) for kv in ("dropped", "kept")),
        MixtureOfDepths(router=weights, positions="compact"),
    ]
    caches = []
    for policy in forms:
        with adaptive.patch(model, policy), torch.no_grad():
            caches.append(model(token_ids(4), use_cache=True).past_key_values)
    for one, policy in enumerate(forms):
        with adaptive.patch(model, policy), torch.no_grad():
            for other, cache in enumerate(caches):
                if one != other:
                    with pytest.raises(NotImplementedError, match="Layer of another policy; start"):
                        model(token_ids(4, 1), past_key_values=cache)
    fewer = MixtureOfDepths(router=router(model, layers=(2,)))
    with (
        adaptive.patch(model, fewer),
        torch.no_grad(),
        pytest.raises(NotImplementedError, match="layer 3 is a TokenCacheLayer of another policy"),
    ):
        model(token_ids(4, 1), past_key_values=caches[2])
    with adaptive.patch(model, MixtureOfDepths(router=weights, threshold=0.4)), torch.no_grad():
        assert model(token_ids(4, 1), past_key_values=caches[2]).logits.isfinite().all()


def test_a_copy_of_a_routed_module_is_not_left_behind():
    model = deep("llama")
    with adaptive.patch(model, MixtureOfDepths.drop((2,), unit="mlp")) as patched:
        model.extra = copy.deepcopy(model.model.layers[2].mlp)
        with pytest.raises(adaptive.PatchConflict, match="'extra' came later, and is a copy"):
            patched.unpatch()
        del model.extra


def test_a_pass_that_an_exception_ended_is_in_no_copy():
    model = deep("llama")
    policy = MixtureOfDepths(router=router(model), positions="compact")
    with adaptive.patch(model, policy), torch.no_grad():
        wanted = model(token_ids()).logits
        hook = model.model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(token_ids())
        hook.remove()
        twin = pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(token_ids()).logits, wanted)
        assert torch.equal(model(token_ids()).logits, wanted)


def test_modules_with_a_forward_of_their_own():
    model = deep("llama")
    layer = model.model.layers[2]
    layer.forward = lambda *args, **kwargs: args[0]
    try:
        with pytest.raises(adaptive.UnsupportedModel, match="has a forward of its own"):
            adaptive.patch(model, MixtureOfDepths(router=router(model)))
    finally:
        del layer.forward
