"""A tiny random Gemma 3n: two layers with sparse FFNs, two that share keys and values."""

import torch
from models import PAD, VOCABULARY
from transformers import AutoModelForCausalLM
from transformers.models.gemma3n.configuration_gemma3n import Gemma3nTextConfig

SPARSE_LAYERS = 2
FIELDS = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 128,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 8,
    "laurel_rank": 8,
    "max_position_embeddings": 256,
    "activation_sparsity_pattern": [0.95] * SPARSE_LAYERS + [0.0] * (6 - SPARSE_LAYERS),
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def gemma3n(dtype=torch.float32, implementation="sdpa", **fields):
    """A causal language model with random weights, the same on every call."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Gemma3nTextConfig(**{**FIELDS, **fields}), attn_implementation=implementation, dtype=dtype
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(4)
    return model.eval()


def ffns(model):
    """The FFNs with sparse activations."""
    return [layer.mlp for layer in model.model.layers[:SPARSE_LAYERS]]
