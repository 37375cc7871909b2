"""Attention of a transformers model in which each token runs some of the heads alone."""

from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive.errors import PatchConflict
from adaptive.layers.head_choice import HeadChoice
from adaptive.layers.hf_call import (
    Attended,
    Call,
    gathered,
    inputs_of,
    is_long,
    rows_of,
    stock_function,
    why_stock,
)
from adaptive.layers.hf_prefill import (
    attend_long,
    pattern_of,
    why_stock_long,
    with_stock_mask,
    without_mask,
)
from adaptive.layers.sparse_attention import Inputs
from adaptive.layers.state import LayerState
from adaptive.ops import decode_attention

BLOCK = 192
"""Query tokens that SDPA gets at a time: it computes what a mask hides, up to the last key seen.

Of 64 to 512 the fastest in float32 and bfloat16 with AVX-512, at 2048 tokens.
"""


def chosen_heads(state: LayerState) -> HeadChoice | None:
    """What the tokens of the call now running in a layer chose; None: they run all heads."""
    now = state.record.switch.head_pass
    return None if now is None else now.chosen.get(state.site.layer)


def attend_chosen(call: Call, state: LayerState, choice: HeadChoice, reduced: bool) -> Attended:
    """Answer a call for the heads that each token runs; what the others would give is 0.

    Raises:
        NotImplementedError: The call asks for more than that, or its cache was reduced.
        PatchConflict: Something else than the projection that was patched gets what heads give.
        ValueError: The choice was made for another number of tokens.
    """
    batch, _, queries, _ = call.query.shape
    _refuse(call, state, reduced)
    if batch * queries != choice.rows:
        raise ValueError(
            f"adaptive: HeadRouting: attention must get the {choice.rows} tokens whose heads were "
            f"chosen, got {batch * queries}"
        )
    output: Any = call.module.o_proj
    if choice.scales is not None and "forward" not in output.__dict__:
        raise PatchConflict(
            "adaptive: HeadRouting weights what heads give inside of 'o_proj', which someone "
            "wrapped since patch(); unpatch() first"
        )
    if not choice.spans:  # nothing but padding
        return call.query.new_zeros(call.query.shape).transpose(1, 2), None
    start = perf_counter()
    native = why_stock(call, state) is None
    if native and not is_long(call):
        made = _few(call, state, choice)
    elif choice.same:
        made, native = _spans(call, state, choice)
    else:
        made, native = _many(call, choice), False
    if choice.audited is not None:
        every = HeadChoice(choice.rows, [(0, state.site.kv_heads, choice.audited)])
        few = native and not is_long(call)
        full = _few(call, state, every) if few else _many(call, every)
        choice.full.append(full.flatten(0, 1)[choice.audited])
    state.record.timed = call.query.is_cpu
    seconds = perf_counter() - start if state.record.timed else 0.0
    count = state.count_native if native else state.count_torch
    count(choice.rows, 0, 0, seconds)
    return made, None


def _refuse(call: Call, state: LayerState, reduced: bool) -> None:
    """Raise where a call asks for what is not known of parts of the heads."""
    reason = "a cache that another policy reduced" if reduced else None
    if state.record.want_weights:
        reason = "output_attentions"
    elif call.dropout > 0:
        reason = "dropout"
    elif call.kwargs.get("softcap") is not None or call.kwargs.get("s_aux") is not None:
        reason = "scores that are capped, or shared with sinks"
    elif call.mask is not None and call.mask.shape[1] != 1:
        reason = "a mask of each head"
    if reason is not None:
        raise NotImplementedError(f"adaptive: HeadRouting does not go with {reason}")


