"""Compiled and traced forms of models that generate by passes of their own: refused, or the same.

PyTorch swallows what is raised while it makes a graph that may break, and goes on without one; so
each form is tried with whole graphs and without.
"""

import pytest
import torch
from early_exit_cases import SOME
from models import greedy, token_ids
from refused_calls import Logits
from speculation_cases import drafting
from transformers import DynamicCache

import adaptive
from adaptive.layers.hf_compiled import is_compiled

IDS = token_ids(1)
STATIC = adaptive.SelfSpeculative(exit_layer=2, draft=3, static=True)
DRAFTING = adaptive.SelfSpeculative(exit_layer=2, draft=3)
LEAVING = adaptive.EarlyExit(**SOME, audit=None)
EACH = {
    "static": STATIC,
    "exit": DRAFTING,
    "skip": adaptive.SelfSpeculative(skip=((2,), (2, 3)), draft=3),
    "tree": adaptive.SelfSpeculative(tree=True),
    "early exit": LEAVING,
}
each_policy = pytest.mark.parametrize("policy", EACH.values(), ids=EACH)
whole_or_not = pytest.mark.parametrize("whole", [True, False], ids=["whole", "parts"])


class Tokens(Logits):
    """What it makes of them."""

    def forward(self, ids):
        return greedy(self.model, ids, 3)


def compiled_call(model, **how):
    return torch.compile(model.generate, **how)


def in_a_function(model, **how):
    return torch.compile(lambda *given, **options: model.generate(*given, **options), **how)


@each_policy
@whole_or_not
@pytest.mark.parametrize("form", [compiled_call, in_a_function])
def test_a_compiled_generate_is_refused_and_leaves_all_as_it_was(policy, whole, form):
    model, cache = drafting("llama"), DynamicCache()
    config, plain = model.config.to_dict(), greedy(model, IDS)
    with adaptive.patch(model, policy) as patched:
        want = greedy(model, IDS)
        patched.reset_stats()
        kind = torch._dynamo.exc.Unsupported if whole else NotImplementedError
        name = type(policy).__name__
        words = f"{name}: generate cannot run under torch.compile.* as it"
        for _ in range(2):  # the second time PyTorch knows that it makes no graph of it
            with pytest.raises(kind, match=words):
                form(model, fullgraph=whole, backend="eager")(
                    IDS, max_new_tokens=8, past_key_values=cache
                )
        assert patched.report().forward_calls == 0
        assert not cache.layers
        assert torch.equal(greedy(model, IDS), want)
    assert model.config.to_dict() == config
    assert torch.equal(greedy(model, IDS), plain)
    if policy is not LEAVING:
        assert torch.equal(want, plain)


@whole_or_not
def test_a_mode_changes_nothing_of_that(whole):
    pytest.importorskip("torch._inductor.cudagraph_trees")  # its reset imports it, and stumbles
    model = drafting("llama")
    with adaptive.patch(model, STATIC):
        call = torch.compile(model.generate, mode="reduce-overhead", fullgraph=whole)
        with pytest.raises(Exception, match=r"generate cannot run under torch\.compile"):
            call(IDS, max_new_tokens=8)


def compile_model(model, **how):
    model.compile(**how)


def compile_forward(model, **how):
    model.forward = torch.compile(model.forward, **how)


def compile_base(model, **how):
    model.model.compile(**how)


def compile_layers(model, **how):
    for layer in model.model.layers:
        layer.compile(**how)


def compile_attention(model, **how):
    model.model.layers[1].self_attn.compile(**how)


MODULES = {
    compile_model: "LlamaForCausalLM at ''",
    compile_forward: "LlamaForCausalLM at ''",
    compile_base: "LlamaModel at 'model'",
    compile_layers: "LlamaDecoderLayer at 'model.layers.0'",
    compile_attention: r"LlamaAttention at 'model.layers.1.self_attn'",
}


@each_policy
@whole_or_not
@pytest.mark.parametrize(
    ("change", "where"), MODULES.items(), ids=lambda m: getattr(m, "__name__", "")
)
def test_compiled_modules_that_hold_attention_are_named(policy, whole, change, where):
    model = drafting("llama")
    with adaptive.patch(model, policy) as patched:
        want = greedy(model, IDS)
        change(model, backend="eager", fullgraph=whole)
        name = type(policy).__name__
        with pytest.raises(NotImplementedError, match=f"{name}: .* got a compiled {where}"):
            greedy(model, IDS)
        with pytest.raises(NotImplementedError, match=f"generate_many: .* got a compiled {where}"):
            patched.generate_many([IDS[0]], max_new_tokens=2)
        for module in model.modules():
            module._compiled_call_impl = None
            if is_compiled(module):
                del module.forward
        assert torch.equal(greedy(model, IDS), want)


@whole_or_not
@pytest.mark.parametrize("change", [compile_model, compile_forward, compile_base])
def test_what_was_compiled_before_is_refused_too(whole, change):
    model = drafting("llama")
    change(model, backend="eager", fullgraph=whole)
    with (
        adaptive.patch(model, STATIC),
        pytest.raises(NotImplementedError, match="got a compiled Llama"),
    ):
        greedy(model, IDS)


