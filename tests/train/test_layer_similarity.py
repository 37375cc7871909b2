"""layer_similarity(): a unit's cosine is that of its layer's output with it and without it."""

import dataclasses

import pytest
import torch
from models import make, token_ids
from routed_models import UNITS, deep, forward, parts

import adaptive
from adaptive.train import layer_similarity, least_changing


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt_neox", "olmo2", "gemma2", "mixtral"])
def test_a_cosine_is_that_of_the_layer_with_and_without_the_unit(case, unit):
    model, ids = deep(case), token_ids(4)
    found = []
    for dropped in (3, 2):
        drop = adaptive.MixtureOfDepths.drop((dropped,), unit=unit)
        policy = dataclasses.replace(drop, audit_every=None)
        layer = parts(model, "block")[0][2]
        hook = layer.register_forward_hook(lambda _, __, out: found.append(out))
        with adaptive.patch(model, policy):
            forward(model, {"input_ids": ids})
        hook.remove()
    with_unit, without = (each[0] if isinstance(each, tuple) else each for each in found)
    wanted = torch.cosine_similarity(with_unit, without, dim=-1).mean()
    assert layer_similarity(model, [ids], unit=unit)[2] == pytest.approx(float(wanted), abs=1e-5)
    assert float(wanted) < 1 - 1e-4


@pytest.mark.parametrize("unit", UNITS)
def test_nan_is_named_by_its_layer_and_never_chosen(unit):
    model = make("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = torch.nan
    with pytest.raises(FloatingPointError, match="what layer 1 puts out must be finite"):
        layer_similarity(model, [token_ids()], unit=unit)
    with pytest.raises(ValueError, match="similarity must hold numbers, got NaN of layer 1"):
        least_changing((0.5, torch.nan, 0.9), 1)
    assert least_changing((torch.nan, 0.5, 0.9), 1) == (2,)
