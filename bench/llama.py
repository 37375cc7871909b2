"""Llama-shaped models with random weights and a KV cache filled without a prefill.

Speed and memory do not depend on what the weights say, so no download is needed. Weights and keys
are uniform random numbers of the sizes that initialisation gives them, drawn in seconds.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,
        "vocab_size": 512,
    },
}
"""Public shapes by name."""


def uniform(shape: tuple[int, ...], std: float, dtype: torch.dtype, seed: int) -> Tensor:
    """Random numbers of one of 256 values, zero mean and standard deviation ``std``: fast, cheap.

    The float32 and the bfloat16 tensor of one seed hold exactly the same numbers.
    """
    count = math.prod(shape)
    words = np.random.Generator(np.random.SFC64(seed)).integers(
        0, 1 << 64, (count + 7) // 8, np.uint64
    )
    bytes_ = torch.from_numpy(words.view(np.int8))[:count].view(shape)
    step = torch.tensor(std * math.sqrt(3) / 127).to(torch.bfloat16).item()
    return bytes_.to(torch.bfloat16).mul_(step).to(dtype)


def build(shape: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A model in eval mode whose embedding is also its head."""
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        dtype=dtype,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {}
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.dim() == 1:
            weights[name] = torch.ones(parameter.shape, dtype=dtype)
        else:
            weights[name] = uniform(tuple(parameter.shape), 0.02, dtype, seed)
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its tables are buffers, lost on meta
    return model.requires_grad_(False).eval()


def twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A second model with modules of its own and the same weights in memory."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def kv_bytes(config: LlamaConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of ``tokens`` tokens."""
    per_layer = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return tokens * config.num_hidden_layers * per_layer


def synthetic_kv(
    config: LlamaConfig, tokens: int, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Layer index, keys and values of unit variance, ``[1, kv_heads, tokens, head_dim]`` each."""
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    for layer in range(config.num_hidden_layers):
        seed = 1_000_000 + 2 * layer
        yield layer, uniform(shape, 1.0, dtype, seed), uniform(shape, 1.0, dtype, seed + 1)


def fill(
    caches: dict[str, Any],
    config: LlamaConfig,
    tokens: int,
    dtype: torch.dtype,
    batch: int = 1,
) -> None:
    """Append the same synthetic tokens to every row of every cache, through its own ``update``."""
    for layer, key, value in synthetic_kv(config, tokens, dtype):
        for cache in caches.values():
            cache.update(*(t.expand(batch, -1, -1, -1) for t in (key, value)), layer)


def dynamic_cache(model: LlamaForCausalLM, _capacity: int) -> DynamicCache:
    """The cache that ``generate`` makes by default."""
    return DynamicCache(config=model.config)


def static_cache(model: LlamaForCausalLM, capacity: int) -> StaticCache:
    """The cache of ``generate(cache_implementation="static")``."""
    return StaticCache(config=model.config, max_cache_len=capacity)


def adopted_cache(model: LlamaForCausalLM, _capacity: int) -> DynamicCache:
    """The default cache after a patched model has adopted it."""
    from adaptive.layers.hf_adopt import adopt

    cache = DynamicCache(config=model.config)
    if adopt(cache) != model.config.num_hidden_layers:
        raise RuntimeError("bench: every layer of an empty DynamicCache must be adopted")
    return cache


def step(model: LlamaForCausalLM, cache: Any, token: int, position: int, batch: int = 1) -> Tensor:
    """Decode one token per row as ``generate`` does; returns the first's logits ``[vocab]``."""
    inputs = model.prepare_inputs_for_generation(
        torch.full((batch, 1), token),
        next_sequence_length=1,
        past_key_values=cache,
        attention_mask=torch.ones(batch, position + 1, dtype=torch.long),
        position_ids=torch.full((batch, 1), position),
        use_cache=True,
    )
    logits: Tensor = model(**inputs).logits[0, -1]
    logits.argmax().item()
    return logits
