"""Encoders, exactly: outputs are those of the stock model, and nothing depends on padding."""

import copy
import json

import pytest
import torch
import transformers
from encoder_models import OLD, SUPPORTED, TEXTS, inputs, make, run

import adaptive

NEEDS_5 = pytest.mark.skipif(OLD, reason="text encoders do not use the interface before 5")
SIDES = ("", "left", "right")
IMPLEMENTATIONS = ("sdpa", "eager")


def real(out, given):
    """Outputs of what is not padding; a head that gives one output per row has no padding."""
    mask = given.get("attention_mask")
    return out[mask.bool()] if mask is not None and out.dim() == 3 else out


def native_calls(patched):
    return [layer.native_calls for layer in patched.report().layers]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", SUPPORTED)
def test_outputs_are_those_of_stock(case, implementation):
    model = make(case, implementation=implementation)
    for side in SIDES if case in TEXTS else ("",):
        given = inputs(case, batch=3, side=side)
        stock = run(model, given)
        with adaptive.patch(model) as patched:
            ours = run(model, given)
            assert all(calls == 1 for calls in native_calls(patched)) or not side
            with patched.disabled():
                assert torch.equal(run(model, given), stock)
        assert torch.equal(run(model, given), stock)
        error = (real(ours, given) - real(stock, given)).abs().max()
        assert error <= 1e-5 * stock.abs().max()


@pytest.mark.parametrize("case", SUPPORTED)
def test_without_padding_and_windows_stock_answers_bit_for_bit(case):
    model, given = make(case), inputs(case)
    stock = run(model, given)
    with adaptive.patch(model) as patched:
        ours = run(model, given)
        layers = patched.report().layers
    free = [layer for layer in layers if patched.plan.shape.windows[layer.layer] is None]
    assert free
    assert all(layer.stock_calls == {"no mask": 1} for layer in free)
    if len(free) == len(layers):
        assert torch.equal(ours, stock)


@NEEDS_5
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["bert", "modernbert"])
def test_no_output_depends_on_padding(case, side):
    model, given = make(case), inputs(case, batch=3, side=side)
    other = {**given, "input_ids": given["input_ids"].clone()}
    other["input_ids"][given["attention_mask"] == 0] = 77
    with adaptive.patch(model):
        assert torch.equal(real(run(model, given), given), real(run(model, other), given))


@NEEDS_5
@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_of_padding_is_zero_but_for_the_first_token(side):
    model, given = make("bert"), inputs("bert", batch=2, side=side)
    seen = []
    attention = model.bert.encoder.layer[0].attention.self
    attention.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    run(model, given)
    with adaptive.patch(model):
        run(model, given)
    stock, ours = seen
    padding = given["attention_mask"] == 0
    assert (ours[1, 0] - stock[1, 0]).abs().max() <= 1e-5 * stock.abs().max()  # what poolers read
    padding[:, 0] = False
    assert padding.any()
    assert bool((ours[padding] == 0).all())
    assert not bool((stock[padding] == 0).any(-1).all())


@NEEDS_5
def test_pooled_outputs_are_those_of_stock_with_padding_on_either_side():
    model = transformers.AutoModel.from_config(make("bert").config).eval()
    for side in ("left", "right"):
        given = inputs("bert", batch=3, side=side)
        with torch.no_grad():
            stock = model(**given).pooler_output
            with adaptive.patch(model) as patched:
                ours = model(**given).pooler_output
                assert native_calls(patched) == [1, 1]
        assert (ours - stock).abs().max() <= 1e-5


@NEEDS_5
def test_a_row_that_is_all_padding_does_no_harm():
    model, given = make("bert"), inputs("bert")
    given["attention_mask"][1] = 0
    stock = run(model, given)
    with adaptive.patch(model) as patched:
        ours = run(model, given)
        assert native_calls(patched) == [1, 1]
    assert bool(ours.isfinite().all())
    assert (ours[0] - stock[0]).abs().max() <= 1e-5 * stock.abs().max()


