"""calibrate: what it finds, that it leaves the model alone, and what it refuses."""

import copy
import functools
from pathlib import Path

import pytest
import torch
from models import CONFIGS, make, token_ids
from rich.console import Console

import adaptive
from adaptive.calibrate_layers import QUERIES
from adaptive.calibrate_run import repeated_tokens
from adaptive.errors import PatchConflict, PlanMismatch, UnknownFamily, UnsupportedModel
from adaptive.ops import head_scores
from adaptive.policy import Exact, Quest, RazorAttention, StreamingLLM, TidalDecode

LAB = Path(__file__).parents[1] / "bench" / "lab" / "model"
LAYERS = 5
BOTH = (TidalDecode(dense_layers=(0,)), RazorAttention(dense_layers=(0,)))


def deep(case="llama", **fields):
    name = "n_layer" if case == "gpt2" else "num_hidden_layers"
    return make(case, **{name: LAYERS, **fields})


@pytest.fixture(scope="module")
def model():
    return deep()


@pytest.fixture(scope="module")
def lab():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(LAB, local_files_only=True).eval()


def test_the_prompt_repeats_random_tokens(model):
    ids, period = repeated_tokens(model, 101)
    assert (ids.shape, period) == ((1, 101), 25)
    copies = ids[0, 1:].view(4, 25)
    assert (copies == copies[0]).all()
    assert len(copies[0].unique()) == 25
    assert int(ids[0, 0]) == model.config.bos_token_id
    assert not {0, 1} & set(copies[0].tolist())
    longest, period = repeated_tokens(model, 10**6)
    assert longest.shape[1] <= model.config.max_position_embeddings
    assert period == 63


def captured(model, ids):
    """Queries and keys of each layer, from attention weights' own inputs."""
    from transformers import AttentionInterface

    seen = []

    def spy(module, query, key, value, mask, **kwargs):
        seen.append((query[0], key[0], kwargs.get("scaling")))
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("spy", spy)
    other = copy.deepcopy(model)
    other.config._attn_implementation = "spy"
    with torch.no_grad():
        hidden = other(ids, use_cache=False, output_hidden_states=True).hidden_states
    return seen, hidden


def test_scores_are_those_of_the_plain_model(model):
    plan = adaptive.calibrate(model, BOTH, tokens=129)
    ids, period = repeated_tokens(model, 129)
    seen, hidden = captured(model, ids)
    for layer, (query, key, scale) in enumerate(seen):
        echo, induction = head_scores(query, key, period, 1, scale)
        for name, scores in (("echo", echo), ("induction", induction)):
            best = scores.view(key.shape[0], -1).amax(1)
            torch.testing.assert_close(plan.scores[name][layer], best, rtol=1e-4, atol=1e-6)
    for layer in range(LAYERS - 1):  # after the last layer comes the norm
        before, after = (hidden[layer + i][0, -QUERIES:].double() for i in range(2))
        turned = 1 - torch.cosine_similarity(before, after, dim=-1).mean()
        assert float(plan.scores["importance"][layer]) == pytest.approx(float(turned), abs=1e-5)


def test_the_planted_heads_of_the_lab_model_are_found(lab):
    plan = adaptive.calibrate(lab, RazorAttention(), tokens=1024)
    induction = plan.scores["induction"]
    assert divmod(int(induction.argmax()), 2) == (2, 0)  # query heads 0 and 1 share this KV head
    assert induction[2, 0] > 0.7
    assert (2, 0) in plan.policies[0].heads
    assert plan.rows[2] == ("dense", "razor")


def test_layers_of_the_lab_model(lab):
    plan = adaptive.calibrate(lab, TidalDecode(), tokens=1024)
    assert plan.policies[0].select_layers[0] == 2
    assert len(plan.policies[0].select_layers) == 2
    three = adaptive.calibrate(lab, TidalDecode(select_layers=(2, 4, 6)), tokens=1024)
    assert len(three.policies[0].select_layers) == 3
    shares = plan.scores["similarity"]
    assert (shares.diagonal()[2:] >= shares.triu(1)[2:].amax(0)[2:]).all()


