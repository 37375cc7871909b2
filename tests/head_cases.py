"""What the tests of HeadRouting share: policies for tiny models, and the masked dense model."""

import copy

import torch

import adaptive
from adaptive import ExpertRouterWeights, HeadRouting

FOUR = {"num_attention_heads": 8, "num_key_value_heads": 4}
"""Two query heads to each of four KV heads."""
LARGE = {**FOUR, "hidden_size": 1024, "head_dim": 128, "num_hidden_layers": 1}
"""Large enough for the linear kernels."""
ROUTER = ExpertRouterWeights.random((0, 1), 4, 128, seed=3)


def routed(top_k=2, **fields):
    return HeadRouting(**{"top_k": top_k, "router": ROUTER, "audit_every": None, **fields})


def fixed(*heads):
    return HeadRouting(heads=heads, audit_every=None)


VARIANTS = {
    "one": routed(1),
    "two": routed(2),
    "weighted": routed(3, weighted=True),
    "one layer": HeadRouting(
        top_k=2, router=ExpertRouterWeights.random((1,), 4, 128, seed=5), audit_every=None
    ),
    "fixed": fixed((0, 1), (0, 2), (1, 0), (1, 3)),
    "fixed in one": fixed((1, 2)),
}


def query_of(attention):
    """The projection that queries come from."""
    return getattr(attention, "q_proj", None) or attention.qkv_proj


class Masked:
    """A stock copy of a patched model that multiplies what heads give by 0, or by a weight."""

    def __init__(self, model, policy):
        """Take the weights, and the policy, and nothing else."""
        self.model, self.policy, self.runs, self._gates = copy.deepcopy(model), policy, {}, {}
        if "_adaptive_record" in self.model.__dict__:
            adaptive.patched(self.model).unpatch()
        for layer in policy.layers:
            attention = self.model.model.layers[layer].self_attn
            query_of(attention).register_forward_pre_hook(self._choose(layer))
            attention.o_proj.register_forward_pre_hook(self._mask(layer))

    def _choose(self, layer):
        def hook(_, args):
            self._gates[layer] = self.gates(layer, args[0])

        return hook

    def _mask(self, layer):
        def hook(_, args):
            gates = self._gates[layer]
            wide = gates.repeat_interleave(args[0].shape[-1] // gates.shape[-1], -1)
            return (args[0] * wide.to(args[0].dtype),)

        return hook

    def gates(self, layer, states):
        policy = self.policy
        if policy.heads is not None:
            gates = torch.zeros(*states.shape[:-1], 4)
            gates[..., list(policy.heads_of(layer))] = 1
        else:
            weight, bias = policy.router.of(layer, states.device)
            with torch.autocast("cpu", enabled=False):
                scores = states.detach().float() @ weight.T + bias
            best = scores.topk(policy.top_k, -1)
            ones = torch.ones_like(best.values)
            scales = policy.top_k * best.values.softmax(-1) if policy.weighted else ones
            gates = torch.zeros_like(scores).scatter(-1, best.indices, scales)
        runs = (gates != 0).flatten(0, -2).sum(0).tolist()
        before = self.runs.get(layer, [0] * 4)
        self.runs[layer] = [a + b for a, b in zip(before, runs, strict=True)]
        return gates

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)
