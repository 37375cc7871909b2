"""Calls with many query tokens: prompts, and long chunks after a cache. What runs them, and why.

Stock attention of such a call gets a dense mask of ``query_tokens x tokens`` unless it is fully
causal without padding. Where the pattern behind the mask is known, `local_attention` computes
nothing but what the queries see, and no mask is made.
"""

import torch
from torch import Tensor

from adaptive import _native
from adaptive.layers import block_sparse
from adaptive.layers.hf_call import Call, inputs_of, is_long
from adaptive.layers.hf_mask import LazyMask
from adaptive.layers.how import How
from adaptive.layers.local_heads import local_mask
from adaptive.layers.pattern import Pattern
from adaptive.layers.sparse_attention import Inputs
from adaptive.layers.state import LayerState
from adaptive.ops import decode_attention, local_attention
from adaptive.ops.decode_attention import MAX_QUERY_TOKENS

FULL_CAUSAL_FROM = 128
"""Tokens from which a fully causal prompt without padding is no slower natively than in SDPA.

Found with AVX-512, one and two threads, all three dtypes, head sizes 64 and 128; fewer tokens come
out on either side of it. Nothing was measured on CUDA, where SDPA stays.
"""


def pattern_of(call: Call, tokens: int) -> Pattern | None:
    """Say what the queries of a call whose cache holds ``tokens`` see, if no mask is needed."""
    mask, queries = call.mask, call.query.shape[2]
    if isinstance(mask, LazyMask):
        pattern = mask.pattern
        fits = pattern is not None and queries <= pattern.tokens <= tokens
        return pattern if fits and mask.shape[2] == queries else None
    if mask is not None:
        return None
    if queries == 1:
        return Pattern(tokens)
    if call.eager:
        return None
    # Stock "sdpa" then takes its causal flag from the top left: queries see no later keys.
    flag = call.kwargs.get("is_causal")
    causal = bool(getattr(call.module, "is_causal", True) if flag is None else flag)
    return Pattern(queries) if causal and queries <= tokens else None


def why_stock_long(state: LayerState, call: Call, pattern: Pattern | None) -> str | None:
    """Say why the stock function must answer a long call; None if the native kernel may."""
    if block_sparse.policy_of(state, call.query, pattern) is not None:
        return None
    if state.prefill is not None and pattern is None:
        return "mask"
    device = call.query.device.type
    known = pattern is not None and device in local_attention.native
    if known and (call.mask is not None or _beats_sdpa(call)):
        return None
    fresh = call.mask is None or call.key.shape[2] == call.query.shape[2]
    return "prefill" if fresh else "long chunk"


def _beats_sdpa(call: Call) -> bool:
    """Whether the native kernel is worth it where SDPA computes nothing in vain."""
    long = call.query.shape[2] >= FULL_CAUSAL_FROM
    return long and call.query.is_cpu and _native.cpu_level() != "baseline"


def with_stock_mask(call: Call) -> Call:
    """Return a call with the mask that stock attention would get."""
    mask = call.mask
    return call._replace(mask=mask.dense()) if isinstance(mask, LazyMask) else call


def with_local_mask(call: Call, how: How) -> Call:
    """Return a call whose mask says what local heads see, for stock attention."""
    call = with_stock_mask(call)
    mask, (batch, _, queries, _) = call.mask, call.query.shape
    tokens = call.key.shape[2]
    if mask is None:
        visible = torch.ones(batch, 1, queries, tokens, dtype=torch.bool, device=call.key.device)
        if queries > 1 and not call.eager:
            visible = visible.tril()
    else:
        visible = mask[..., :tokens]
        if visible.dtype != torch.bool:
            visible = visible > torch.finfo(visible.dtype).min / 2
        visible = visible[:, :1].expand(batch, 1, queries, tokens)
    seen = local_mask(inputs_of(call._replace(mask=visible), tokens), how, visible)
    if call.eager:
        zero = torch.zeros((), dtype=call.query.dtype, device=seen.device)
        seen = torch.where(seen, zero, torch.finfo(call.query.dtype).min)
    return call._replace(mask=seen)