def test_a_class_whose_forward_is_compiled_is_refused(monkeypatch):
    model = drafting("llama")
    kind = type(model.model.layers[0])
    monkeypatch.setattr(kind, "forward", torch.compiler.disable(kind.forward))
    with adaptive.patch(model, DRAFTING):
        want = greedy(model, IDS)
    monkeypatch.undo()
    assert torch.equal(greedy(model, IDS), want)
    monkeypatch.setattr(kind, "forward", torch.compile(kind.forward, backend="eager"))
    with (
        adaptive.patch(model, DRAFTING),
        pytest.raises(NotImplementedError, match="got a compiled LlamaDecoderLayer"),
    ):
        greedy(model, IDS)


@whole_or_not
@pytest.mark.parametrize("policy", [STATIC, DRAFTING, LEAVING], ids=["static", "exit", "leaving"])
def test_what_torch_compile_returns_generates_as_the_model_does(policy, whole):
    model = drafting("llama")
    with torch.no_grad():
        logits = model(IDS).logits
    with adaptive.patch(model, policy):
        want = greedy(model, IDS)
        compiled = torch.compile(model, backend="eager", fullgraph=whole)
        assert torch.equal(greedy(compiled, IDS), want)
        with torch.no_grad():
            torch.testing.assert_close(compiled(IDS).logits, logits)
    if policy is not LEAVING:
        assert torch.equal(greedy(model, IDS), want)


@whole_or_not
@pytest.mark.parametrize("policy", [STATIC, DRAFTING, LEAVING], ids=["static", "exit", "leaving"])
def test_other_compiled_modules_go_along_but_for_static_steps(policy, whole):
    model = drafting("llama")
    with adaptive.patch(model, policy):
        want = greedy(model, IDS)
        for layer in model.model.layers:
            layer.mlp.compile(backend="eager", fullgraph=whole)
        if policy is STATIC:
            with pytest.raises(NotImplementedError, match=r"compiled 'model.layers.0.mlp'"):
                greedy(model, IDS)
        else:
            assert torch.equal(greedy(model, IDS), want)


def test_compiled_modules_that_drafts_skip_are_refused():
    model = drafting("llama")
    with adaptive.patch(model, EACH["skip"]):
        model.model.layers[0].mlp.compile(backend="eager", fullgraph=True)
        with pytest.raises(NotImplementedError, match=r"LlamaMLP at 'model.layers.0.mlp'"):
            greedy(model, IDS)


def test_what_is_kept_from_a_graph_runs():
    model = drafting("llama")
    with adaptive.patch(model, DRAFTING):
        want = greedy(model, IDS)
        alone = torch.compiler.disable(lambda ids: greedy(model, ids))
        made = torch.compile(lambda ids: alone(ids) + 1, backend="eager")(IDS)
        assert torch.equal(made - 1, want)


def test_a_compiled_model_runs_outside_of_the_policy():
    model = drafting("llama")
    want = greedy(model, IDS, 2)
    with adaptive.patch(model, STATIC) as patched, patched.disabled():
        model.compile(backend="eager")
        assert torch.equal(greedy(model, IDS, 2), want)


def test_attention_of_static_steps_is_not_compiled_by_a_way_around():
    model = drafting("llama")
    with adaptive.patch(model, STATIC):
        attention = model.model.layers[0].self_attn
        compiled = torch.compile(attention.forward, backend="eager", fullgraph=True)
        attention.forward = lambda **given: compiled(**given)
        words = r"SelfSpeculative\(static=True\) cannot run under torch.compile"
        with pytest.raises(torch._dynamo.exc.Unsupported, match=words):
            greedy(model, IDS)
        del attention.forward
        assert greedy(model, IDS).shape == (1, 28)


@each_policy
@pytest.mark.filterwarnings("ignore:Converting a tensor", "ignore:`is_gradient_checkpointing`")
def test_traces_and_exports_hold_a_pass_but_no_generation(policy):
    model = drafting("llama")
    with torch.no_grad():
        logits = model(IDS).logits
        with adaptive.patch(model, policy):
            want = greedy(model, IDS)
            for trace in (
                lambda module: torch.jit.trace(module, IDS, check_trace=False),
                lambda module: torch.export.export(module, (IDS,)).module(),
            ):
                assert torch.equal(trace(Logits(model))(IDS), logits)
                with pytest.raises(NotImplementedError, match="generate cannot run under"):
                    trace(Tokens(model))
            assert torch.equal(greedy(model, IDS), want)


@whole_or_not
def test_a_compiled_generate_many_is_refused(whole):
    with adaptive.patch(drafting("llama"), DRAFTING) as patched:
        want = patched.generate_many([IDS[0]], max_new_tokens=2)
        call = torch.compile(patched.generate_many, fullgraph=whole, backend="eager")
        kind = torch._dynamo.exc.Unsupported if whole else NotImplementedError
        with pytest.raises(kind, match=r"generate_many: it cannot run under torch\.compile"):
            call([IDS[0]], max_new_tokens=2)
        assert torch.equal(patched.generate_many([IDS[0]], max_new_tokens=2)[0], want[0])
