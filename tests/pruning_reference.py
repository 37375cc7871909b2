"""Token pruning on BERT by masks alone: every token goes through every layer, and none moves."""

import math

import torch


def class_weights(attention, states, seen):
    """Attention of the first token to all, averaged over heads, from the layer's own weights."""
    batch, tokens, _ = states.shape

    def split(made):
        return made.view(batch, tokens, attention.num_attention_heads, -1).transpose(1, 2)

    query, key = split(attention.query(states))[:, :, :1], split(attention.key(states))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    weights = scores.masked_fill(~seen[:, None, None], -math.inf).softmax(-1)
    return weights[:, :, 0].mean(1), key.mean(1)


def information(weights, keys, places, balance):
    """Turbo's degree of the tokens at ``places`` of one row: informative, and not seen before."""
    unit = torch.nn.functional.normalize(keys[places], dim=-1)
    found = []
    for number, place in enumerate(places):
        alike = [float(unit[number] @ unit[other]) for other in range(number)]
        found.append(balance * float(weights[place]) - max([-1.0, *alike]))
    return found


def pruned_by_masks(base, given, policy):
    """Last states of a BertModel under a TokenPruning, ``[batch, tokens, width]``; differentiable.

    Tokens that went keep the state in which they went, or take that of the fused token.
    """
    states = base.embeddings(input_ids=given["input_ids"])
    layers = base.encoder.layer
    batch, tokens, width = states.shape
    cuts = policy.reducing_layers(len(layers))
    states = torch.cat((states, states.new_zeros(batch, len(cuts), width)), 1)
    seen = torch.zeros(batch, tokens + len(cuts), dtype=torch.bool)
    seen[:, :tokens] = given["attention_mask"].bool()
    final = list(states[:, :tokens].unbind(1))
    owner = torch.arange(tokens + len(cuts)).repeat(batch, 1)  # which token holds each one's state
    for index, layer in enumerate(layers):
        weights, keys = class_weights(layer.attention.self, states, seen)
        made = layer(states, attention_mask=seen[:, None, None])
        states = made[0] if isinstance(made, tuple) else made
        if index not in cuts:
            continue
        slot = tokens + cuts.index(index)
        for row in range(batch):
            gone = _gone(weights[row].detach(), keys[row].detach(), seen[row], policy)
            if len(gone) < (1 if policy.fused == "none" else 2):
                continue
            shares = weights[row, gone]
            if policy.fused == "mean":
                shares = shares / shares.sum()
            seen[row, gone] = False
            if policy.fused != "none":
                seen[row, slot] = True
                token = (shares[:, None] * states[row, gone]).sum(0)
                states = states.index_put((torch.tensor(row), torch.tensor(slot)), token)
            for place in (place for place in range(tokens) if int(owner[row, place]) in gone):
                owner[row, place] = slot if policy.restore == "fused" else -1
                if policy.restore == "cached":
                    held = final[place].clone()
                    held[row] = states[row, place]
                    final[place] = held
    whole = torch.stack(final, 1)
    index = owner[:, :tokens].clamp(min=0)[..., None].expand(-1, -1, width)
    return torch.where(owner[:, :tokens, None] < 0, whole, states.gather(1, index))


def _gone(weights, keys, seen, policy):
    """Places of the tokens of one row that go; of equal ones the last."""
    places = [place for place in seen.nonzero()[:, 0].tolist() if place]
    scores = [float(weights[place]) for place in places]
    if policy.rule == "information":
        units = len(places) + 1  # of attention: its mean is one over all tokens
        scores = information(weights * units, keys, places, policy.balance)
    order = sorted(range(len(places)), key=lambda i: (-scores[i], i))
    return [places[i] for i in order[math.ceil(policy.keep * len(places) - 1e-9) :]]
