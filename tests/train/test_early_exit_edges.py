"""What early_exit() refuses, and what it leaves behind after errors: nothing."""

import copy
import itertools

import peft
import pytest
import torch
from models import make, padded, token_ids
from torch import nn

import adaptive
from adaptive.train import early_exit
from adaptive.train._batch import read_batch


def tiny(layers=4, **fields):
    return make("llama", num_hidden_layers=layers, **fields)


def state_of(model):
    """Everything but the weights: instance attributes, hooks and mode of each module, config."""
    return (
        {
            name: (set(module.__dict__), dict(module._forward_hooks), module.training)
            for name, module in model.named_modules()
        },
        copy.deepcopy(model.config.to_dict()),
    )


def weights_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def mixed_modes(model):
    model.train()
    model.model.layers[1].eval()
    return model


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_behind(error):
    model = mixed_modes(tiny())
    before, ids = state_of(model), token_ids()

    def interrupt(step, loss):
        assert model.model.layers[1].training
        assert "forward" in model.model.__dict__
        if error is not None and step == 1:
            raise error

    def train():
        early_exit(model, [ids] * 3, steps=3, on_step=interrupt)

    if error is None:
        train()
    else:
        with pytest.raises(error):
            train()
    assert state_of(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    with adaptive.patch(model.eval()):  # whose checks look for what others installed
        model(ids)


def test_an_error_in_a_layer_leaves_nothing_behind():
    model = mixed_modes(tiny())
    before, calls = state_of(model), itertools.count()

    def fail(*_):
        if next(calls) == 2:
            raise KeyboardInterrupt

    handle = model.model.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        early_exit(model, [token_ids()] * 9, steps=9)
    handle.remove()
    assert state_of(model) == before


def test_on_step_hears_every_step():
    heard = []
    result = early_exit(
        tiny(), [token_ids()] * 3, steps=3, on_step=lambda step, loss: heard.append((step, loss))
    )
    assert heard == list(enumerate(result.losses))


def test_exits_are_measured_on_the_held_out_batch():
    ids, other = token_ids(), token_ids(seed=5)
    model = tiny()
    result = early_exit(model, [ids] * 2, steps=2, held_out={"input_ids": other})
    assert result.exit_losses_after[-1] == pytest.approx(model(other, labels=other).loss.item())


def test_a_loss_that_is_not_finite_stops_with_the_weights_before_it():
    model, kept = tiny(), []

    def poison(step, _):
        kept[:] = weights_of(model)
        if step == 2:
            mlp = model.model.layers[3].mlp
            handles.append(mlp.register_forward_hook(lambda *args: args[2] * torch.nan))

    handles = []
    before = state_of(model)
    match = r"loss must be finite, got nan at step 3, exit layer 4; .* after 3 steps"
    with pytest.raises(FloatingPointError, match=match):
        early_exit(model, [token_ids()] * 9, steps=9, on_step=poison, learning_rate=1e-3)
    handles[0].remove()
    assert all(map(torch.equal, weights_of(model), kept))
    assert state_of(model) == before


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer():
    model = tiny()
    weights = weights_of(model)
    model.model.embed_tokens.weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(FloatingPointError, match="gradient must be finite, got a norm of"):
        early_exit(model, [token_ids()] * 2, steps=2)
    assert all(map(torch.equal, weights_of(model), weights))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 2.0),
        ("layer_dropout", 1.0),
        ("layer_dropout", -0.1),
        ("layer_dropout", float("nan")),
        ("exit_scale", -1e-9),
        ("exit_scale", float("inf")),
        ("rotation", 0),
        ("rotation", True),
        ("curriculum", "random"),
        ("timescale", "linear"),
        ("timescale", None),
        ("learning_rate", 0),
        ("learning_rate", "fast"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"adaptive: {name} must be .*, got {value!r}"):
        early_exit(tiny(), [token_ids()], **{"steps": 1, name: value})


def test_a_learning_rate_beside_an_optimizer_is_refused():
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="learning_rate must be None beside an optimizer"):
        early_exit(model, [token_ids()], steps=1, optimizer=optimizer, learning_rate=0.1)


def test_batches_that_end_early_say_how_many_came():
    model = tiny()
    before = state_of(model)
    with pytest.raises(ValueError, match="as many as steps=5, got 3"):
        early_exit(model, (token_ids() for _ in range(3)), steps=5)
    assert state_of(model) == before
    with pytest.raises(ValueError, match="as many as steps=5, got 0"):
        early_exit(model, [], steps=5)