def snapshot(model):
    modules = dict(model.named_modules())
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in modules.items()}
    keys = {name: sorted(module.__dict__) for name, module in modules.items()}
    configs = {n: id(m.config) for n, m in modules.items() if hasattr(m, "config")}
    return hooks, keys, configs, dict(vars(model.config))


RUNS = [
    *((case, "sdpa") for case in CONFIGS if case not in ("gemma2", "mistral_window")),
    *((case, "eager") for case in ("gemma2", "gemma3", "gpt_neox", "llama")),
]


@pytest.mark.parametrize(("case", "implementation"), RUNS)
def test_every_family_is_left_bit_for_bit_as_it_was(case, implementation):
    layers = {"num_hidden_layers": 12} if case == "gemma3" else {}  # every sixth sees all tokens
    one = deep(case, implementation=implementation, **layers)
    ids = token_ids()
    with torch.no_grad():
        before = one(ids).logits
    weights, seen = copy.deepcopy(one.state_dict()), snapshot(one)
    random = torch.get_rng_state()
    plan = adaptive.calibrate(one, BOTH, tokens=65)
    with adaptive.patch(one, plan) as patched:
        assert patched.plan == plan
    assert snapshot(one) == seen
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, weights[name])
    with torch.no_grad():
        assert torch.equal(one(ids).logits, before)


def test_a_model_whose_layers_all_have_windows_is_refused():
    with pytest.raises(ValueError, match="leave one layer that selects and one that reuses"):
        adaptive.calibrate(deep("mistral_window"), BOTH)


def test_a_failing_pass_leaves_the_model_as_it_was(model):
    seen = snapshot(model)
    layer = model.model.layers[2]
    mlp, layer._modules["mlp"] = layer.mlp, torch.nn.Identity().eval()
    handle = layer._modules["mlp"].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adaptive.calibrate(model, BOTH, tokens=65)
    handle.remove()
    layer._modules["mlp"] = mlp
    assert snapshot(model) == seen


def test_the_same_twice_and_through_a_file(model, tmp_path):
    plan = adaptive.calibrate(model, BOTH, tokens=65)
    plan.save(tmp_path / "plan.json")
    again = adaptive.calibrate(model, BOTH, tokens=65)
    loaded = adaptive.Plan.load(tmp_path / "plan.json")
    assert plan == again == loaded
    for name, score in plan.scores.items():
        assert torch.equal(score, again.scores[name])
        assert torch.equal(score, loaded.scores[name])
    with adaptive.patch(model, loaded) as patched:
        assert str(loaded) == patched.report().plan


def test_a_plan_of_other_weights_is_refused_with_what_differs(model):
    plan = adaptive.calibrate(model, BOTH, tokens=65)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[3].mlp.up_proj.weight.add_(1)
    message = "calibrated on other weights: 1 of 7 parts of the model differ, layer 3;"
    with pytest.raises(PlanMismatch, match=message):
        adaptive.patch(other, plan)
    assert not adaptive.check(other, plan).ok
    with pytest.raises(PlanMismatch, match="shape, rest, layer 0"):
        plan.check_fingerprint((("rest", "0"),))


def test_own_prompts_choose_layers(model):
    batches = [token_ids(tokens=80), {"input_ids": token_ids(tokens=70, seed=3)}]
    plan = adaptive.calibrate(model, BOTH, batches, tokens=65)
    random = adaptive.calibrate(model, BOTH, tokens=65)
    assert not torch.equal(plan.scores["similarity"], random.scores["similarity"])
    assert torch.equal(plan.scores["induction"], random.scores["induction"])
    rows = [row[None] for batch in (batches[0], batches[1]["input_ids"]) for row in batch]
    single = [adaptive.calibrate(model, BOTH[0], [row]).scores["similarity"] for row in rows]
    torch.testing.assert_close(plan.scores["similarity"], torch.stack(single).mean(0))


