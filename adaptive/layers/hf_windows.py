"""Which layers of a transformers model see a window of their own, by its configuration."""

from typing import Any


def sees_chunks(config: Any) -> bool:
    """Whether some layers see chunks of the text, which do not move along with a token."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return getattr(config, "attention_chunk_size", None) is not None
    return "chunked_attention" in kinds


def own_windows(config: Any, layers: int) -> tuple[int | None, ...]:
    """Return the tokens that each layer sees, by a sliding window or chunks; None: all.

    Decides as transformers' caches do, from ``layer_types`` or, without it, one kind for all.

    Args:
        config: Of a decoder.
        layers: Attention layers.
    """
    sizes = {
        "sliding_attention": getattr(config, "sliding_window", None),
        "chunked_attention": getattr(config, "attention_chunk_size", None),
    }
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        set_kinds = [kind for kind, size in sizes.items() if size is not None]
        kinds = [set_kinds[0] if set_kinds else "full_attention"] * layers
    return tuple(sizes.get(kind) for kind in kinds[:layers])
