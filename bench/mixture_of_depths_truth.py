"""Mixture-of-Depths by hand, in plain PyTorch: what the benchmark's policies are compared with."""

from typing import Any

import torch
from torch import Tensor

from adaptive import RouterWeights


@torch.inference_mode()
def by_hand(model: Any, ids: Tensor, router: RouterWeights, capacity: float) -> Tensor:
    """Logits of a prompt of one sequence whose routed layers see the best tokens alone."""
    base = model.model
    rotary = base.rotary_emb(states := base.embed_tokens(ids), torch.arange(ids.shape[1])[None])
    for index, layer in enumerate(base.layers):
        if index not in router.layers:
            states = _first(layer(states, position_embeddings=rotary, attention_mask=None))
            continue
        weight, _ = router.of(index, states.device)
        logits = layer.input_layernorm(states).float() @ weight
        kept = logits.sigmoid()[0].topk(int(capacity * ids.shape[1])).indices.sort().values
        some = tuple(part[:, kept] for part in rotary)
        made = layer(states[:, kept], position_embeddings=some, attention_mask=None)
        states = states.index_copy(1, kept, _first(made))
    return model.lm_head(base.norm(states))  # type: ignore[no-any-return]


def _first(out: Any) -> Tensor:
    made: Tensor = out[0] if isinstance(out, tuple) else out
    return made
