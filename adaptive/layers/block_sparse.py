"""Long calls that attend to chosen blocks of keys, and how much softmax mass those really had."""

from typing import NamedTuple

import torch
from torch import Tensor

from adaptive.layers.certificate import retained_mass
from adaptive.layers.pattern import Pattern
from adaptive.layers.state import LayerState
from adaptive.ops import (
    block_ranges,
    block_sparse_attention,
    choose_blocks,
    local_attention,
    pool_blocks,
    score_blocks,
    score_lines,
    score_tokens,
)
from adaptive.ops.decode_attention import MAX_QUERY_TOKENS
from adaptive.ops.score_blocks import Ranges
from adaptive.policy import BlockSparsePrefill
from adaptive.policy.block_sparse import A_SHAPE, SELECTED

GOLDEN = 0.6180339887498949


class Prompt(NamedTuple):
    """A causal call with many query tokens, by the names of `local_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    offsets: Tensor | None
    scale: float | None
    softcap: float

    @property
    def start(self) -> int:
        """Position of the first query."""
        return self.key.shape[2] - self.query.shape[2]

    def ranges(self, block: int) -> Ranges:
        """Key blocks that each block of queries sees."""
        queries, tokens = self.query.shape[2], self.key.shape[2]
        return block_ranges(queries, tokens, block, self.offsets, self.query.device)


class Attended(NamedTuple):
    """What came of a prompt.

    Attributes:
        out: ``[batch, heads, query_tokens, head_dim]``, dtype of the query.
        lse: Log-sum-exp over the keys that were read, ``[batch, heads, query_tokens]``.
        counts: Key blocks read, ``[batch, lists, query_blocks]``; None for a window.
    """

    out: Tensor
    lse: Tensor
    counts: Tensor | None


def attend(policy: BlockSparsePrefill, prompt: Prompt) -> Attended:
    """Answer a long call as ``policy`` says, whatever the number of its keys."""
    if policy.pattern == A_SHAPE:
        return _window(policy, prompt)
    indices, counts = choose(policy, prompt)
    out, lse = block_sparse_attention(
        prompt.query,
        prompt.key,
        prompt.value,
        indices,
        counts,
        policy.block,
        prompt.offsets,
        prompt.scale,
        prompt.softcap,
    )
    return Attended(out, lse, counts)


def policy_of(
    state: LayerState, query: Tensor, pattern: Pattern | None
) -> BlockSparsePrefill | None:
    """Return the policy that a long call follows; None: it is as without one.

    Args:
        state: Of the layer.
        query: ``[batch, heads, query_tokens, head_dim]``.
        pattern: What the queries see; None: not known without a mask.
    """
    policy: BlockSparsePrefill | None = state.prefill
    if policy is None or pattern is None or not state.record.sparse:
        return None
    known = pattern.causal and pattern.window is None
    long = pattern.tokens >= policy.min_context and query.shape[2] > policy.dense_tail
    native = query.device.type in block_sparse_attention.native
    return policy if known and long and native else None


def refuse_compiling(state: LayerState, tokens: int) -> None:
    """Raise if torch.compile is at work on a long call that should choose blocks."""
    policy: BlockSparsePrefill | None = state.prefill
    if torch.compiler.is_compiling() and policy is not None and tokens >= policy.min_context:
        raise NotImplementedError(
            "adaptive: BlockSparsePrefill cannot run under torch.compile; compile decoding alone"
        )


def attend_and_count(state: LayerState, policy: BlockSparsePrefill, prompt: Prompt) -> Tensor:
    """Answer a long call as ``policy`` says, measure some of its queries, and count both."""
    key, batch, queries = prompt.key, len(prompt.query), prompt.query.shape[2]
    made = attend(policy, prompt)
    every, computed = _scores(policy, prompt, made.counts)
    state.count_path(policy.pattern)
    state.count_scores(computed, every)
    key_bytes = key.numel() * key.element_size()
    state.count_read(batch * key.shape[2], 2 * key_bytes, 2 * key_bytes)
    if policy.audit is not None:
        state.mass.add(audit(policy, prompt, made.lse))
        state.count_path("audit")
        state.count_read(0, -(-min(policy.audit, queries) // MAX_QUERY_TOKENS) * key_bytes, 0)
    return made.out


def _scores(policy: BlockSparsePrefill, prompt: Prompt, counts: Tensor | None) -> tuple[int, int]:
    """Pairs of query and key of one head: those that causal attention has, those computed."""
    batch, queries, offsets = len(prompt.query), prompt.query.shape[2], prompt.offsets
    every = Pattern(prompt.key.shape[2], offsets=offsets).scores(batch, queries, None)
    if counts is not None:
        ranges, lists = prompt.ranges(policy.block), counts.shape[1]
        seen = (ranges.last - ranges.first + 1).expand(batch, -1)
        # What is left out lies before the diagonal, in whole blocks.
        left_out = int(seen.sum()) * lists - int(counts.sum())
        return every, every - left_out * policy.block**2 // lists
    rest = max(queries - policy.dense_tail, 0)
    end = prompt.start + rest
    cut = Pattern(end, offsets=None if offsets is None else offsets.clamp(max=end))
    near = cut.scores(batch, rest, policy.window(prompt.key.shape[2]), policy.sinks)
    return every, every - cut.scores(batch, rest, None) + near


def choose(policy: BlockSparsePrefill, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Lists of key blocks for each block of queries, as `block_sparse_attention` takes them."""
    ranges = prompt.ranges(policy.block)
    scores = score(policy, prompt, ranges)
    diagonal = 1 if prompt.start % policy.block == 0 else 2
    straddle = int(prompt.offsets is not None and policy.sinks > 0)
    return choose_blocks(
        scores,
        ranges,
        policy.budget,
        policy.mass,
        sinks=policy.sink_blocks + straddle,
        diagonal=diagonal + policy.recent_blocks,
        dense=dense_rows(policy, prompt),
    )


