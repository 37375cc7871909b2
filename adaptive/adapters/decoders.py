"""The decoder families of transformers that are supported, and why some others are not."""

from adaptive.adapters._family import REFUSED, Family, register_family

_BIDIRECTIONAL = "it is an encoder then, and has no decoding to speed up"
_CROSS = "cross-attention reads another cache, with other lengths"

# Module tree of Llama: model.layers.<i>.self_attn, model.norm, lm_head.
for _name in (
    "granite",
    "llama",
    "mistral",
    "olmo",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
):
    register_family(Family(name=_name, model_types=(_name,)))

# Its norms come after attention and MLP.
register_family(Family(name="olmo2", model_types=("olmo2",), input_norm=""))
register_family(Family(name="mixtral", model_types=("mixtral",), mlp="mlp|block_sparse_moe"))

register_family(
    Family(
        name="gemma2",
        model_types=("gemma2",),
        unsupported=(("use_bidirectional_attention", True, _BIDIRECTIONAL),),
    )
)
register_family(
    Family(
        name="gemma3",
        model_types=("gemma3_text",),
        unsupported=(("use_bidirectional_attention", True, _BIDIRECTIONAL),),
    )
)
register_family(
    Family(
        name="gemma3n",
        model_types=("gemma3n_text",),
        exact_only="its last layers read the keys and values of earlier ones, and between layers "
        "there are four hidden states of a token",
    )
)
register_family(
    Family(
        name="gpt_neox",
        model_types=("gpt_neox",),
        base="gpt_neox",
        attention="attention",
        norm="final_layer_norm",
        head="lm_head|embed_out",
    )
)
register_family(
    Family(
        name="gpt2",
        model_types=("gpt2",),
        base="transformer",
        layers="h",
        attention="attn",
        norm="ln_f",
        input_norm="ln_1",
        unsupported=(
            ("reorder_and_upcast_attn", True, "its attention never reaches the interface"),
            ("add_cross_attention", True, _CROSS),
        ),
    )
)

_NO_INTERFACE = "Its attention does not dispatch through AttentionInterface."
REFUSED.update(
    {
        "gpt_oss": "Its attention sinks (s_aux) change the softmax, which the kernels do not do.",
        "deepseek_v2": "Its values are narrower than its keys (MLA), which the kernels do not do.",
        "deepseek_v3": "Its values are narrower than its keys (MLA), which the kernels do not do.",
        "gemma3": "It is multimodal: patch its language model, model.model.language_model.",
        "gemma3n": "It is multimodal: patch its language model, model.model.language_model.",
        **dict.fromkeys(("bloom", "codegen", "falcon", "gptj", "mpt"), _NO_INTERFACE),
        **dict.fromkeys(("mamba", "mamba2", "rwkv"), "It has no attention."),
    }
)
