"""Training, gradients and modes of autograd: a patched model does what a stock one does."""

import pytest
import torch
from models import greedy, make, padded, token_ids

import adaptive


def gradients(model, **options):
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(token_ids(tokens=10), labels=token_ids(tokens=10), **options).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("case", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same_bits(case, checkpointing):
    model = make(case)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss, stock = gradients(model)
    with adaptive.patch(model) as patched:
        ours_loss, ours = gradients(model)
        layer = patched.report().layers[0]
    assert torch.equal(loss, ours_loss)
    assert all(map(torch.equal, ours, stock))
    assert layer.native_calls == 0
    assert set(layer.stock_calls) <= {"gradient", "dropout"}


def test_gradients_flow_through_a_cache():
    model = make("llama")
    ids = token_ids(tokens=10)

    def run():
        model.zero_grad()
        first = model(ids[:, :6], use_cache=True)
        out = model(ids[:, 6:], past_key_values=first.past_key_values, use_cache=True)
        out.logits.square().mean().backward()
        return model.model.embed_tokens.weight.grad.clone()

    stock = run()
    with adaptive.patch(model):
        assert torch.equal(run(), stock)


def test_frozen_weights_with_gradients_of_the_input():
    model = make("llama").requires_grad_(False)
    embedded = model.model.embed_tokens(token_ids(tokens=6)).requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    stock = embedded.grad.clone()
    embedded.grad = None
    with adaptive.patch(model) as patched:
        model(inputs_embeds=embedded).logits.sum().backward()
        assert patched.report().layers[0].stock_calls == {"gradient": 1}
        model(token_ids(tokens=6))  # nothing wants a gradient here
        assert patched.report().layers[0].native_calls == 1
    assert torch.equal(embedded.grad, stock)


def test_inference_mode_and_no_grad_can_follow_each_other():
    model = make("llama")
    ids = token_ids(tokens=24)
    with torch.no_grad():
        stock = model(ids).logits[:, -1]
    with adaptive.patch(model) as patched:
        for first, second in (
            (torch.no_grad, torch.inference_mode),
            (torch.inference_mode, torch.no_grad),
            (torch.inference_mode, torch.inference_mode),
        ):
            with first():
                cache = model(ids[:, :20]).past_key_values
            with second():
                out = model(ids[:, 20:], past_key_values=cache)
            torch.testing.assert_close(out.logits[:, -1], stock, rtol=1e-4, atol=1e-5)
        assert patched.report().layers[0].native_calls == 3


def test_without_no_grad_generation_still_works():
    model = make("llama")
    stock = greedy(model, padded())
    with adaptive.patch(model):
        out = model(**padded())
        assert out.logits.requires_grad
        assert torch.equal(greedy(model, padded()), stock)