def score(policy: BlockSparsePrefill, prompt: Prompt, ranges: Ranges) -> Tensor:
    """Estimated softmax mass of each key block for each block of queries; see `score_blocks`."""
    query, key, _, offsets, scale, softcap = prompt
    if policy.pattern != SELECTED:
        return score_lines(
            query, key, policy.block, offsets, scale, softcap, per_head=policy.per_head
        )
    mine = None
    if offsets is not None:  # of the queries alone
        mine = (offsets - prompt.start).clamp(min=0).int()
    query_means = pool_blocks(query, policy.block, mine)
    key_means = pool_blocks(key, policy.block, offsets)
    return score_blocks(query_means, key_means, ranges, scale, softcap, policy.per_head)


def dense_rows(policy: BlockSparsePrefill, prompt: Prompt) -> int:
    """Last blocks of queries that hold the tail; padding can put it across one more."""
    queries, tail = prompt.query.shape[2], policy.dense_tail
    if prompt.offsets is not None and tail:
        return -(-tail // policy.block) + 1
    return -(-queries // policy.block) - max(queries - tail, 0) // policy.block if tail else 0


def _window(policy: BlockSparsePrefill, prompt: Prompt) -> Attended:
    """Attend to sinks and a window, but from the tail to all keys."""
    query, key, value, offsets, scale, softcap = prompt
    queries, tokens = query.shape[2], key.shape[2]
    cut = max(queries - policy.dense_tail, 0)
    made = []
    for first, last, window, sinks in (
        (0, cut, policy.window(tokens), policy.sinks),
        (cut, queries, None, 0),
    ):
        if first == last:
            continue
        end = prompt.start + last
        made.append(
            local_attention(
                query[:, :, first:last],
                key[:, :, :end],
                value[:, :, :end],
                window=window,
                sinks=sinks,
                offsets=None if offsets is None else offsets.clamp(max=end),
                scale=scale,
                softcap=softcap,
            )
        )
    out, lse = (torch.cat(parts, 2) for parts in zip(*made, strict=True))
    return Attended(out, lse, None)


def audit(policy: BlockSparsePrefill, prompt: Prompt, lse: Tensor) -> Tensor:
    """Measure the true softmax mass of the keys read, for some queries.

    The queries are one of each stretch of equal length, at a place in it that neither the size of
    blocks nor that of the stretch repeats; the same for calls of the same sizes.

    Args:
        policy: Says how many.
        prompt: The call.
        lse: Over the keys read, of all queries.

    Returns:
        ``[batch, heads, measured queries]``, in 0..1; NaN for padding.
    """
    query, key, _, offsets, scale, softcap = prompt
    rows = audited(query.shape[2], policy.audit or 0).to(query.device)
    made = []
    for some in rows.split(MAX_QUERY_TOKENS):
        _, full = score_tokens(
            query[:, :, some],
            key,
            mask=_seen(some + prompt.start, key.shape[2], offsets),
            scale=scale,
            softcap=softcap,
            causal=False,
            reduce="logit",
        )
        mass = retained_mass(lse[:, :, some], full)
        made.append(mass.masked_fill(full == -torch.inf, torch.nan))
    return torch.cat(made, 2) if made else query.new_empty((*query.shape[:2], 0)).float()


def audited(queries: int, count: int) -> Tensor:
    """Which of ``queries`` are measured, ascending, int64."""
    count = min(count, queries)
    number = torch.arange(count, dtype=torch.float64)
    within = (number + 1) * GOLDEN % 1
    return ((number + within) * (queries / max(count, 1))).long().clamp(max=queries - 1)


def _seen(places: Tensor, tokens: int, offsets: Tensor | None) -> Tensor:
    """Keys that the queries at these positions see, ``[batch or 1, 1, places, tokens]``, bool."""
    keys = torch.arange(tokens, device=places.device)
    seen = (keys <= places[:, None])[None, None]
    if offsets is None:
        return seen
    cuts = offsets.long()
    number = torch.searchsorted(cuts, places.expand(len(cuts), -1).contiguous(), right=True)
    inside = (number > 0) & (number < cuts.shape[1])
    first = cuts.gather(1, (number - 1).clamp(min=0))
    return seen & (inside[..., None] & (keys >= first[..., None]))[:, None]