def _few(call: Call, state: LayerState, choice: HeadChoice) -> Tensor:
    """At most 16 query tokens, natively: each reads the keys of its heads where they are."""
    cache_rows = rows_of(call)
    call = without_mask(call, pattern_of(call, call.key.shape[2]))
    batch, heads, queries, head_dim = call.query.shape
    inputs = inputs_of(call, call.key.shape[2])
    kv_heads, keys = inputs.key.shape[1:3]
    device = call.query.device
    if choice.rows == 1 and inputs.mask is None and cache_rows is None:
        return _one(call.query, inputs, state, choice)
    tokens, chosen = choice.pairs(device)
    row = tokens // queries
    where = row if cache_rows is None else cache_rows.to(device)[row]
    query = call.query.transpose(1, 2).reshape(choice.rows, kv_heads, -1, head_dim)
    mask, lengths = inputs.mask, None
    if mask is not None:
        mask = mask[..., :keys].expand(batch, 1, queries, keys)[row, 0, tokens % queries]
        mask = mask[:, None, None]
    elif inputs.causal:
        lengths = (keys - queries + 1 + tokens % queries).int()
    made, _ = decode_attention(
        query[tokens, chosen][:, :, None],
        inputs.key.flatten(0, 1)[:, None],
        inputs.value.flatten(0, 1)[:, None],
        lengths=lengths,
        mask=mask,
        scale=inputs.scale,
        causal=False,
        cache_rows=where * kv_heads + chosen,
    )
    out = query.new_zeros(query.shape)
    out[tokens, chosen] = made[:, :, 0].to(out.dtype)
    read = len(tokens) * keys
    element = inputs.key.element_size()
    state.count_read(read // kv_heads, 2 * read * head_dim * element, 0)
    state.count_path("chosen heads")
    return out.view(batch, queries, heads, head_dim)


def _one(query: Tensor, inputs: Inputs, state: LayerState, choice: HeadChoice) -> Tensor:
    """One token, as `_few`: decoding, where Python's time counts."""
    _, heads, _, head_dim = query.shape
    kv_heads, keys = inputs.key.shape[1:3]
    ran = [head for start, stop, _ in choice.spans for head in range(start, stop)]
    chosen = torch.tensor(ran, device=query.device)
    query = query.reshape(kv_heads, heads // kv_heads, 1, head_dim)
    made, _ = decode_attention(
        query[chosen],
        inputs.key[0, :, None],
        inputs.value[0, :, None],
        scale=inputs.scale,
        cache_rows=chosen,
    )
    out = torch.zeros_like(query)
    out[chosen] = made.to(out.dtype)
    read = len(ran) * keys
    state.count_read(read // kv_heads, 2 * read * head_dim * inputs.key.element_size(), 0)
    state.count_path("chosen heads")
    return out.view(1, 1, heads, head_dim)


def _spans(call: Call, state: LayerState, choice: HeadChoice) -> tuple[Tensor, bool]:
    """Any call whose tokens run the same heads: dense attention of these; and whether natively."""
    call = gathered(call)
    batch, heads, queries, head_dim = call.query.shape
    group = heads // call.key.shape[1]
    out, native = call.query.new_zeros(batch, queries, heads, head_dim), True
    for start, stop, _ in choice.spans:
        part = call._replace(
            query=call.query[:, start * group : stop * group],
            key=call.key[:, start:stop],
            value=call.value[:, start:stop],
        )
        out[:, :, start * group : stop * group], ours = _dense(part, state)
        native = native and ours
    return out, native


def _dense(call: Call, state: LayerState) -> tuple[Tensor, bool]:
    """What attention gives without any choice, ``[batch, query_tokens, heads, head_dim]``."""
    pattern = pattern_of(call, call.key.shape[2])
    long = is_long(call)
    reason = why_stock(call, state) or (why_stock_long(state, call, pattern) if long else "few")
    if reason is None and pattern is not None:
        return attend_long(state, call, pattern).transpose(1, 2), True
    call = with_stock_mask(call)
    function = stock_function(call.module, "eager" if call.eager else "sdpa")
    made, _ = function(
        call.module,
        call.query,
        call.key,
        call.value,
        call.mask,
        scaling=call.scaling,
        dropout=0.0,
        **call.kwargs,
    )
    return made, False


def _many(call: Call, choice: HeadChoice) -> Tensor:
    """Any call: of each head the tokens that run it, in blocks, up to the last key they see."""
    call = with_stock_mask(gathered(call))
    batch, heads, queries, head_dim = call.query.shape
    kv_heads = call.key.shape[1]
    group = heads // kv_heads
    out = call.query.new_zeros(batch, kv_heads, queries, group, head_dim)
    every = torch.arange(choice.rows, device=call.query.device)
    causal = _causal_rows(call)
    for start, stop, rows in choice.spans:
        places = every if rows is None else rows
        ends = torch.arange(1, batch, device=places.device) * queries
        cuts = torch.searchsorted(places, ends).cpu()
        for row, some in enumerate(places.tensor_split(cuts)):
            for part in (some - row * queries).split(BLOCK):
                if not len(part):
                    continue
                mask, last = _seen(call, causal, row, part)
                at = slice(start * group, stop * group)
                key, value = (
                    tensor[row : row + 1, start:stop, :last].repeat_interleave(group, 1)
                    if stop - start > 1
                    else tensor[row : row + 1, start:stop, :last].expand(1, group, -1, -1)
                    for tensor in (call.key, call.value)
                )
                made = F.scaled_dot_product_attention(
                    call.query[row : row + 1, at, part], key, value, mask, scale=call.scaling
                )
                made = made.view(stop - start, group, len(part), head_dim).transpose(1, 2)
                out[row, start:stop, part] = made.to(out.dtype)
    return out.transpose(1, 2).reshape(batch, queries, heads, head_dim)


def _causal_rows(call: Call) -> Tensor | None:
    """Masks to be added, the last query's first, ``[query_tokens, query_tokens]``; None: no need.

    Overlapping views of one row of zeros and one of -inf, so that those of some queries are copied
    and not computed.
    """
    queries = call.query.shape[2]
    if call.mask is not None or call.eager or queries == 1:
        return None
    line = call.query.new_zeros(2 * queries - 1)
    line[queries:] = -torch.inf
    return line.unfold(0, queries, 1)


def _seen(call: Call, causal: Tensor | None, row: int, part: Tensor) -> tuple[Tensor | None, int]:
    """The mask of some queries of a row, and up to which key they see any."""
    keys = call.key.shape[2]
    if causal is not None:  # stock "sdpa" then lets queries see no later keys, from the top left
        last = int(part[-1]) + 1
        return causal[:, :last].index_select(0, len(causal) - 1 - part)[None, None], last
    if call.mask is None:
        return None, keys
    mask = call.mask[row if call.mask.shape[0] > 1 else 0, 0, :, :keys][part]
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    some = seen.any(0).nonzero()
    last = int(some[-1]) + 1 if len(some) else keys
    mask = mask if mask.dtype == torch.bool else mask.to(call.query.dtype)
    return mask[None, None, :, :last], last
