"""What experts and widths of FFNs are refused for in encoders: parts, families, compilers."""

import pytest
import torch
from encoder_models import OLD, TEXTS, inputs, make, run

import adaptive
from adaptive import EncoderFamily, FeedForwardExperts, TokenRouting
from adaptive.adapters import family_for

TWO = "deit" if OLD else "bert"
"""A model whose FFNs are two modules each."""


def given_for(case, batch=3):
    return inputs(case, batch=batch, side="right" if case in TEXTS else "")


def layers_of(model):
    return family_for(model).layer_names(model)


def experts():
    return FeedForwardExperts(experts=4, top_k=2, audit_every=None)


@torch.no_grad()
def test_parts_that_someone_hooks_or_replaces_are_refused():
    model, given = make(TWO), given_for(TWO)
    layer = model.get_submodule(layers_of(model)[1])
    for policy in (experts(), TokenRouting(widths=0.5)):
        with adaptive.patch(model, policy):
            wanted = run(model, given)
            for module, name in (
                (layer.intermediate.dense, "dense"),
                (layer.output.dense, "output.dense"),
                (layer.intermediate, type(layer.intermediate).__name__),
            ):
                handle = module.register_forward_hook(lambda *_: None)
                with pytest.raises(adaptive.PatchConflict, match=f"of '{name}', which someone"):
                    run(model, given)
                handle.remove()
            dense, layer.output.dense = layer.output.dense, torch.nn.Linear(96, 128)
            with pytest.raises(adaptive.PatchConflict, match=r"of 'output\.dense', which someone"):
                run(model, given)
            layer.output.dense = dense
            assert torch.equal(run(model, given), wanted)
    handle = layer.output.dense.register_forward_hook(lambda *_: None)
    with pytest.raises(adaptive.UnsupportedModel, match="layer 1 has an FFN"):
        adaptive.patch(model, experts())
    handle.remove()
    if hasattr(layer, "chunk_size_feed_forward"):
        layer.chunk_size_feed_forward = 4
        with pytest.raises(adaptive.UnsupportedModel, match="layer 1 has an FFN"):
            adaptive.patch(model, experts())
        assert "forward" not in vars(layer.intermediate)


def test_compiling():
    model, given = make(TWO, num_hidden_layers=1), given_for(TWO, batch=1)
    layer, x = model.get_submodule(layers_of(model)[0]), torch.randn(1, 5, 128)
    with adaptive.patch(model, experts()), torch.no_grad():
        wanted = run(model, given)
        with pytest.raises(Exception, match="FeedForwardExperts cannot run under torch"):
            torch.compile(model, backend="eager")(**given)
        assert torch.equal(run(model, given), wanted)
    with adaptive.patch(model, TokenRouting(widths=0.5)), torch.no_grad():

        def ffn(x):
            return layer.output(layer.intermediate(x), x)

        compiled = torch.compile(ffn, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), ffn(x))


def test_a_family_may_have_no_ffn_that_is_known():
    family = family_for(make("vit"))
    object.__setattr__(family, "mlp", "nowhere")
    try:
        with pytest.raises(adaptive.UnsupportedModel, match="layer 0 has no FFN that is no"):
            adaptive.patch(make("vit"), TokenRouting(widths=0.5))
    finally:
        object.__setattr__(family, "mlp", "mlp|intermediate")
    with pytest.raises(ValueError, match="mlp must be a dotted path, got ''"):
        EncoderFamily(name="x", model_types=("x",), base="x", mlp="")
