"""Attention of a patched encoder: every token sees both ways, so all is one call per layer.

Stock attention gets a dense mask of ``tokens x tokens`` wherever there is padding or a window. The
native kernel needs none, and does not compute what padding and windows leave out. Without either,
stock attention is the faster one, and answers.
"""

import torch
from torch import Tensor

from adaptive.layers.certificate import retained_mass
from adaptive.layers.hf_call import Call
from adaptive.layers.hf_mask import LazyMask
from adaptive.layers.pattern import Pattern
from adaptive.layers.state import LayerState
from adaptive.ops import decode_attention, local_attention
from adaptive.ops.decode_attention import MAX_QUERY_TOKENS
from adaptive.policy import GlobalLocalAttention
from adaptive.policy.global_local import pairs_seen

UNMASKED_NATIVE = False
"""Whether calls without padding and window run the native kernel, too, in place of SDPA."""

_ONE_SEQUENCE = 2
"""Cuts of a row that holds one sequence."""


def pattern_of(call: Call) -> Pattern | None:
    """Say what the tokens of a call see, if that is known without a mask."""
    mask, tokens = call.mask, call.key.shape[2]
    if call.query.shape[2] != tokens:
        return None
    if isinstance(mask, LazyMask):
        pattern = mask.pattern
        fits = pattern is not None and pattern.tokens == tokens and not pattern.causal
        return pattern if fits and mask.shape[2] == tokens else None
    if mask is not None:
        return None
    if not call.eager and tokens > 1:
        flag = call.kwargs.get("is_causal")
        if getattr(call.module, "is_causal", True) if flag is None else flag:
            return None
    return Pattern(tokens, causal=False)


def why_stock_encoder(call: Call, state: LayerState, pattern: Pattern | None) -> str | None:
    """Say why the stock function must answer a call, by its mask; None if the kernel may."""
    if pattern is None:
        if state.how is not None:
            state.record.refuse_compiling()  # a graph makes its masks, and they have no pattern
        return "mask"
    if call.query.device.type not in local_attention.native:
        return f"device {call.query.device.type}"
    if _policy(state, pattern) is not None:
        return "packed sequences" if _is_packed(pattern) else None
    unmasked = pattern.offsets is None and pattern.window is None
    return "no mask" if unmasked and not UNMASKED_NATIVE else None


def attend_encoder(
    state: LayerState, call: Call, pattern: Pattern | None
) -> tuple[Tensor, Tensor | None]:
    """Answer a call natively, and count it.

    Returns:
        ``[batch, tokens, heads, head_dim]``, in the dtype of the query, and no weights; zeros for
        padding, but for the first token of a row, which poolers read: it sees what stock attention
        lets it see.
    """
    assert pattern is not None
    policy = _policy(state, pattern)
    window = pattern.window if policy is None else policy.window
    first = 0 if policy is None else min(policy.globals, pattern.tokens)
    out, lse = local_attention(
        call.query,
        call.key,
        call.value,
        window=None if window is None else min(window, pattern.tokens),
        sinks=first,
        offsets=pattern.offsets,
        scale=call.scaling,
        softcap=call.kwargs.get("softcap") or 0.0,
        causal=False,
    )
    if first:
        _attend_globals(call, pattern, first, out)
    _first_token_as_stock(call, pattern, out)
    if torch.compiler.is_compiling():
        return out.transpose(1, 2), None
    if policy is not None and _audit_is_due(state, policy):
        _audit(state, call, pattern, lse, first)
    _count(state, call, pattern, window, first)
    state.count_path("local" if policy is None else policy.modes[0])
    return out.transpose(1, 2), None


def with_policy_mask(call: Call, state: LayerState, pattern: Pattern | None) -> Call:
    """Return a call whose mask says what the policy lets tokens see, for stock attention.

    What trains, drops out or returns weights then does so on the keys that the kernel would read.
    Padding sees what stock attention lets it see.
    """
    policy = None if pattern is None else _policy(state, pattern)
    if pattern is None or policy is None or _is_packed(pattern):
        return call
    device = call.query.device
    places = torch.arange(pattern.tokens, device=device)
    starts, ends = _bounds(pattern, call.query.shape[0], device)
    real = (places >= starts) & (places < ends)
    free = ~real | (places < starts + policy.globals)  # sees every token
    near = (places[:, None] - places).abs() < policy.window
    seen = near | free[:, :, None] | free[:, None, :]
    seen = (seen & real[:, None, :])[:, None]
    if call.eager:
        zero = torch.zeros((), dtype=call.query.dtype, device=device)
        seen = torch.where(seen, zero, torch.finfo(call.query.dtype).min)
    return call._replace(mask=seen)


def _policy(state: LayerState, pattern: Pattern) -> GlobalLocalAttention | None:
    """The policy of a layer, where it leaves anything out."""
    policy: GlobalLocalAttention | None = state.how
    return policy if policy is not None and policy.window < pattern.tokens else None


def _is_packed(pattern: Pattern) -> bool:
    return pattern.offsets is not None and pattern.offsets.shape[1] > _ONE_SEQUENCE


