"""early_exit() computes the gradients it says, skips what it drops, and leaves nothing behind."""

import json
import math

import pytest
import torch
from models import make, padded, token_ids
from torch.nn import functional

from adaptive.adapters import family_for
from adaptive.train import curriculum_mask, dropout_probabilities, early_exit, exit_weights
from adaptive.train._batch import read_batch
from adaptive.train._exits import _rows, held

CASES = ["llama", "gpt2", "gpt_neox", "gemma2", "granite"]
LAYERS = 4


def tiny(case, layers=LAYERS, **fields):
    implementation = "eager" if case == "gemma2" else "sdpa"
    name = "n_layer" if case == "gpt2" else "num_hidden_layers"
    if case == "granite":
        fields = {"logits_scaling": 4.0, **fields}
    if case == "gpt2":
        fields = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **fields}
    return make(case, implementation=implementation, **{name: layers, **fields})


def parts(model):
    """The norm, and what is done to the head's output, written down by hand for each family."""
    kind, config = model.config.model_type, model.config
    if kind == "gpt2":
        return model.transformer.ln_f, model.lm_head
    if kind == "gpt_neox":
        return model.gpt_neox.final_layer_norm, model.get_output_embeddings()
    if kind == "gemma2":
        cap = config.final_logit_softcapping
        return model.model.norm, lambda x: torch.tanh(model.lm_head(x) / cap) * cap
    if kind == "granite":
        return model.model.norm, lambda x: model.lm_head(x) / config.logits_scaling
    return model.model.norm, model.lm_head


def layers_of(model):
    return model.get_submodule(family_for(model).layers_name(model))


