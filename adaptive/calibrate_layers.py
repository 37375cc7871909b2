"""Which layers should select: similarity of the layers' best keys, and dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptive.ops.head_scores import causal_weights
from adaptive.policy import TidalDecode

QUERIES = 64
"""Last tokens of a prompt whose sets are compared."""

_BUDGET_SHARE = 8
_RECENT_SHARE = 16


class Similarity:
    """How much of each layer's softmax mass lies on the keys that each earlier layer would choose.

    Calibration prompts are short, so budget and recent tokens shrink with them: to at most one
    eighth and one sixteenth of the prompt.

    Args:
        layers: Layers that could select, ascending.
        policy: Says how keys are ranked, and what is always in a set.
        total: Layers of the model.
    """

    def __init__(self, layers: Sequence[int], policy: TidalDecode, total: int) -> None:
        """Start with nothing measured."""
        self._layers = frozenset(layers)
        self._policy = policy
        self._sets: dict[int, Tensor] = {}
        self._sums = torch.zeros(total, total, dtype=torch.float64)
        self._importance = torch.zeros(total, dtype=torch.float64)
        self._prompts = 0

    def begin(self) -> None:
        """Expect the first layer of another prompt."""
        self._sets = {}
        self._prompts += 1

    def attention(
        self, layer: int, query: Tensor, key: Tensor, scale: float | None, softcap: float
    ) -> None:
        """See one layer of one prompt: ``[heads, tokens, head_dim]``, ``[kv_heads, ...]``."""
        if layer not in self._layers:
            return
        tokens = query.shape[1]
        first = max(tokens - QUERIES, 0)
        weights = causal_weights(query[:, first:], key, first, scale, softcap)
        mass = weights.mean(1)  # [kv_heads, queries, tokens]
        for earlier, chosen in self._sets.items():
            where = chosen.expand(len(mass), -1, -1)
            self._sums[earlier, layer] += float(mass.gather(2, where).sum(2).mean())
        self._sets[layer] = self._best(weights, tokens)
        own = self._sets[layer].expand(len(mass), -1, -1)
        self._sums[layer, layer] += float(mass.gather(2, own).sum(2).mean())

    def hidden(self, layer: int, before: Tensor, after: Tensor) -> None:
        """See the residual stream of one prompt around one layer: ``[tokens, width]`` each."""
        before, after = before[-QUERIES:].double(), after[-QUERIES:].double()
        turned = 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1)
        self._importance[layer] += float(turned.mean())

    def _best(self, weights: Tensor, tokens: int) -> Tensor:
        """Keys that this layer would choose for each query: ``[kv_heads or 1, queries, keys]``."""
        policy = self._policy
        scores = weights.amax(1) if policy.group == "max" else weights.sum(1)
        if policy.shared:
            scores = scores.sum(0, keepdim=True)
        budget = max(min(policy.tokens(tokens), tokens // _BUDGET_SHARE), 1)
        recent = max(min(policy.recent, tokens // _RECENT_SHARE), 1)
        queries = scores.shape[1]
        at = torch.arange(tokens - queries, tokens, device=scores.device)[:, None]
        keys = torch.arange(tokens, device=scores.device)
        always = (keys < policy.sinks) | ((keys <= at) & (keys > at - recent))
        return scores.masked_fill(always, torch.inf).topk(min(budget, tokens), dim=2).indices

    def result(self) -> tuple[Tensor, Tensor]:
        """Return ``[layers, layers]`` shares, row's set on column's mass, and ``[layers]`` weights.

        Float32; 0 where nothing was measured. The weight of a layer is 1 minus the cosine between
        the residual stream before and after it.
        """
        prompts = max(self._prompts, 1)
        return (self._sums / prompts).float(), (self._importance / prompts).float()


def choose_layers(similarity: Tensor, importance: Tensor, count: int) -> tuple[int, ...]:
    """Return the layers that should select, so that the others lose least.

    The first layer selects, since the others need something to reuse; each layer reads the keys of
    the last one that selected. Maximises the sum over layers of importance times the share of the
    layer's mass on these keys, 1 for a layer that selects, by dynamic programming (as Kascade,
    arXiv:2512.16391, does). Of equal choices the one with earlier layers.

    Args:
        similarity: ``[layers, layers]``, of which the part above the diagonal is read: the share of
            the column's mass on the row's keys.
        importance: ``[layers]``, 0 or more.
        count: Layers to choose, from 1 to the number of layers.

    Returns:
        Rows of ``similarity``, ascending.

    Raises:
        ValueError: ``count`` is out of range.
    """
    layers = len(importance)
    if not 1 <= count <= layers:
        raise ValueError(f"adaptive: count must be from 1 to {layers} layers, got {count}")
    weighed = (similarity.double() * importance.double()).triu(1)
    reached = weighed.cumsum(1)  # [select, layer]: what select .. layer are worth below select
    own = importance.double().tolist()
    value = [[float(x) for x in row] for row in reached]
    # best[n][a]: most that layers a .. end are worth if a selects and n do in all, and the choice.
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]]
    best = {(1, a): (own[a] + value[a][layers - 1], (a,)) for a in range(layers)}
    for n in range(2, count + 1):
        for a in range(layers - n + 1):
            options = (
                (own[a] + value[a][b - 1] + best[n - 1, b][0], (a, *best[n - 1, b][1]))
                for b in range(a + 1, layers - n + 2)
            )
            best[n, a] = max(options, key=lambda option: option[0])
    return best[count, 0][1]