def test_policies_without_numbers_to_find_pass_through(model):
    policies = [Exact(stock_layers=(0,)), StreamingLLM(layers=(4,)), TidalDecode()]
    plan = adaptive.calibrate(model, policies, tokens=65)
    assert plan.policies[:2] == tuple(policies[:2])
    assert 4 not in plan.policies[2].select_layers
    nothing = adaptive.calibrate(model, Quest())
    assert nothing.scores is None
    assert nothing.fingerprint is not None


BAD = {
    "tokens": ({"tokens": 8}, ValueError, "tokens must be a whole number from 32 on, got 8"),
    "bool": ({"tokens": True}, ValueError, "tokens must be"),
    "short": ({"batches": [token_ids(tokens=9)]}, ValueError, "must have 32 tokens or more, got 9"),
    "empty": ({"batches": []}, ValueError, "batches must hold a prompt, got none"),
    "text": ({"batches": ["once"]}, TypeError, r"token ids \[batch, tokens\], got str"),
    "a tensor": (
        {"batches": torch.zeros(1, 64, dtype=torch.long)},
        TypeError,
        r"token ids \[batch, tokens\], got torch.int64 \[64\]",
    ),
    "floats": ({"batches": [torch.rand(1, 40)]}, TypeError, "token ids"),
    "padding": (
        {"batches": [{"input_ids": token_ids(), "attention_mask": torch.zeros(2, 20)}]},
        ValueError,
        "32 tokens or more",
    ),
    "no policies": ({"policies": []}, ValueError, "policies must name at least one policy"),
    "no policy": ({"policies": ["tidal"]}, TypeError, "policies must be Policy objects, got str"),
    "together": ({"policies": [TidalDecode(), Quest()]}, ValueError, "cannot be combined"),
    "for nobody": (
        {"policies": RazorAttention(), "batches": [token_ids(tokens=40)]},
        ValueError,
        "batches must be None without TidalDecode",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(case, model):
    given, error, message = BAD[case]
    with pytest.raises(error, match=message):
        adaptive.calibrate(**{"model": model, "policies": BOTH, **given})


def test_padding_is_refused(model):
    ids = token_ids(tokens=40)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="must have no padding"):
        adaptive.calibrate(model, BOTH, [{"input_ids": ids, "attention_mask": mask}])


def test_models_that_cannot_be_calibrated_are_refused(model):
    with adaptive.patch(model), pytest.raises(PatchConflict):
        adaptive.calibrate(model, BOTH)
    with pytest.raises(UnsupportedModel, match="only decoders of transformers"):
        adaptive.calibrate(torch.nn.MultiheadAttention(64, 2).eval(), BOTH)
    with pytest.raises(ValueError, match="eval mode"):
        adaptive.calibrate(copy.deepcopy(model).train(), BOTH)
    strange = copy.deepcopy(model)
    strange.config.model_type = "strange"
    with pytest.raises(UnknownFamily, match="strange"):
        adaptive.calibrate(strange, BOTH)


@pytest.mark.parametrize(
    ("terminal", "wanted", "after", "shown"),
    [
        (True, True, 0.0, True),
        (True, True, 100.0, False),
        (True, False, 0.0, False),
        (False, True, 0.0, False),
    ],
)
def test_a_bar_shows_when_it_takes_long(model, monkeypatch, capsys, terminal, wanted, after, shown):
    console = functools.partial(Console, force_terminal=terminal)
    monkeypatch.setattr("adaptive.progress.Console", console)
    monkeypatch.setattr("adaptive.progress.SHOW_AFTER_SECONDS", after)
    adaptive.calibrate(model, BOTH, tokens=65, progress=wanted)
    err = capsys.readouterr().err
    assert ("calibrating" in err) == shown
    assert shown or err == ""


def test_a_layer_is_left_to_reuse_what_is_selected():
    model = make("llama", num_hidden_layers=4)
    plan = adaptive.calibrate(model, TidalDecode(), tokens=64, progress=False)
    assert [row[0] for row in plan.rows] == ["dense", "dense", "select", "reuse"]