def plain_exit_losses(model, ids, labels, mask=None):
    """The loss of each exit, too simple to be wrong: hook every layer, norm, head, shift."""
    norm, head = parts(model)
    states = []

    def keep(_, __, output):
        states.append(output if isinstance(output, torch.Tensor) else output[0])

    handles = [layer.register_forward_hook(keep) for layer in layers_of(model)]
    model(ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return [
        functional.cross_entropy(head(norm(x))[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        for x in states
    ]


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("curriculum", ["rotational", "gradual", None])
def test_gradients_are_those_of_the_plain_sum_of_losses(case, curriculum):
    model = tiny(case)
    batch = padded(3, 12)
    labels = batch["input_ids"].clone()
    labels[:, :4] = -100
    step, steps = 3, 16
    mask = curriculum_mask(step, steps=steps, layers=LAYERS, curriculum=curriculum, rotation=2)
    weights = exit_weights(mask, 0.7)
    assert sum(weight > 0 for weight in weights) > 1

    losses = plain_exit_losses(model, batch["input_ids"], labels, batch["attention_mask"])
    sum(w * loss for w, loss in zip(weights, losses, strict=True)).backward()
    plain = gradients(model)
    model.zero_grad()

    with held(model, family_for(model)) as exits:
        read = read_batch({**batch, "labels": labels}, torch.device("cpu"))
        found = exits.gradients(read, weights, [None] * LAYERS)
    ours = gradients(model)
    for layer, loss in found.items():
        assert loss == pytest.approx(losses[layer].item(), rel=1e-5)
    assert ours.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=2e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_the_last_exit_is_the_model_and_its_own_loss(case):
    model = tiny(case)
    ids = token_ids(3, 12)
    result = early_exit(model, [ids], steps=1, learning_rate=1e-9)
    assert result.exit_losses_before[-1] == pytest.approx(model(ids, labels=ids).loss.item())
    assert len(result.exit_losses_before) == len(result.exit_losses_after) == LAYERS


def test_exits_see_what_hooks_of_the_layers_make():
    """As the next layer does: an exit is the state that it gets."""
    model = tiny("llama")
    layers_of(model)[1].register_forward_hook(lambda _, args, out: args[0])
    losses = early_exit(model, [token_ids()], steps=1).exit_losses_before
    assert losses[1] == losses[0]
    assert len(set(losses)) == LAYERS - 1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kept", [[0, 2], [1], [], [0, 1, 2]])
def test_a_dropped_row_passes_the_layer_by_and_is_not_computed(case, kept):
    """Rows that are kept see the layer; the layer's attention sees no other rows at all."""
    model = tiny(case)
    batch = padded(3, 12, side="right")
    read = read_batch(batch, torch.device("cpu"))
    seen = []
    attention = dict(model.named_modules())[family_for(model).attention_names(model)[2]]
    rows = [None, None, torch.tensor(kept, dtype=torch.int64), None]
    with held(model, family_for(model)) as exits:
        exits.losses(read)
        handle = attention.register_forward_hook(
            lambda _, args, kwargs, out: seen.append(out[0].shape[0]), with_kwargs=True
        )
        with torch.no_grad():
            full = exits._run(read, [None] * LAYERS, range(LAYERS))
            some = exits._run(read, rows, range(LAYERS))
        handle.remove()
    assert seen == [3, len(kept)] if kept else [3]
    assert torch.equal(some[1], full[1])
    for row in range(3):
        expected = full[2] if row in kept else full[1]
        torch.testing.assert_close(some[2][row], expected[row], rtol=1e-4, atol=1e-5)
    if kept == [0, 1, 2]:
        assert not torch.equal(full[2], full[1])


@pytest.mark.parametrize("case", CASES)
def test_as_many_rows_as_tokens_are_not_mixed_up(case):
    """Positions, masks and rotary angles then have an axis as long as the batch."""
    model = tiny(case)
    batch = padded(5, 5, side="left")
    batch["attention_mask"][:, -2:] = 1
    read = read_batch(batch, torch.device("cpu"))
    with held(model, family_for(model)) as exits, torch.no_grad():
        full = exits._run(read, [None] * LAYERS, range(LAYERS))
        rows = [torch.tensor([0, 4])] + [None] * (LAYERS - 1)
        some = exits._run(read, rows, range(LAYERS))
    torch.testing.assert_close(some[0][[0, 4]], full[0][[0, 4]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(some[3][[0, 4]], full[3][[0, 4]], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(some[0][1:4], full[0][1:4], rtol=1e-4, atol=1e-5)


def test_only_what_has_an_axis_of_the_batch_is_cut():
    """Positions in a cache are ``[tokens]``: of no row, even where there are as many."""
    whole, row, shared = torch.arange(3), torch.randn(3, 2), torch.randn(1, 3)
    kept = torch.tensor([0, 2])
    cut = _rows({"a": (whole, row), "b": [shared, None], "c": "text"}, kept, 3)
    assert cut["a"][0] is whole
    assert torch.equal(cut["a"][1], row[[0, 2]])
    assert cut["b"][0] is shared
    assert cut["b"][1] is None
    assert cut["c"] == "text"


def test_gradients_with_dropped_rows_are_those_of_a_mask():
    """Layer 3 is dropped for rows 0 and 2, layer 2 for all: the same as mixing with 0 and 1."""
    model = tiny("llama")
    read = read_batch(token_ids(3, 10), torch.device("cpu"))
    weights = exit_weights([True] * LAYERS, 0.5)
    layers = layers_of(model)
    keep = {2: torch.zeros(3, 1, 1), 3: torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1)}

    def mix(mask):
        return lambda _, args, out: args[0] + mask * (out - args[0])

    handles = [layers[index].register_forward_hook(mix(mask)) for index, mask in keep.items()]
    ids = read.inputs["input_ids"]
    losses = plain_exit_losses(model, ids, ids)
    for handle in handles:
        handle.remove()
    sum(w * loss for w, loss in zip(weights, losses, strict=True)).backward()
    plain = {n: g for n, g in gradients(model).items() if g.abs().max() > 0}
    model.zero_grad()
    with held(model, family_for(model)) as exits:
        exits.losses(read)
        rows = [None, None, torch.tensor([], dtype=torch.int64), torch.tensor([1])]
        exits.gradients(read, weights, rows)
    ours = gradients(model)
    assert not any(".layers.2." in name for name in ours)
    assert ours.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=2e-4, atol=2e-6, msg=name)


def test_layers_are_dropped_as_often_as_the_schedule_says():
    """Rows that reach each layer's MLP in 60 steps of 8 rows, against the binomial's 4 sigma."""
    model = tiny("llama", hidden_size=32, intermediate_size=32, head_dim=8)
    rows = [0] * LAYERS
    handles = []
    for index, layer in enumerate(layers_of(model)):

        def count(module, _, out, index=index):
            rows[index] += len(out) if module.training else 0

        handles.append(layer.mlp.register_forward_hook(count))
    torch.manual_seed(3)
    steps, batch, highest = 60, 8, 0.6
    early_exit(
        model, [token_ids(batch, 6)] * steps, steps=steps, layer_dropout=highest,
        timescale="constant", curriculum=None, learning_rate=1e-6,
    )  # fmt: skip
    chances = dropout_probabilities(
        0, steps=steps, layers=LAYERS, highest=highest, timescale="constant"
    )
    calls = steps * batch
    for seen, chance in zip(rows, chances, strict=True):
        assert abs(seen - calls * (1 - chance)) <= 4 * math.sqrt(calls * chance * (1 - chance))
    assert rows[0] == calls
    assert rows[-1] < 0.6 * calls


def test_exit_scale_zero_without_dropout_is_plain_training():
    """Step for step the weights of a loop that anyone would write."""
    ours, plain = tiny("llama"), tiny("llama")
    batches = [token_ids(3, 10, seed) for seed in range(5)]
    result = early_exit(
        ours, batches, steps=5, layer_dropout=0, exit_scale=0,
        optimizer=torch.optim.SGD(ours.parameters(), lr=0.05),
    )  # fmt: skip
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    for ids, loss in zip(batches, result.losses, strict=True):
        optimizer.zero_grad()
        out = plain(ids, labels=ids)
        out.loss.backward()
        optimizer.step()
        assert loss == pytest.approx(out.loss.item(), rel=1e-4)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_the_same_seed_gives_the_same_training():
    def run(seed):
        model = tiny("gpt2", resid_pdrop=0.1)
        torch.manual_seed(seed)
        result = early_exit(
            model, [token_ids(4, 8, i) for i in range(6)], steps=6, layer_dropout=0.5,
            timescale="constant", learning_rate=1e-3,
        )  # fmt: skip
        return result, weights_of(model)

    (first, a), (again, b), (_, other) = run(7), run(7), run(8)
    assert first.losses == again.losses
    assert same(a, b)
    assert not same(a, other)


def test_the_result_prints_and_is_json():
    result = early_exit(tiny("llama", 12), [token_ids()] * 2, steps=2, exit_scale=0.5)
    text = str(result)
    assert text.startswith("LlamaForCausalLM (llama): 2 steps in ")
    assert "exit_scale 0.5" in text
    assert len(text.splitlines()) == 12
    assert [int(line.split()[0]) for line in text.splitlines()[3:]] == [1, 2, 4, 5, 7, 8, 9, 11, 12]
    data = json.loads(json.dumps(result.to_dict()))
    assert data["losses"] == list(result.losses)
    assert len(data["losses"]) == data["steps"] == 2
    assert len(data["exit_losses_after"]) == 12
    assert data["settings"]["curriculum"] == "rotational"
