"""Attention with positions counted within what is kept, plainly: keys turned anew for each query.

The model is run with all positions 0, which leaves queries and keys as the projections made them.
"""

import torch
from models import make
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "rebased_reference"


def powers(theta, width):
    return theta ** (-torch.arange(0, width, 2).double() / width)


def rotated(states, places, frequencies, interleaved):
    """``states`` ``[..., head_dim]`` turned by ``places``, which broadcast to ``[...]``."""
    pairs = len(frequencies)
    rest = states[..., 2 * pairs :]
    if interleaved:
        both = states[..., : 2 * pairs].unflatten(-1, (pairs, 2))
    else:
        both = states[..., : 2 * pairs].unflatten(-1, (2, pairs)).transpose(-1, -2)
    turned = torch.view_as_complex(both.double().contiguous())
    angles = places[..., None].double() * frequencies
    turned = torch.view_as_real(turned * torch.polar(torch.ones_like(angles), angles))
    turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    return torch.cat([turned, rest.expand(*turned.shape[:-1], -1).double()], -1)


def kept(real, window, sinks):
    """What each query sees, where it finds it, and where it stands; ``[batch, tokens, tokens]``."""
    places = real.cumsum(1) - 1
    query, key = places[:, :, None], places[:, None]
    dropped = (query - (sinks + window - 1)).clamp(min=0)
    seen = (key <= query) & ((query - key < window) | (key < sinks)) & real[:, None]
    return seen, torch.where(key < sinks, key, key - dropped), places - dropped[..., 0]


class Reference:
    """Runs a model, of one frequency table per layer, with rebased positions."""

    def __init__(self, case, tables, interleaved=False, **fields):
        self.model = make(case, **fields)
        self.tables, self.interleaved = tables, interleaved
        AttentionInterface.register(NAME, self.attend)
        AttentionMaskInterface.register(NAME, lambda **_: None)
        self.model.config._attn_implementation = NAME
        self.calls = 0

    def logits(self, ids, real, window, sinks, heads=None):
        """``heads``: (layer, KV head) pairs that are local; None: all."""
        self.real, self.sizes, self.heads, self.calls = real, (window, sinks), heads, 0
        return self.model(ids, position_ids=torch.zeros_like(ids), use_cache=False).logits

    def attend(self, module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
        layer = self.calls
        self.calls += 1
        group = query.shape[1] // key.shape[1]
        made = []
        for head in range(key.shape[1]):
            local = self.heads is None or (layer, head) in self.heads
            sizes = self.sizes if local else (key.shape[2], 0)
            seen, found, stands = kept(self.real, *sizes)
            turn = (self.tables[layer], self.interleaved)
            keys = rotated(key[:, head, None], found, *turn)  # [batch, queries, keys, head_dim]
            for one in range(head * group, (head + 1) * group):
                queries = rotated(query[:, one], stands, *turn)
                scores = torch.einsum("btd,btsd->bts", queries, keys) * scaling
                if kwargs.get("softcap"):
                    scores = kwargs["softcap"] * torch.tanh(scores / kwargs["softcap"])
                weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
                made.append(weights @ value[:, head].double())
        return torch.stack(made, 2).to(value.dtype), None