@NEEDS_5
def test_padding_in_the_middle_runs_stock_bit_for_bit():
    model, given = make("bert"), inputs("bert")
    given["attention_mask"][1, 10:20] = 0
    stock = run(model, given)
    with adaptive.patch(model) as patched:
        assert torch.equal(run(model, given), stock)
        assert patched.report().layers[0].stock_calls == {"mask": 1}


@NEEDS_5
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 17, 40])
def test_modernbert_keeps_its_window(tokens):
    """The window of transformers, 16, sees 8 tokens to each side and the token itself."""
    model, given = make("modernbert"), inputs("modernbert", tokens=tokens)
    stock = run(model, given)
    with adaptive.patch(model) as patched:
        assert patched.plan.shape.windows == (None, 17)
        ours = run(model, given)
    assert (ours - stock).abs().max() <= 1e-5 * stock.abs().max()


@NEEDS_5
def test_modernbert_makes_no_dense_mask(monkeypatch):
    from transformers import masking_utils

    model, given = make("modernbert"), inputs("modernbert", side="right")
    with adaptive.patch(model):
        made = []
        stock_mask = masking_utils.sdpa_mask

        def counted(*args, **kwargs):
            found = stock_mask(*args, **kwargs)
            made.append(found)
            return found

        counted.__module__ = stock_mask.__module__
        monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, "sdpa", counted)
        run(model, given)
        assert not any(isinstance(mask, torch.Tensor) for mask in made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@NEEDS_5
def test_half_precision_is_no_further_from_the_truth_than_stock(dtype):
    given = inputs("modernbert", batch=3, side="right")
    exact = make("modernbert", dtype=dtype)
    truth = real(run(copy.deepcopy(exact).double(), given), given)
    stock = real(run(exact, given), given)
    with adaptive.patch(exact) as patched:
        ours = real(run(exact, given), given)
        assert native_calls(patched) == [1, 1]
    assert (ours - truth).norm() <= 2 * (stock - truth).norm()


@NEEDS_5
def test_the_answer_of_verify():
    given = inputs("bert", side="right")
    with adaptive.patch(make("bert")) as patched:
        found = patched.verify(given)
        assert found.tokens == int(given["attention_mask"].sum())
        assert found.token_agreement == 1.0
        assert found.max_logit_error <= 1e-5 * found.max_logit
        assert "73 largest logits agree" in str(found)
        assert patched.verify(given["input_ids"]).max_logit_error == 0.0
        assert native_calls(patched) == [0, 0]
        with pytest.raises(TypeError, match="a Tensor or a dict of the keyword arguments"):
            patched.verify([1, 2])


def test_verify_on_images():
    case = "vit"
    with adaptive.patch(make(case)) as patched:
        found = patched.verify(inputs(case))
    assert (found.tokens, found.max_logit_error) == (2, 0.0)


@NEEDS_5
def test_training_and_attention_weights_run_stock():
    given = inputs("bert", side="right")
    model = make("bert", implementation="eager")
    with adaptive.patch(model) as patched:
        model(**given).logits.sum().backward()
        assert patched.report().layers[0].stock_calls == {"gradient": 1}
        assert model.bert.embeddings.word_embeddings.weight.grad is not None
        patched.reset_stats()
        with torch.no_grad():
            weights = model(**given, output_attentions=True).attentions
        assert weights[0].shape == (2, 4, 40, 40)
        assert patched.report().layers[0].stock_calls == {"output_attentions": 1}


@NEEDS_5
def test_copies_are_patched_and_independent():
    model, given = make("bert"), inputs("bert", side="right")
    stock = run(model, given)
    patched = adaptive.patch(model)
    other = copy.deepcopy(model)
    patched.unpatch()
    assert torch.equal(run(model, given), stock)
    handle = adaptive.patched(other)
    run(other, given)
    assert native_calls(handle) == [1, 1]
    json.dumps(handle.report().to_dict())
    assert "local_attention" in str(handle.report())


@NEEDS_5
@pytest.mark.parametrize("padded", [False, True])
def test_a_patched_encoder_compiles_without_graph_breaks(padded):
    model, given = make("bert"), inputs("bert", side="right" if padded else "")
    stock = run(model, given)
    with adaptive.patch(model), torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        ours = compiled(**given)[0]
    assert (ours - stock).abs().max() <= 1e-5 * stock.abs().max()
