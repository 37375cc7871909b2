"""Routed models in full: every module computes everything, and a mask undoes what must not run."""

import contextlib
import inspect

import torch
from models import CONFIGS, make

import adaptive
from adaptive.adapters import family_for

LAYERS = 4
ROUTED = (2, 3)
CASES = ["llama", "gpt2", "gpt_neox", "olmo2", "qwen3", "gemma2", "mistral_window"]
UNITS = ("block", "attention", "mlp")
MODELS = {}


def deep(case, **options):
    """A model of four layers, made once."""
    key = (case, *sorted(options.items()))
    if key not in MODELS:
        name = "n_layer" if CONFIGS[case][0] == "gpt2" else "num_hidden_layers"
        options.setdefault("implementation", "eager" if case == "gemma2" else "sdpa")
        MODELS[key] = make(case, **{name: LAYERS}, **options)
    return MODELS[key]


def width(model):
    return model.config.hidden_size


def parts(model, unit):
    """Modules of the unit, and what a layer's router reads through."""
    family = family_for(model)
    names = {
        "block": family.layer_names(model),
        "attention": family.attention_names(model),
        "mlp": family.mlp_names(model),
    }[unit]
    norms = [model.get_submodule(n) if n else None for n in family.norm_names(model)]
    return [model.get_submodule(name) for name in names], norms


def router(model, layers=ROUTED, seed=0):
    return adaptive.RouterWeights.random(layers, width(model), seed=seed)


def forward(model, given):
    with torch.no_grad():
        return model(**given).logits


class MaskedDense:
    """A model whose units run in full for all, and whose output is masked, in plain PyTorch.

    ``runs`` gives the rows that run each layer, instead of the router. Where single tokens run
    attention, a dense mask hides the keys of the others.
    """

    def __init__(self, model, policy, runs=None):
        self.model, self.policy, self.runs = model, policy, runs
        self.chosen = {}

    def _reads(self, layer, hidden):
        norm = self.norms[layer]
        return norm(hidden) if self.policy.unit == "block" and norm is not None else hidden

    def _choose(self, layer, hidden, mask):
        """Which tokens run, ``[batch, tokens]``, and their logits."""
        policy = self.policy
        states = self._reads(layer, hidden).float()
        real = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        if policy.router is None:
            return torch.zeros_like(real), None
        weight, bias = policy.router.of(layer, torch.device("cpu"))
        if policy.decide == "sequence":
            mean = torch.stack([s[r].mean(0) for s, r in zip(states, real, strict=True)])
            runs = (mean @ weight + bias).sigmoid() >= policy.least
            if self.runs is not None:
                runs = self.runs[layer]
            return runs[:, None].expand_as(real), None
        logits = states @ weight + bias
        if policy.capacity is None:
            return (logits.sigmoid() >= policy.least) & real, logits
        chosen = torch.zeros_like(real)
        for row in range(len(real)):
            places = real[row].nonzero()[:, 0].tolist()
            most = max(1, int(policy.capacity * len(places) + 1e-9))
            best = sorted(places, key=lambda p: (-float(logits[row, p]), p))[:most]
            chosen[row, best] = True
        return chosen, logits

    def __call__(self, given):
        model, policy = self.model, self.policy
        modules, self.norms = parts(model, policy.unit)
        mask = given.get("attention_mask")
        with contextlib.ExitStack() as stack:
            for layer in policy.routed:
                self._mask_output(stack, modules[layer], layer, mask)
            return forward(model, given)

    def _mask_output(self, stack, module, layer, mask):
        policy, state = self.policy, {}

        names = list(inspect.signature(type(module).forward).parameters)[1:]

        def before(_, args, kwargs):
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
            hidden, args = kwargs[names[0]], ()
            chosen, logits = self._choose(layer, hidden, mask)
            self.chosen[layer] = chosen
            state.update(hidden=hidden, chosen=chosen, logits=logits)
            if policy.decide == "token" and policy.unit != "mlp":
                size = hidden.shape[1]
                sees = torch.ones(size, size, dtype=torch.bool).tril()
                window = self._window(layer)
                if window is not None:
                    sees = sees & ~torch.ones(size, size, dtype=torch.bool).tril(-window)
                keys = chosen if policy.kv == "dropped" else self._real(hidden, mask)
                sees = (sees & keys[:, None, :]) | torch.eye(size, dtype=torch.bool)
                added = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
                kwargs = {**kwargs, "attention_mask": added[:, None]}
            return args, kwargs

        def after(_, args, out):
            made = out[0] if isinstance(out, tuple) else out
            rest = state["hidden"] if policy.unit == "block" else torch.zeros_like(made)
            if policy.weighted is True:
                made = rest + state["logits"][..., None] * (made - rest)
            made = torch.where(state["chosen"][..., None], made, rest)
            return (made, *out[1:]) if isinstance(out, tuple) else made

        hooks = [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]
        for hook in hooks:
            stack.callback(hook.remove)

    @staticmethod
    def _real(hidden, mask):
        return torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask.bool()

    def _window(self, layer):
        config = self.model.config
        kinds = getattr(config, "layer_types", None)
        if kinds is not None:
            return config.sliding_window if kinds[layer] == "sliding_attention" else None
        return getattr(config, "sliding_window", None)


def in_pieces(model, given, ends):
    """Logits of a prompt given in pieces, the cache in between, positions as generate counts."""
    ids, mask = given["input_ids"], given["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, start, found = None, 0, []
    for end in ends:
        with torch.no_grad():
            out = model(
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
        cache, start = out.past_key_values, end
        found.append(out.logits)
    return torch.cat(found, 1), cache


def with_positions(given):
    positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**given, "position_ids": positions}


def close(ours, theirs, given, factor=2e-5):
    """Whether logits of tokens that are not padding agree."""
    mask = given.get("attention_mask")
    if mask is not None:
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    error = (ours - theirs).abs().max()
    assert error <= factor * theirs.abs().max(), float(error)
