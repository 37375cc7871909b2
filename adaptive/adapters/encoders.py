"""The encoder families of transformers that are supported, and why some others are not."""

from adaptive.adapters._encoder_family import EncoderFamily
from adaptive.adapters._family import REFUSED, register_family

_DECODER = "it is a decoder then, and this family is for encoders"
_CROSS = "cross-attention reads another sequence, with other lengths"
_TEXT = (("is_decoder", True, _DECODER), ("add_cross_attention", True, _CROSS))

# Module tree of BERT: bert.encoder.layer.<i>.attention.self.
register_family(EncoderFamily(name="bert", model_types=("bert",), base="bert", unsupported=_TEXT))
register_family(
    EncoderFamily(name="electra", model_types=("electra",), base="electra", unsupported=_TEXT)
)
register_family(
    EncoderFamily(
        name="roberta",
        model_types=("roberta", "xlm-roberta", "camembert"),
        base="roberta",
        unsupported=_TEXT,
    )
)
register_family(
    EncoderFamily(
        name="distilbert",
        model_types=("distilbert",),
        base="distilbert",
        layers="transformer.layer",
        attention="attention",
        mlp="ffn",
    )
)
register_family(
    EncoderFamily(
        name="modernbert",
        model_types=("modernbert",),
        base="model",
        layers="layers",
        attention="attn",
        mlp="mlp",
    )
)

# Vision transformers: the modules that attend and feed forward moved up in transformers 5.
for _name in ("vit", "deit"):
    register_family(
        EncoderFamily(
            name=_name,
            model_types=(_name,),
            base=_name,
            layers="layers|encoder.layer",
            attention="attention.attention|attention",
            mlp="mlp|intermediate",
        )
    )
for _name in ("dinov2", "dinov2_with_registers"):
    register_family(
        EncoderFamily(
            name=_name,
            model_types=(_name,),
            base=_name,
            attention="attention.attention|attention",
            mlp="mlp",
        )
    )
register_family(
    EncoderFamily(
        name="dinov3_vit",
        model_types=("dinov3_vit",),
        base="dinov3_vit",
        layers="model.layer|layer",
        attention="attention",
        mlp="mlp",
    )
)
register_family(
    EncoderFamily(
        name="siglip",
        model_types=("siglip", "siglip_vision_model"),
        base="vision_model",
        layers="encoder.layers",
        attention="self_attn",
        mlp="mlp",
    )
)
register_family(
    EncoderFamily(
        name="clip",
        model_types=("clip", "clip_vision_model"),
        base="vision_model",
        layers="encoder.layers",
        attention="self_attn",
        mlp="mlp",
    )
)

REFUSED.update(
    {
        "albert": "Its layers share one attention module, which patch() cannot tell apart.",
        **dict.fromkeys(
            ("deberta", "deberta-v2", "mpnet"),
            "Its relative positions change the scores, and it does not use AttentionInterface.",
        ),
        "timm_wrapper": (
            "It calls a model of timm, whose blocks do not use AttentionInterface: patch that one, "
            "adaptive.patch(model.timm_model)."
        ),
        **dict.fromkeys(
            ("longformer", "big_bird"), "Its attention is sparse by itself, in code of its own."
        ),
    }
)
