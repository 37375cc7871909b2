"""The heads that a router chooses for each token."""

import torch
from torch import Tensor

from adaptive.layers.head_choice import HeadChoice, Span, the_same
from adaptive.layers.linear_scores import linear_scores


@torch.no_grad()
def best_heads(
    states: Tensor,
    router: tuple[Tensor, Tensor],
    top_k: int,
    weighted: bool,
    real: Tensor | None,
    layer: int,
) -> HeadChoice:
    """Choose for each token its best heads; for padding none.

    Args:
        states: What the router reads, ``[tokens, width]``.
        router: Weight ``[kv_heads, width]`` and bias ``[kv_heads]``, float32.
        top_k: KV heads of each token. Of equal scores the first.
        weighted: Whether heads are scaled by the softmax of the scores of the chosen.
        real: Which tokens are no padding, ``[tokens]``; None: all.
        layer: To be named.

    Raises:
        ValueError: A score of a token that is no padding is NaN.
    """
    scores = linear_scores(states, *router)
    wrong = scores.isnan()
    if bool((wrong if real is None else wrong[real]).any()):
        raise ValueError(f"adaptive: HeadRouting: scores of layer {layer} must be numbers, got NaN")
    rows, heads = scores.shape
    chosen = scores.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    scales = None
    if weighted:
        gates = scores.gather(1, chosen).softmax(1) * top_k
        scales = torch.ones_like(scores).scatter(1, chosen, gates)
    if rows == 1 and real is None:
        return the_same(1, tuple(sorted(chosen[0].tolist())))._replace(scales=scales)
    runs = torch.zeros((heads, rows), dtype=torch.bool, device=scores.device)
    runs.scatter_(0, chosen.T, True)
    if real is not None:
        runs &= real
    counts = runs.sum(1).tolist()
    places = runs.nonzero()[:, 1].contiguous().split(counts)
    spans: list[Span] = []
    for head, count in enumerate(counts):
        if count == rows:
            begun = bool(spans) and spans[-1][1] == head and spans[-1][2] is None
            first = spans.pop()[0] if begun else head
            spans.append((first, head + 1, None))
        elif count:
            spans.append((head, head + 1, places[head]))
    return HeadChoice(rows, spans, scales)
