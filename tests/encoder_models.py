"""Tiny random encoders of every supported family, built from their configuration, and inputs."""

import inspect
from typing import Any

import torch
import transformers
from models import PAD, VOCABULARY
from torch import Tensor

_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TEXT = {
    **_SIZES,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IMAGE = {**_SIZES, "image_size": 32, "patch_size": 4, "num_channels": 3}

CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert", "AutoModelForMaskedLM", _TEXT),
    "bert_classifier": ("bert", "AutoModelForSequenceClassification", _TEXT),
    "electra": ("electra", "AutoModelForMaskedLM", {**_TEXT, "embedding_size": 64}),
    "roberta": ("roberta", "AutoModelForMaskedLM", _TEXT),
    "xlm_roberta": ("xlm-roberta", "AutoModelForTokenClassification", _TEXT),
    "camembert": ("camembert", "AutoModelForMaskedLM", _TEXT),
    "distilbert": (
        "distilbert",
        "AutoModelForMaskedLM",
        {
            "dim": 128,
            "hidden_dim": 96,
            "n_layers": 2,
            "n_heads": 4,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 256,
            "pad_token_id": PAD,
        },
    ),
    "modernbert": (
        "modernbert",
        "AutoModelForMaskedLM",
        {
            **_TEXT,
            "local_attention": 16,
            "global_attn_every_n_layers": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    "vit": ("vit", "AutoModelForImageClassification", _IMAGE),
    "deit": ("deit", "DeiTForImageClassification", _IMAGE),
    "dinov2": ("dinov2", "AutoModelForImageClassification", _IMAGE),
    "dinov2_with_registers": (
        "dinov2_with_registers",
        "AutoModelForImageClassification",
        {**_IMAGE, "num_register_tokens": 2},
    ),
    "dinov3_vit": ("dinov3_vit", "AutoModel", {**_IMAGE, "num_register_tokens": 2}),
    "siglip_vision": ("siglip_vision_model", "AutoModel", _IMAGE),
    "clip_vision": ("clip_vision_model", "AutoModel", _IMAGE),
}
"""For each case: the model type, the class that builds it, and fields of its configuration."""

IMAGES = tuple(case for case, (_, _, fields) in CONFIGS.items() if "image_size" in fields)
THROUGH_INTERFACE_SINCE_5 = tuple(case for case in CONFIGS if case not in IMAGES)
OLD = int(transformers.__version__.split(".")[0]) < 5
SUPPORTED = IMAGES if OLD else tuple(CONFIGS)
TEXTS = tuple(case for case in SUPPORTED if case not in IMAGES)


def make(
    case: str, dtype: torch.dtype = torch.float32, implementation: str = "sdpa", **fields: Any
) -> Any:
    """Return an encoder with random weights, the same on every call; see `models.make`."""
    model_type, builder, known = CONFIGS[case]
    config = transformers.AutoConfig.for_model(model_type, **{**known, **fields})
    torch.manual_seed(0)
    kind = getattr(transformers, builder)
    build = kind.from_config if builder.startswith("Auto") else kind._from_config
    model = build(config, attn_implementation=implementation, dtype=dtype)
    # Larger weights than the usual 0.02: attention then differs between tokens, and matters.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(4)
    return model.eval()


def inputs(case: str, batch: int = 2, tokens: int = 40, side: str = "") -> dict[str, Tensor]:
    """Token ids, of which row ``i`` has ``7 * i`` padding tokens on ``side``, or images."""
    rng = torch.Generator().manual_seed(1)
    if case in IMAGES:
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=rng)}
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=rng)
    mask = torch.ones_like(ids)
    for row in range(batch if side else 0):
        places = slice(0, 7 * row) if side == "left" else slice(tokens - 7 * row, tokens)
        ids[row, places] = PAD
        mask[row, places] = 0
    return {"input_ids": ids, "attention_mask": mask}


def run(model: Any, given: dict[str, Tensor]) -> Tensor:
    """The first output of a model, logits or hidden states, without gradients."""
    known = inspect.signature(model.forward).parameters
    assert set(given) <= set(known) or "kwargs" in known
    with torch.no_grad():
        return model(**given)[0]
