"""Chunks of several tokens behind a StaticCache see what one pass over all of them sees."""

import pytest
import torch
from models import make, token_ids
from transformers import StaticCache

import adaptive

CUTS = ((0, 20), (20, 50), (50, 53), (53, 54), (54, 56))


@torch.no_grad()
def in_chunks(model, ids, mask):
    cache = StaticCache(config=model.config, max_cache_len=80)
    made = [
        model(
            ids[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=torch.arange(begin, end)[None],
            past_key_values=cache,
        ).logits
        for begin, end in CUTS
    ]
    return torch.cat(made, 1)


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["llama", "qwen3", "mistral_window"])
def test_a_chunk_sees_what_the_whole_pass_sees(case, implementation, padding):
    model = make(case, implementation=implementation)
    ids = token_ids(2, CUTS[-1][1])
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    wanted = in_chunks(model, ids, mask)
    with adaptive.patch(model):
        made = in_chunks(model, ids, mask)
    real = mask.bool()
    torch.testing.assert_close(made[real], wanted[real], rtol=0, atol=2e-5)