def _attend_globals(call: Call, pattern: Pattern, count: int, out: Tensor) -> None:
    """Let the first tokens of each sequence see all of it: writes their rows of ``out``."""
    places, known, visible = _places(pattern, call.query.shape[0], out.device, 0, count)
    for start in range(0, count, MAX_QUERY_TOKENS):
        piece = slice(start, start + MAX_QUERY_TOKENS)
        made, _ = _attend_rows(call, places[:, piece], visible)
        _write(out, made, places[:, piece], known[:, piece])


def _attend_rows(call: Call, places: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """Let up to 16 tokens of each row, ``[batch, count]``, see all visible ones."""
    _, heads, _, width = call.query.shape
    index = places[:, None, :, None].expand(-1, heads, -1, width)
    return decode_attention(
        call.query.gather(2, index),
        call.key,
        call.value,
        mask=visible,
        scale=call.scaling,
        softcap=call.kwargs.get("softcap") or 0.0,
        causal=False,
    )


def _write(out: Tensor, made: Tensor, places: Tensor, known: Tensor) -> None:
    """Write rows that were made, ``[batch, heads, count, head_dim]``, to their places."""
    index = places[:, None, :, None].expand_as(made)
    kept = out.gather(2, index)
    out.scatter_(2, index, torch.where(known[:, None, :, None], made.to(out.dtype), kept))


def _places(
    pattern: Pattern, batch: int, device: torch.device, skip: int, count: int, shift: float = -1.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Positions of some tokens of each row.

    Args:
        pattern: What the tokens see.
        batch: Rows.
        device: Of the call.
        skip: Tokens at the start of each sequence that are left out.
        count: How many positions.
        shift: Below 0: the first. Otherwise spread evenly, and moved by this share of a step.

    Returns:
        Positions ``[batch, count]``, int64; whether there is such a token; and which tokens are
        not padding, ``[batch, 1, 1, tokens]``, None: all.
    """
    steps = torch.arange(count, device=device)[None]
    starts, ends = _bounds(pattern, batch, device)
    visible = None
    if pattern.offsets is not None:
        tokens = torch.arange(pattern.tokens, device=device)[None]
        visible = ((tokens >= starts) & (tokens < ends))[:, None, None]
    first = starts + skip
    if shift >= 0:
        steps = ((steps + shift) * (ends - first).clamp(min=0) / count).long()
    places = first + steps
    return places.clamp(max=pattern.tokens - 1), places < ends, visible


def _bounds(pattern: Pattern, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the one sequence of each row starts and ends, ``[batch, 1]``, int64."""
    if pattern.offsets is None:
        starts = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        return starts, starts + pattern.tokens
    return pattern.offsets.long()[:, :1], pattern.offsets.long()[:, -1:]


def _first_token_as_stock(call: Call, pattern: Pattern, out: Tensor) -> None:
    """Give the first token of a row that starts with padding what stock attention gives it."""
    if not isinstance(call.mask, LazyMask) or not pattern.padded_before:
        return
    bias = call.mask.rows(slice(0, 1))
    made, _ = decode_attention(
        call.query[:, :, :1],
        call.key,
        call.value,
        mask=bias if bias.dtype == torch.bool else bias.float(),
        scale=call.scaling,
        softcap=call.kwargs.get("softcap") or 0.0,
        causal=False,
    )
    assert pattern.offsets is not None
    padding = (pattern.offsets[:, :1] > 0)[:, None, :, None]
    out[:, :, :1] = torch.where(padding, made.to(out.dtype), out[:, :, :1])


def _audit_is_due(state: LayerState, policy: GlobalLocalAttention) -> bool:
    every = policy.audit_every
    return every is not None and state.paths.get(policy.modes[0], 0) % every == 0


def _audit(state: LayerState, call: Call, pattern: Pattern, lse: Tensor, first: int) -> None:
    """Measure the softmax mass that some tokens kept, other ones on every audit."""
    audits = state.paths.get("audit", 0)
    count = min(MAX_QUERY_TOKENS, pattern.tokens - first)
    if count < 1:
        return
    shift = (audits * 0.618034) % 1.0  # never the same places again, and evenly spread
    places, known, visible = _places(
        pattern, call.query.shape[0], call.query.device, first, count, shift
    )
    _, full = _attend_rows(call, places, visible)
    kept = lse.gather(2, places[:, None].expand_as(full))
    mass = retained_mass(kept, full)
    state.mass.add(mass.masked_fill(~known[:, None], torch.nan))
    state.count_path("audit")


def _count(state: LayerState, call: Call, pattern: Pattern, window: int | None, first: int) -> None:
    """Count what a call read and computed, and what dense attention would have computed."""
    batch, heads, tokens, width = call.key.shape
    lengths = [tokens] * batch if pattern.lengths is None else pattern.lengths
    kv_bytes = 2 * batch * heads * tokens * width * call.key.element_size()
    state.count_read(batch * tokens, kv_bytes, 0)
    seen = sum(pairs_seen(length, window, first) for length in lengths)
    state.count_scores(seen, batch * tokens * tokens)
