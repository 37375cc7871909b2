"""attention_rank(): ranks of attention maps, and the layers that they choose."""

import pytest
import torch
from models import PAD, make, token_ids

import adaptive
from adaptive.train import attention_rank, lowest_rank

BLIND = 2


def blind():
    """A model in one of whose layers all keys are alike, so that all queries see the mean."""
    model = make("llama", num_hidden_layers=4)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.q_proj.weight.mul_(0.0 if index == BLIND else 20.0)
    return model


def test_a_rank_is_that_of_the_maps():
    model, ids = blind(), token_ids(3, 12)
    ranks = attention_rank(model, [ids[:2], ids[2:]], tolerance=0.1)
    stock = make("llama", implementation="eager", num_hidden_layers=4)
    stock.load_state_dict(model.state_dict())
    with torch.no_grad():
        maps = stock(ids, output_attentions=True).attentions
    for rank, each in zip(ranks, maps, strict=True):
        values = torch.linalg.svdvals(each)
        counted = (values > 0.1 * values[..., :1]).sum(-1).float()
        assert rank == pytest.approx(float(counted.mean()) / 12)
    assert min(range(4), key=lambda layer: ranks[layer]) == BLIND
    assert lowest_rank(ranks, 1) == (BLIND,)
    assert lowest_rank(ranks, 1, spared=(BLIND,)) != (BLIND,)
    exact = attention_rank(model, [ids])
    assert all(one >= other for one, other in zip(exact, ranks, strict=True))


def test_padding_has_no_rank():
    model, ids = blind(), token_ids(2, 10)
    padded = {
        "input_ids": torch.cat([torch.full((2, 4), PAD), ids], 1),
        "attention_mask": torch.cat([torch.zeros(2, 4), torch.ones(2, 10)], 1).long(),
        "position_ids": torch.cat([torch.zeros(4), torch.arange(10)]).long().expand(2, -1),
    }
    ours, plain = (attention_rank(model, [batch], tolerance=0.1) for batch in (padded, ids))
    assert ours == pytest.approx(plain)


def test_the_model_is_as_before():
    model = blind().train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="input_ids must be"):
        attention_rank(model, [torch.ones(3, dtype=torch.int64)])
    attention_rank(model, [token_ids(1, 4)])
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    with adaptive.patch(model), pytest.raises(adaptive.PatchConflict, match="unpatch"):
        attention_rank(model, [token_ids(1, 4)])


def test_settings():
    for tolerance in (0, 1.0, True, float("nan"), "0.1"):
        with pytest.raises(ValueError, match=r"tolerance must be in \(0, 1\), or None, got"):
            attention_rank(blind(), [token_ids()], tolerance=tolerance)
    with pytest.raises(ValueError, match="batches must hold a batch, got none"):
        attention_rank(blind(), [])
    with pytest.raises(ValueError, match="ranks must be numbers"):
        lowest_rank([0.5, float("nan")], 1)
    with pytest.raises(ValueError, match="count must be from 1 to 1, got 2"):
        lowest_rank([0.5, 0.4], 2)