def local_inputs(call: Call, pattern: Pattern) -> Inputs:
    """What a layer with local heads needs to know of a call; the mask, if the call is short."""
    if not is_long(call):
        return inputs_of(with_stock_mask(call), pattern.tokens)
    softcap = call.kwargs.get("softcap") or 0.0
    return Inputs(call.query, call.key, call.value, None, call.scaling, softcap, True)


def without_mask(call: Call, pattern: Pattern | None) -> Call:
    """Return a short call as the decode kernel takes it: without a mask, or with the stock mask.

    One query that sees the last keys of every row needs no mask, just those keys.
    """
    mask = call.mask
    if not isinstance(mask, LazyMask):
        return call
    if pattern is None or pattern.offsets is not None or call.query.shape[2] > 1:
        return with_stock_mask(call)
    first = pattern.tokens - pattern.keys_read(1)
    keys = slice(first, pattern.tokens)
    return call._replace(mask=None, key=call.key[:, :, keys], value=call.value[:, :, keys])


def attend_long(state: LayerState, call: Call, pattern: Pattern) -> Tensor:
    """Answer a call of any length, computing what its queries see and nothing else.

    Args:
        state: Of the attention layer.
        call: What the model asked for.
        pattern: What the queries see.

    Returns:
        ``[batch, heads, query_tokens, head_dim]``, in the dtype of the query.
    """
    query, tokens = call.query, pattern.tokens
    key, value = call.key[:, :, :tokens], call.value[:, :, :tokens]
    softcap = call.kwargs.get("softcap") or 0.0
    policy = block_sparse.policy_of(state, query, pattern)
    if policy is not None:
        prompt = block_sparse.Prompt(query, key, value, pattern.offsets, call.scaling, softcap)
        out = block_sparse.attend_and_count(state, policy, prompt)
    else:
        out, _ = local_attention(
            query,
            key,
            value,
            window=None if pattern.window is None else min(pattern.window, tokens),
            offsets=pattern.offsets,
            scale=call.scaling,
            softcap=softcap,
            causal=pattern.causal,
        )
        count_local(state, call, pattern)
    late = min(pattern.padded_after, query.shape[2])
    if late and isinstance(call.mask, LazyMask):
        _as_stock(call, call.mask, pattern, late, out)
    return out


def _as_stock(call: Call, mask: LazyMask, pattern: Pattern, late: int, out: Tensor) -> None:
    """Let padding after a row's tokens see what stock lets it see: generate reads its logits."""
    assert pattern.offsets is not None
    key, value = call.key[:, :, : pattern.tokens], call.value[:, :, : pattern.tokens]
    ends = pattern.offsets[:, -1:]
    queries = out.shape[2]
    for start in range(queries - late, queries, MAX_QUERY_TOKENS):
        rows = slice(start, min(start + MAX_QUERY_TOKENS, queries))
        bias = mask.rows(rows)[..., : pattern.tokens]
        made, _ = decode_attention(
            call.query[:, :, rows],
            key,
            value,
            mask=bias if bias.dtype == torch.bool else bias.float(),
            scale=call.scaling,
            softcap=call.kwargs.get("softcap") or 0.0,
            causal=False,
        )
        places = torch.arange(rows.start, rows.stop, device=out.device) + pattern.tokens - queries
        padding = (places >= ends)[:, None, :, None]
        out[:, :, rows] = torch.where(padding, made.to(out.dtype), out[:, :, rows])


def count_local(state: LayerState, call: Call, pattern: Pattern) -> None:
    """Count what a native call computed and read, and what dense attention would have computed."""
    if torch.compiler.is_compiling():
        return
    batch, _, queries, _ = call.query.shape
    read = pattern.keys_read(queries)
    key = call.key
    kv_bytes = 2 * batch * key.shape[1] * read * key.shape[3] * key.element_size()
    state.count_path("local")
    state.count_read(batch * read, kv_bytes, 0)
    seen = pattern.scores(batch, queries, pattern.window)
    state.count_scores(seen, Pattern(pattern.tokens).scores(batch, queries, None))