IDS = torch.ones(2, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batch", "error", "match"),
    [
        ("text", TypeError, "tensors or mappings"),
        (IDS.float(), TypeError, "input_ids must hold whole numbers"),
        (IDS[0], ValueError, r"input_ids must be \[batch, tokens\].*got \[6\]"),
        (IDS[:, :1], ValueError, r"input_ids .*got \[2, 1\]"),
        (IDS[:0], ValueError, r"input_ids .*got \[0, 6\]"),
        ({"labels": IDS}, ValueError, "must hold 'input_ids'"),
        ({"input_ids": IDS, "token_type_ids": IDS}, ValueError, "token_type_ids"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, ValueError, "labels must have the shape"),
        ({"input_ids": IDS, "labels": [1, 2]}, TypeError, "labels must be a tensor, got list"),
        ({"input_ids": IDS, "attention_mask": IDS[:1]}, ValueError, "attention_mask must have"),
        ({"input_ids": IDS, "labels": IDS * 0 - 100}, ValueError, "labels must leave a token"),
        (
            {"input_ids": IDS, "attention_mask": IDS * 0},
            ValueError,
            "attention_mask must leave a row",
        ),
    ],
)
def test_batches_that_do_not_fit_are_refused_by_name(batch, error, match):
    with pytest.raises(error, match=match):
        early_exit(tiny(), [batch], steps=1)


@pytest.mark.parametrize("batches", [IDS, {"input_ids": IDS}, 3])
def test_one_batch_is_no_iterable_of_batches(batches):
    with pytest.raises(TypeError, match="iterable of batches"):
        early_exit(tiny(), batches, steps=1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_learned_unless_labels_say_so(side):
    batch = padded(3, 12, side)
    read = read_batch(batch, torch.device("cpu"))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = [
        (row * 12 + t, int(ids[row, t + 1]))
        for row in range(3)
        for t in range(11)
        if mask[row, t] and mask[row, t + 1]
    ]
    assert list(zip(read.places.tolist(), read.targets.tolist(), strict=True)) == expected
    everything = read_batch({**batch, "labels": ids}, torch.device("cpu"))
    assert everything.places.tolist() == [t for t in range(36) if t % 12 != 11]
    assert everything.targets.tolist() == ids[:, 1:].flatten().tolist()


def test_models_that_cannot_be_trained_are_refused_with_the_reason():
    ids = [token_ids()]
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        early_exit("llama", ids, steps=1)
    with pytest.raises(adaptive.UnsupportedModel, match="got Linear"):
        early_exit(nn.Linear(2, 2), ids, steps=1)
    with pytest.raises(adaptive.UnsupportedModel, match="LlamaModel has no LM head"):
        early_exit(tiny().model, ids, steps=1)
    with pytest.raises(adaptive.UnsupportedModel, match="bare or inside PEFT, got DataParallel"):
        early_exit(nn.DataParallel(tiny()), ids, steps=1)
    with pytest.raises(adaptive.UnsupportedModel, match="2 layers or more, got 1"):
        early_exit(tiny(1), ids, steps=1)
    with pytest.raises(ValueError, match="a parameter that requires gradients"):
        early_exit(tiny().requires_grad_(False), ids, steps=1)
    checkpointed = tiny()
    checkpointed.gradient_checkpointing_enable()
    with pytest.raises(adaptive.UnsupportedModel, match="gradient checkpointing"):
        early_exit(checkpointed, ids, steps=1)
    unknown = tiny()
    unknown.config.model_type = "nobody_knows"
    with pytest.raises(adaptive.UnknownFamily, match="nobody_knows"):
        early_exit(unknown, ids, steps=1)
    model = tiny()
    with adaptive.patch(model), pytest.raises(adaptive.PatchConflict, match="unpatch"):
        early_exit(model, ids, steps=1)
    early_exit(model, ids, steps=1)


def test_an_encoder_is_refused():
    from encoder_models import make as make_encoder

    with pytest.raises(adaptive.UnsupportedModel, match="encoder"):
        early_exit(make_encoder("bert"), [token_ids()], steps=1)


def test_only_adapters_learn_inside_peft():
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(tiny(), config)
    before = {name: value.clone() for name, value in wrapped.named_parameters()}
    early_exit(wrapped, [token_ids()] * 3, steps=3, learning_rate=1e-2, layer_dropout=0.5)
    changed = {n for n, v in wrapped.named_parameters() if not torch.equal(v, before[n])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_autocast_sees_the_new_weights_of_every_step():
    """The casts that autocast keeps would be those of step 0 for ever."""

    def losses(cache):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
            options = {"learning_rate": 3e-3, "layer_dropout": 0}
            return early_exit(tiny(), [token_ids()] * 20, steps=20, **options).losses

    with_cache, without = losses(True), losses(False)
    assert with_cache == pytest.approx(without, rel=0.05)
    assert with_cache[-1] < with_cache[0] / 2
