"""patch(): all checks first, all or nothing, clear refusals, nothing shared with other models."""

import pytest
import torch
from models import greedy, make, token_ids
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import adaptive
from adaptive.layers import changes
from adaptive.policy import plan as plans


def fingerprint(model):
    """Everything that patch() could change, by module, compared by identity where it matters."""
    return [
        (
            name,
            type(module),
            id(module),
            sorted(module.__dict__),
            id(module.__dict__.get("config")),
            *(tuple(getattr(module, table).values()) for table in changes.HOOK_TABLES),
        )
        for name, module in model.named_modules()
    ]


class Failing:
    """Stands in for the ``apply`` of changes: the n-th of them raises, before or after its work."""

    def __init__(self, step, moment, error):
        self.left, self.moment, self.error = step, moment, error

    def around(self, original):
        def apply(change, module):
            self.left -= 1
            if self.left >= 0 or self.moment == "after":
                original(change, module)
            if self.left < 0:
                raise self.error("injected")

        return apply


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_failure_at_any_step_leaves_the_model_as_it_was(monkeypatch, error, moment):
    model = make("llama")
    before, stock = fingerprint(model), greedy(model, token_ids())
    config = dict(model.config.__dict__)
    with adaptive.patch(model) as patched:
        steps = len(patched._record.log.entries)
    assert steps > 10
    for step in range(steps):
        failing = Failing(step, moment, error)
        with monkeypatch.context() as patches:
            for kind in (changes.AttributeChange, changes.HookChange):
                patches.setattr(kind, "apply", failing.around(kind.apply))
            with pytest.raises(error, match="injected"):
                adaptive.patch(model)
        assert fingerprint(model) == before, f"step {step}"
        assert model.config.__dict__ == config
    assert torch.equal(greedy(model, token_ids()), stock)
    adaptive.patch(model).unpatch()


