"""A recursive transformer computed in full and masked: what gathering is compared with."""

import math

import torch
import torch.nn.functional as F


def rotated(x, theta):
    """Rotary positions of ``[batch, heads, tokens, head_dim]``, pairs half a head apart."""
    half = x.shape[-1] // 2
    powers = torch.arange(half, dtype=x.dtype) / half
    angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * theta**-powers
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def normed(x, norm):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


def heads_of(layer, x, theta):
    """Queries, keys and values, all heads repeated."""
    heads = normed(x, layer.attention_norm) @ layer.qkv.weight.T
    heads = heads.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
    query, key, value = heads.split([layer.heads, layer.kv_heads, layer.kv_heads], 1)
    group = layer.heads // layer.kv_heads
    key, value = (t.repeat_interleave(group, 1) for t in (rotated(key, theta), value))
    return rotated(query, theta), key, value


def dense_layer(layer, x, theta, keys_seen, shared=None):
    """All tokens through a layer; keys where ``keys_seen``, ``[batch, tokens]``; returns its KV."""
    tokens = x.shape[1]
    query, key, value = heads_of(layer, x, theta)
    key, value = (key, value) if shared is None else shared
    scores = query @ key.mT / math.sqrt(layer.head_dim)
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril() & keys_seen[:, None, None]
    scores = scores.masked_fill(~seen, -1e30)
    mixed = (scores.softmax(-1) * seen) @ value
    x = x + mixed.transpose(1, 2).flatten(2) @ layer.out.weight.T
    gate, up = (normed(x, layer.mlp_norm) @ layer.gate_up.weight.T).chunk(2, -1)
    return x + (F.silu(gate) * up) @ layer.down.weight.T, (key, value)


def stack(layers, x, theta, everyone):
    """Layers that all tokens run once."""
    for layer in layers:
        x, _ = dense_layer(layer, x, theta, everyone)
    return x


def best_of(scores, active, room):
    """The ``room`` active tokens of the highest scores in each row."""
    taken = torch.zeros_like(active)
    for row in range(len(scores)):
        places = active[row].nonzero().flatten().tolist()
        ranked = sorted(places, key=lambda place: -float(scores[row, place]))
        taken[row, ranked[:room]] = True
    return taken


def chosen(config, turn, logit, candidates, select):
    """Tokens that expert choice takes."""
    if select == "threshold":
        return candidates & (logit.sigmoid() >= config.threshold)
    room = max(1, int(config.capacities[turn] * logit.shape[1]))
    return best_of(logit.detach(), candidates, room)


def merged(config, turn, x, done, gates, start, wanted):
    """What the router's weight makes of the block's result."""
    if not config.weighted or config.router is None:
        return done
    if config.router == "expert":
        return x + gates[..., None] * done
    return torch.where((wanted == turn)[..., None], start + gates[..., None] * done, done)


def reference(model, ids, select):
    """Logits, depths, auxiliary loss and z-loss; every token computed in every recursion."""
    config, theta = model.config, model.config.rope_theta
    everyone = torch.ones(ids.shape, dtype=torch.bool)
    x = model.embedding.weight[ids]
    x = stack(model.first_layers, x, theta, everyone)
    start, active, depths = x, everyone, torch.zeros(ids.shape, dtype=torch.int64)
    told, squares, shared, first, gates, wanted = [], [], None, None, None, None
    if config.router == "token":
        logits = x @ model.router.weight.T
        share, wanted = logits.softmax(-1).max(-1)
        gates = config.alpha * share
        counts = torch.stack([(wanted == d).double().mean() for d in range(config.recursions)])
        told = [config.recursions * (counts * logits.softmax(-1).mean((0, 1))).sum()]
        squares = [logits.logsumexp(-1).square().mean()]
    for turn in range(config.recursions):
        candidates = active
        if config.router == "token":
            active = wanted >= turn
        elif config.router == "expert":
            logit = x @ model.router.weight[turn]
            squares.append(logit[candidates].square().mean())
            gates = config.alpha * logit.sigmoid()
            if config.capacities[turn] < 1:
                active = chosen(config, turn, logit, candidates, select)
                sure = logit[candidates].sigmoid()
                right = torch.where(active[candidates], sure, 1 - sure)
                told.append(-right.log().mean())
        first = active if turn == 0 else first
        done, kept = x, []
        reuse = config.kv == "shared" and turn > 0
        for number, layer in enumerate(model.block_layers):
            seen = first if reuse else active
            done, kv = dense_layer(layer, done, theta, seen, shared[number] if reuse else None)
            kept.append(kv)
        shared = kept if turn == 0 else shared
        done = merged(config, turn, x, done, gates, start, wanted)
        x = torch.where(active[..., None], done, x)
        depths += active
    x = stack(model.last_layers, x, theta, everyone)
    logits = normed(x, model.norm) @ model.head.weight.T
    zero = torch.zeros(())
    aux = torch.stack(told).mean() if told else zero
    return logits, depths, aux, torch.stack(squares).mean() if squares else zero
