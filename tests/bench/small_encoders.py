"""Tiny encoders and made-up sentences that the benchmarks of encoders run on in tests."""

import pytest
import torch
import transformers

from bench.token_reduction import vit

needs_text_encoders = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="needs text encoders of 5"
)
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def images():
    """A model of images of 64 patches."""
    return vit(**SMALL, image_size=32, patch_size=4)


def texts(**fields):
    """A model of tokens below 64."""
    config = transformers.BertConfig(**{"vocab_size": 64, **SMALL, **fields})
    return transformers.BertModel(config).eval()


def sentences(*_):
    """One padded batch, whatever the tokenizer and the topics."""
    rng = torch.Generator().manual_seed(0)
    mask = (torch.arange(20) < torch.tensor([[20], [13], [9]])).long()
    return [{"input_ids": torch.randint(1, 64, (3, 20), generator=rng), "attention_mask": mask}]


def markers(*names):
    """A page that has a place for each of these tables."""
    return "\n".join(f"<!-- table:begin {n} -->\n<!-- table:end {n} -->" for n in names)