def test_a_failure_after_the_last_step_leaves_the_model_as_it_was(monkeypatch):
    model = make("llama")
    before = fingerprint(model)
    with monkeypatch.context() as patches:
        patches.setattr("adaptive._native.calls", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            adaptive.patch(model)
    assert fingerprint(model) == before


def test_a_second_patch_is_refused_and_changes_nothing():
    model = make("llama")
    patched = adaptive.patch(model)
    before = fingerprint(model)
    with pytest.raises(adaptive.PatchConflict, match="patched already"):
        adaptive.patch(model)
    assert fingerprint(model) == before
    assert not adaptive.check(model).ok
    patched.unpatch()
    assert adaptive.check(model).ok
    adaptive.patch(model).unpatch()


def test_an_unknown_family_is_an_error_that_helps():
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    config.model_type = "mystery"
    model = LlamaForCausalLM(config)
    with pytest.raises(adaptive.UnknownFamily) as caught:
        adaptive.patch(model)
    text = str(caught.value)
    assert "'mystery'" in text
    assert "llama, mistral" in text
    assert "register_family" in text
    assert isinstance(caught.value, NotImplementedError)
    assert isinstance(caught.value, LookupError)


def test_a_registered_family_is_patched(monkeypatch):
    from adaptive.adapters import FAMILIES

    monkeypatch.setitem(FAMILIES, "mystery", None)
    del FAMILIES["mystery"]
    model = make("llama")
    model.config.model_type = "mystery"
    adaptive.register_family(adaptive.Family(name="mine", model_types=("mystery",)))
    with adaptive.patch(model) as patched:
        greedy(model, token_ids())
        assert patched.report().family == "mine"
        assert patched.report().layers[1].native_calls > 0


REFUSED = [
    ("head size 16", {"head_dim": 16}, "head size 16 is not supported.*32..256"),
    ("head size 264", {"head_dim": 264}, "head size 264"),
    ("float64", {"dtype": torch.float64}, "dtype torch.float64 is not supported"),
    ("flash", {"implementation": "flex_attention"}, "'flex_attention' is not supported"),
    ("encoder", {"is_causal": False}, "is_causal=False"),
    ("no layers", {"num_hidden_layers": 0}, "no attention layer"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED, ids=[r[0] for r in REFUSED])
def test_what_is_not_supported_is_refused_by_name(name, options, message):
    model = make("llama", **options)
    before = fingerprint(model)
    support = adaptive.check(model)
    assert not support.ok
    with pytest.raises(adaptive.UnsupportedModel, match=message):
        adaptive.patch(model)
    assert fingerprint(model) == before


def test_a_classifier_is_refused_with_the_reason():
    model = LlamaForSequenceClassification(make("llama").config)
    with pytest.raises(adaptive.UnsupportedModel, match=r"'lm_head'\n.*never decodes.*ForCausalLM"):
        adaptive.patch(model)
    adaptive.patch(model.model).unpatch()


def test_settings_of_a_family_are_refused_by_name():
    model = make("gpt2", implementation="eager", reorder_and_upcast_attn=True)
    with pytest.raises(adaptive.UnsupportedModel, match="reorder_and_upcast_attn=True"):
        adaptive.patch(model)
    model = make("gemma3", use_bidirectional_attention=True)
    with pytest.raises(adaptive.UnsupportedModel, match="use_bidirectional_attention=True"):
        adaptive.patch(model)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make("llama").config)
    with pytest.raises(adaptive.UnsupportedModel, match="device 'meta'"):
        adaptive.patch(model)


def test_check_says_what_is_there_and_changes_nothing():
    model = make("llama")
    before = fingerprint(model)
    support = adaptive.check(model, adaptive.Exact())
    assert support.ok
    assert support.error is None
    assert "2 layers, 4 query heads, 2 KV heads, head size 32" in str(support)
    assert fingerprint(model) == before
    bad = adaptive.check(make("llama", dtype=torch.float64))
    assert bad.advice
    assert "cannot be patched" in str(bad)


@pytest.mark.parametrize("wrong", ["exact", 3, None, adaptive.Exact])
def test_arguments_of_the_wrong_type(wrong):
    with pytest.raises(TypeError, match="must be"):
        adaptive.patch(make("llama"), wrong)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        adaptive.patch(wrong)


def test_wrappers_that_hide_the_model_are_refused_by_name():
    model = make("llama")
    wrappers = [nn.DataParallel(model), torch.compile(model, backend="eager")]
    before = fingerprint(model)
    for wrapped, name in zip(wrappers, ("DataParallel", "OptimizedModule"), strict=True):
        with pytest.raises(adaptive.UnsupportedModel, match=name):
            adaptive.patch(wrapped)
    assert fingerprint(model) == before


def test_a_model_inside_a_module_of_the_user_is_found():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make("llama")

        def forward(self, ids):
            return self.inner(ids).logits

    wrapper = Wrapper()
    patched = adaptive.patch(wrapper)
    assert patched.model is wrapper
    greedy(wrapper.inner, token_ids())
    assert patched.report().layers[0].native_calls > 0
    assert adaptive.patched(wrapper).unpatch() is wrapper
    pair = nn.ModuleList([make("llama"), make("gpt2")])
    with pytest.raises(adaptive.UnsupportedModel, match="several models"):
        adaptive.patch(pair)


def test_a_model_without_a_head_is_patched():
    torch.manual_seed(0)
    model = AutoModel.from_config(make("gpt2").config).eval()
    ids = token_ids(tokens=8)
    with torch.no_grad():
        stock = model(ids).last_hidden_state
        with adaptive.patch(model) as patched:
            ours = model(ids).last_hidden_state
            assert patched.report().layers[0].native_calls == 1
            assert patched.report().forward_calls == 1
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def test_the_plan_is_what_the_layers_read():
    model = make("llama")
    with adaptive.patch(model, adaptive.Exact(stock_layers=(0,))) as patched:
        greedy(model, token_ids(), tokens=5)
        first, second = patched.report().layers
    assert (first.native_calls, first.stock_calls) == (0, {"plan": 5})
    assert (second.native_calls, second.mode) == (4, plans.DENSE)
    too_deep = adaptive.Exact(stock_layers=(7,))
    with pytest.raises(ValueError, match="below the model's 2 layers, got 7") as caught:
        adaptive.patch(model, too_deep)
    assert "exact.py" in str(caught.traceback[-1].path)  # the policy is where to look
    support = adaptive.check(model, too_deep)
    assert support.error is ValueError
    assert support.problems == (str(caught.value),)


def test_a_plan_is_accepted_for_its_own_shape_of_model_alone(tmp_path):
    model = make("llama")
    with adaptive.patch(model, adaptive.Exact(stock_layers=(1,))) as patched:
        patched.plan.save(tmp_path / "plan.json")
    plan = adaptive.Plan.load(tmp_path / "plan.json")
    with adaptive.patch(model, plan) as patched:
        assert patched.plan == plan
        assert patched.report().policies == ("Exact(stock_layers=(1,))",)
    other = make("llama", num_hidden_layers=3)
    before = fingerprint(other)
    with pytest.raises(adaptive.PlanMismatch, match="heads"):
        adaptive.patch(other, plan)
    assert not adaptive.check(make("qwen3"), plan).ok
    assert fingerprint(other) == before
    for call in (adaptive.patch, adaptive.check):
        with pytest.raises(TypeError, match="one Plan"):
            call(model, plan, adaptive.Exact())
