"""What timm's models are refused for, aloud: classes, blocks, policies, and what a pass asks."""

import copy

import pytest
import torch
import transformers
from timm_models import SOURCES, images, make, timm

import adaptive
from adaptive.policy import FeedForwardExperts, TokenRouting

both_sources = pytest.mark.parametrize("source", SOURCES)
POLICIES = {
    "merging": adaptive.TokenMerging(r=4, audit_every=None),
    "pruning": adaptive.TokenPruning(keep=0.6, audit_every=None),
}
either_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def refused(model, *policies):
    """Why patch() refuses, which check() says, too; nothing is left in the model."""
    before = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(adaptive.UnsupportedModel) as caught:
        adaptive.patch(model, *policies)
    assert not adaptive.check(model, *policies).ok
    assert before == {name: sorted(module.__dict__) for name, module in model.named_modules()}
    return str(caught.value)


@both_sources
@pytest.mark.parametrize(
    "policy",
    [
        adaptive.EncoderExit(layer=2),
        adaptive.GlobalLocalAttention(window=8),
        adaptive.HeadRouting(heads=((0, 0),)),
        adaptive.EarlyExit(layers=(1,), threshold=0.5),
        adaptive.SelfSpeculative(exit_layer=2),
        TokenRouting(widths=0.5),
        FeedForwardExperts(),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_policies_that_know_no_part_of_it(source, policy):
    why = refused(make(source), policy)
    assert f"{type(policy).__name__} does not fit timm: of timm's models only TokenMerging" in why


@both_sources
def test_models_without_what_a_policy_needs(source):
    assert "has no class token" in refused(make(source, "mean"), POLICIES["pruning"])
    narrow = make(source, embed_dim=36, num_heads=2)
    with pytest.raises(ValueError, match="hidden size that is a multiple of 8, got 36"):
        adaptive.patch(narrow, POLICIES["merging"])
    with pytest.raises(ValueError, match=r"TokenMerging\.layers must be below 3"):
        adaptive.patch(make(source), adaptive.TokenMerging(r=1, layers=(3,)))
    model = make(source)
    two = torch.nn.ModuleList([model, copy.deepcopy(model)])
    assert "several models of timm inside (0, 1); patch each alone" in refused(two)


@both_sources
def test_methods_that_someone_replaced(source):
    def replaced(name, method):
        model = make(source)
        setattr(model.get_submodule(name), method, lambda x, **_: x)
        return refused(model, POLICIES["merging"])

    own = "of its own, set by someone else"
    assert f"forward_features {own}" in replaced("", "forward_features")
    assert f"blocks.2.attn has a forward {own}" in replaced("blocks.2.attn", "forward")
    assert f"'blocks.1' has a forward {own}" in replaced("blocks.1", "forward")


@both_sources
@pytest.mark.parametrize("part", ["", ".attn", ".attn.k_norm"])
def test_modules_that_run_several_times(source, part):
    model = make(source)
    model.set_submodule(f"blocks.2{part}", model.get_submodule(f"blocks.1{part}"))
    assert f"blocks.2{part} is blocks.1{part} once more" in refused(model, POLICIES["merging"])
    model = make(source)
    model.blocks[1].attn.k_norm = model.blocks[1].attn.q_norm
    assert "k_norm is blocks.1.attn.q_norm once more" in refused(model, POLICIES["pruning"])


@both_sources
@either_policy
@torch.no_grad()
def test_blocks_that_went_after_the_patch(source, policy):
    model = make(source)
    patched = adaptive.patch(model, policy)
    whole = model.blocks
    model.blocks = whole[:2]
    with pytest.raises(RuntimeError, match=r"must see the last of 4 layers, .* and 2 layers ran"):
        model(images())
    model.blocks = whole
    assert torch.isfinite(model(images())).all()
    patched.unpatch()


@both_sources
def test_classes_that_are_not_timm_s_own(source):
    def heir(name, **methods):
        model = make(source)
        module = model.get_submodule(name)
        module.__class__ = type("Mine", (type(module),), methods)
        return model

    def forward(self, x):
        return x

    for name in ("", "blocks.1", "blocks.1.attn"):  # an heir that changes nothing is as good
        adaptive.patch(heir(name), POLICIES["merging"]).unpatch()
    assert "forward_features of its own, which is not timm's" in refused(
        heir("", forward_features=forward)
    )
    assert "blocks.1 is a Mine, which does not run attention" in refused(
        heir("blocks.1", forward=forward)
    )
    assert "blocks.1.attn is a Mine, which does not attend as timm's" in refused(
        heir("blocks.1.attn", forward=forward)
    )
    model = heir("blocks.1.attn", forward=forward)
    kind = type(model.blocks[1].attn)
    kind.__name__, kind.__module__ = "Attention", "timm.layers.attention"  # as before 1.0.16
    assert "takes no attn_mask, where sizes of tokens go: timm 1.0.16" in refused(model)


@both_sources
@either_policy
@torch.no_grad()
def test_what_a_pass_cannot_give(source, policy):
    model = make(source)
    name = type(policy).__name__
    stock = model.forward_intermediates(images())[1]
    with adaptive.patch(model, policy) as patched:
        right = model(images())
        asked = {
            "attn_mask": lambda: model(images(), attn_mask=torch.zeros(65, 65)),
            "is_causal": lambda: model(images(), None, True),
            "forward_intermediates": lambda: model.forward_intermediates(images()),
        }
        for what, ask in asked.items():
            if source == "timm" and what == "is_causal":
                ask = lambda: model.forward_features(images(), is_causal=True)  # noqa: E731
            with pytest.raises(NotImplementedError, match=f"{what} is not supported with {name}"):
                ask()
        with patched.disabled():
            assert torch.equal(model.forward_intermediates(images())[1][1], stock[1])
        with pytest.raises(NotImplementedError, match=rf"{name} cannot run under torch\.jit\.tr"):
            torch.jit.trace(model, images(), check_trace=False)
        assert torch.equal(model(images()), right)


@both_sources
def test_blocks_that_run_again_for_gradients(source):
    model = make(source).train()
    model.grad_checkpointing = True
    with adaptive.patch(model, POLICIES["merging"]):
        with pytest.raises(NotImplementedError, match="checkpointing is not supported with TokenM"):
            model(images())
        with torch.no_grad():
            assert torch.isfinite(model(images())).all()


@both_sources
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("method", ["forward", "forward_features"])
@torch.no_grad()
def test_compiling(source, fullgraph, method):
    model = make(source)
    stock = model(images())
    with adaptive.patch(model, POLICIES["merging"]):
        merged = model(images())
        torch.compiler.reset()
        compiled = torch.compile(getattr(model, method), backend="eager", fullgraph=fullgraph)
        with pytest.raises(Exception, match=r"TokenMerging cannot run under torch\.compile"):
            compiled(images())
        assert torch.equal(model(images()), merged)
    with adaptive.patch(model):  # exact: nothing is in the way of a graph
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
        torch.testing.assert_close(compiled(images()), stock)


def test_other_models_are_known_by_the_names_of_their_classes():
    """As the package says them: it need not be installed."""
    names = {"__module__": "timm.models.swin_transformer", "forward": lambda _, x: x}
    model = type("SwinTransformer", (torch.nn.Module,), names)().eval()
    for policy in POLICIES.values():
        assert "SwinTransformer of timm: its blocks attend in windows" in refused(model, policy)
        found = adaptive.check(model, policy)
        assert any("take VisionTransformer (ViT, DeiT" in line for line in found.advice)
    assert not any("timm" in line for line in adaptive.check(torch.nn.Linear(2, 2)).advice)


def test_attention_beside_it_hides_it():
    attention = torch.nn.MultiheadAttention(64, 2)
    model = torch.nn.ModuleDict({"vit": make("layout"), "pool": attention})
    assert "timm's models are patched by themselves: vit" in refused(model, POLICIES["merging"])
    adaptive.patch(model["vit"], POLICIES["merging"]).unpatch()


OTHERS = {
    "swin_tiny_patch4_window7_224": "SwinTransformer of timm: its blocks attend in windows",
    "eva02_tiny_patch14_224": "Eva of timm: its blocks turn queries and keys by their places",
    "beit_base_patch16_224": "Beit of timm: its attention adds a number for each pair",
    "vit_relpos_small_patch16_224": "VisionTransformerRelPos of timm: its attention adds a number",
    "cait_xxs24_224": "of timm's models TokenMerging and TokenPruning take VisionTransformer",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_of_timm(name):
    with torch.device("meta"):
        model = timm().create_model(name)
    for policy in POLICIES.values():
        assert OTHERS[name] in refused(model, policy)


@pytest.mark.parametrize("block", ["ParallelScalingBlock", "ParallelThingsBlock"])
def test_other_blocks_of_timm(block):
    kind = getattr(timm().models.vision_transformer, block)
    why = refused(make("timm", block_fn=kind), POLICIES["merging"])
    assert f"blocks.0 is a {block}, which does not run attention and then an MLP" in why


class Config(transformers.PretrainedConfig):
    model_type = "timm_wrapper"


class Wrapper(transformers.PreTrainedModel):
    """As TimmWrapperModel calls the model of timm inside it; that class needs a torchvision."""

    config_class = Config

    def __init__(self, timm_model):
        super().__init__(Config())
        self.timm_model = timm_model

    def forward(self, pixel_values):
        return self.timm_model.forward_features(pixel_values)


@both_sources
@torch.no_grad()
def test_models_of_timm_inside_transformers_name_the_way_out(source):
    model = Wrapper(make(source)).eval()
    stock = model(images())
    with pytest.raises(adaptive.UnknownFamily, match=r"adaptive\.patch\(model\.timm_model\)"):
        adaptive.patch(model, POLICIES["merging"])
    with adaptive.patch(model.timm_model, POLICIES["merging"]) as patched:
        assert not torch.equal(model(images()), stock)
        assert patched.report().token_merging.calls == 1
