"""Tiny random models of every supported family, built from their configuration, and inputs."""

from typing import Any

import torch
from torch import Tensor

VOCABULARY = 128
PAD = 0

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
_NO_GROUPS = {k: v for k, v in _COMMON.items() if k not in ("num_key_value_heads", "head_dim")}
_EXPERTS = {"num_experts_per_tok": 2}
_WINDOW = {"sliding_window": 8}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", {**_COMMON, **_WINDOW, "query_pre_attn_scalar": 32}),
    "gemma3": ("gemma3_text", {**_COMMON, **_WINDOW, "query_pre_attn_scalar": 32}),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 128,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": PAD,
        },
    ),
    "gpt_neox": ("gpt_neox", _NO_GROUPS),
    "granite": ("granite", _COMMON),
    "llama": ("llama", _COMMON),
    "mistral": ("mistral", {**_COMMON, "sliding_window": None}),
    "mistral_window": ("mistral", {**_COMMON, **_WINDOW}),
    "mixtral": ("mixtral", {**_COMMON, **_EXPERTS, "num_local_experts": 4}),
    "olmo": ("olmo", _COMMON),
    "olmo2": ("olmo2", _COMMON),
    "phi3": ("phi3", _COMMON),
    "qwen2": ("qwen2", _COMMON),
    "qwen3": ("qwen3", _COMMON),
    "qwen3_moe": (
        "qwen3_moe",
        {**_COMMON, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 32},
    ),
    "smollm3": ("smollm3", _COMMON),
}
"""For each case: the model type and the fields of its configuration."""


def make(
    case: str, dtype: torch.dtype = torch.float32, implementation: str = "sdpa", **fields: Any
) -> Any:
    """Return a causal language model with random weights, the same on every call.

    Args:
        case: Key of CONFIGS.
        dtype: Of the weights.
        implementation: "sdpa" or "eager".
        fields: Of the configuration, over those of the case.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, known = CONFIGS[case]
    config = AutoConfig.for_model(model_type, **{**known, **fields})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation, dtype=dtype
    )
    # Larger weights than the usual 0.02: attention then differs between tokens, and matters.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(4)
    return model.eval()


def token_ids(batch: int = 2, tokens: int = 20, seed: int = 1) -> Tensor:
    """Random tokens that are neither padding nor special, ``[batch, tokens]``."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, tokens), generator=rng)


def padded(batch: int = 2, tokens: int = 20, side: str = "left") -> dict[str, Tensor]:
    """Tokens of which row ``i`` has ``3 * i`` padding tokens on ``side``, with their mask."""
    ids = token_ids(batch, tokens)
    mask = torch.ones_like(ids)
    for row in range(batch):
        places = slice(0, 3 * row) if side == "left" else slice(tokens - 3 * row, tokens)
        ids[row, places] = PAD
        mask[row, places] = 0
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model: Any, inputs: Tensor | dict[str, Tensor], tokens: int = 8, **options: Any) -> Any:
    """Generate ``tokens`` tokens without sampling."""
    given = {"inputs": inputs} if isinstance(inputs, Tensor) else inputs
    return model.generate(
        **given, max_new_tokens=tokens, do_sample=False, pad_token_id=PAD, **options
    )
