"""Deeper encoders for tests of early exits, and what the exits are compared with."""

import copy
import itertools

import torch
from encoder_models import TEXTS, inputs, make, run

from adaptive.adapters import family_for

DEPTH = 4


def deep(case, **fields):
    name = "n_layers" if case == "distilbert" else "num_hidden_layers"
    return make(case, **{name: DEPTH, **fields})


def given_for(case, batch=4, side="right"):
    return inputs(case, batch=batch, side=side if case in TEXTS else "")


def layers_of(model):
    return [model.get_submodule(name) for name in family_for(model).layer_names(model)]


def seen(model):
    """Tokens that each layer gets, as hooks count them."""
    counted = []
    for layer in layers_of(model):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: counted.append((args or [kwargs["hidden_states"]])[0].shape[1]),
            with_kwargs=True,
        )
    return counted


def cut(model, depth):
    """A copy whose list of layers ends after ``depth`` of them."""
    shorter = copy.deepcopy(model)
    path = family_for(model).layer_names(model)[0].removesuffix(".0")
    parent, _, name = path.rpartition(".")
    setattr(shorter.get_submodule(parent), name, shorter.get_submodule(path)[:depth])
    return shorter


def real(out, given):
    mask = given.get("attention_mask")
    return out[mask.bool()] if mask is not None and out.dim() == 3 else out


def one_row(given, row):
    """One sequence alone, its padding left away."""
    alone = {name: value[row : row + 1] for name, value in given.items()}
    mask = alone.get("attention_mask")
    return alone if mask is None else {k: v[:, mask[0].bool()] for k, v in alone.items()}


def cosines(model, given, pool="mean"):
    """Cosines of the pooled state before and after each layer but the last, ``[depth][row]``."""
    seen = []
    hooks = [
        layer.register_forward_hook(
            lambda _, args, out: seen.append((args[0], out[0] if isinstance(out, tuple) else out))
        )
        for layer in layers_of(model)
    ]
    run(model, given)
    for hook in hooks:
        hook.remove()
    found = []
    for pair in seen[:-1]:
        rows = []
        for row in range(len(pair[0])):
            mask = given.get("attention_mask")
            kept = [state[row] if mask is None else state[row][mask[row].bool()] for state in pair]
            vectors = [s.mean(0) if pool == "mean" else s[0] for s in kept]
            rows.append(float(torch.cosine_similarity(*vectors, dim=0)))
        found.append(rows)
    return found


def splitting(found):
    """A threshold that some rows reach earlier than others, and the depths that follow from it."""
    values = sorted(value for rows in found for value in rows)
    best: tuple = ()
    for low, high in itertools.pairwise(values):
        threshold = (low + high) / 2
        depths = [
            next((d + 1 for d, rows in enumerate(found) if rows[row] >= threshold), DEPTH)
            for row in range(len(found[0]))
        ]
        score = (len(set(depths)), high - low)
        best = max(best, (score, threshold, depths))
    assert best[0][0] > 1
    return best[1:]


def histogram(depths):
    return {depth: depths.count(depth) for depth in set(depths)}
