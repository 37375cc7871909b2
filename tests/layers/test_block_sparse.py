"""Laws of long calls that attend to chosen blocks: what they equal, and what their audit says."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive.layers.block_sparse import Prompt, attend, audit, audited, choose, dense_rows
from adaptive.ops import local_attention
from adaptive.ops._local_keys import seen_keys
from adaptive.ops.block_sparse_attention import listed_blocks
from adaptive.policy import BlockSparsePrefill

I32 = torch.int32
PATTERNS = {
    "selected": {"mass": 0.5},
    "selected, with recent": {"mass": 0.5, "recent": 20},
    "selected, heads apart": {"mass": 0.5, "per_head": True},
    "selected, a share": {"budget": 0.3},
    "vertical_slash": {"pattern": "vertical_slash", "budget": 3},
    "vertical_slash, heads apart": {"pattern": "vertical_slash", "mass": 0.4, "per_head": True},
    "a_shape": {"pattern": "a_shape", "budget": 3},
}
LISTED = {name: fields for name, fields in PATTERNS.items() if name != "a_shape"}
every_pattern = pytest.mark.parametrize("fields", PATTERNS.values(), ids=PATTERNS)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def prompt(queries=300, tokens=300, offsets=None, batch=2, seed=0, softcap=0.0):
    rng = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(batch, 4, queries, 32, generator=rng)
    key, value = (torch.randn(batch, 2, tokens, 32, generator=rng) for _ in range(2))
    cuts = None if offsets is None else torch.tensor(offsets, dtype=I32)
    return Prompt(query, key, value, cuts, None, softcap)


def policy(**fields):
    return BlockSparsePrefill(**{"block": 16, "sinks": 4, "recent": 0, "dense_tail": 16, **fields})


def dense(call):
    return local_attention(
        call.query, call.key, call.value, offsets=call.offsets, softcap=call.softcap
    )


CALLS = {
    "a prompt": {},
    "a chunk": {"queries": 77},
    "a chunk between blocks": {"queries": 75, "tokens": 290},
    "padded before": {"offsets": [[0, 300], [39, 300]]},
    "padded after": {"offsets": [[0, 300], [10, 233]]},
    "packed": {"offsets": [[0, 100, 300], [5, 260, 290]]},
    "a padded chunk": {"queries": 140, "offsets": [[0, 300], [222, 300]]},
    "softcap": {"softcap": 3.0},
}
every_call = pytest.mark.parametrize("sizes", CALLS.values(), ids=CALLS)


@every_call
@pytest.mark.parametrize("pattern", ["selected", "vertical_slash", "a_shape"])
def test_all_blocks_are_dense_attention(sizes, pattern):
    call = prompt(**sizes)
    made = attend(policy(pattern=pattern, budget=1.0), call)
    for left, right in zip(made[:2], dense(call), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@every_call
@every_pattern
def test_the_tail_and_what_a_window_holds_are_dense(sizes, fields):
    call = prompt(**sizes)
    chosen = policy(**fields)
    made, right = attend(chosen, call), dense(call)
    queries, tokens = call.query.shape[2], call.key.shape[2]
    for row in range(2):
        end = tokens if call.offsets is None else int(call.offsets[row, -1])
        if fields.get("pattern") == "a_shape":
            end = tokens  # the last queries, whoever they are
        last = slice(max(end - 16 - tokens + queries, 0), end - tokens + queries)
        torch.testing.assert_close(
            made.out[row, :, last], right[0][row, :, last], rtol=1e-4, atol=1e-5
        )
    assert (made.lse <= right[1] + 1e-4).all()
    some = (made.lse < right[1] - 1e-3).any()
    assert some, "a choice that keeps all tests nothing"


@every_call
@pytest.mark.parametrize("fields", LISTED.values(), ids=LISTED)
def test_what_is_not_chosen_is_not_read(sizes, fields):
    call = prompt(**sizes)
    chosen = policy(dense_tail=0, **fields)
    indices, counts = choose(chosen, call)
    blocks = -(-call.key.shape[2] // 16)
    listed = listed_blocks(indices, counts, blocks).repeat_interleave(4 // indices.shape[1], dim=1)
    tokens = call.key.shape[2]
    keys, rows = torch.arange(tokens), torch.arange(call.query.shape[2])
    seen = seen_keys(keys[call.start :], keys, tokens, None, 0, call.offsets, True)
    seen = seen & listed[:, :, rows // 16][..., keys // 16]
    logits = call.query @ call.key.repeat_interleave(2, 1).mT * 32**-0.5
    if call.softcap:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    right = torch.logsumexp(logits.masked_fill(~seen, -torch.inf), -1)
    torch.testing.assert_close(attend(chosen, call).lse, right, rtol=1e-4, atol=1e-4)


@every_call
@every_pattern
def test_the_audit_tells_the_mass_of_what_was_read(sizes, fields):
    call = prompt(**sizes)
    chosen = policy(audit=50, **fields)
    made, (_, full) = attend(chosen, call), dense(call)
    mass = audit(chosen, call, made.lse)
    rows = audited(call.query.shape[2], 50)
    right = torch.exp(made.lse - full)[:, :, rows]
    torch.testing.assert_close(mass, right, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert mass.nan_to_num(1.0).min() < 0.99, "a mass of one tests nothing"


@given(st.integers(1, 400), st.integers(1, 70))
def test_audited_queries_are_spread_and_in_order(queries, count):
    rows = audited(queries, count)
    assert len(rows) == min(queries, count)
    assert (rows.diff() > 0).all() or len(rows) == queries
    assert torch.equal(rows, audited(queries, count))
    stretch = queries / len(rows)
    number = torch.arange(len(rows))
    assert ((rows >= (number * stretch).long()) & (rows <= (number + 1) * stretch)).all()


def test_audited_queries_fall_everywhere_within_blocks():
    assert len(set((audited(16384, 64) % 64).tolist())) > 32


@pytest.mark.parametrize("queries", [1, 15, 16, 17, 32, 300])
@pytest.mark.parametrize("tail", [0, 1, 16, 17, 33, 500])
def test_the_tail_takes_the_blocks_that_hold_it_and_no_more(queries, tail):
    rows = dense_rows(policy(dense_tail=tail, budget=3), prompt(queries))
    blocks = -(-queries // 16)
    held = {n for n in range(blocks) if min((n + 1) * 16, queries) > queries - tail and tail}
    assert held == set(range(blocks - rows, blocks))


def test_a_row_of_a_batch_is_the_row_alone():
    call = prompt(offsets=[[0, 300], [39, 300]])
    for fields in PATTERNS.values():
        made = attend(policy(**fields), call)
        for row in range(2):
            one = slice(row, row + 1)
            alone = Prompt(*(part[one] for part in call[:4]), *call[4:])
            found = attend(policy(**fields), alone)
            torch.testing.assert_close(found.out, made.out[one], rtol=1e-4, atol=1e-5)


@every_call
@pytest.mark.parametrize("pattern", ["selected", "vertical_slash"])
def test_blocks_with_sinks_and_recent_tokens_are_always_read(sizes, pattern):
    call = prompt(**sizes)
    chosen = policy(pattern=pattern, mass=0.01, dense_tail=0, sinks=17, recent=20)
    blocks = -(-call.key.shape[2] // 16)
    listed = listed_blocks(*choose(chosen, call), blocks)
    seen = call.ranges(16).visible(blocks).expand(2, -1, -1)
    for row in range(2):
        for n, blocks_seen in enumerate(seen[row]):
            places = blocks_seen.nonzero()[:, 0].tolist()
            wanted = {*places[:2], *places[-3:]}
            assert all(wanted <= set(x[n].nonzero()[:, 0].tolist()) for x in listed[row])


def test_more_mass_reads_more_and_keeps_more():
    call = prompt(tokens=600, queries=600)
    kept, read = [], []
    for mass in (0.2, 0.5, 0.9, 0.99):
        made = attend(policy(mass=mass, dense_tail=0), call)
        read.append(int(made.counts.sum()))
        kept.append(float(audit(policy(audit=600), call, made.lse).mean()))
    assert read == sorted(read)
    assert kept == sorted(kept)
    assert read[0] < read[-1]


def test_audit_is_off_on_request():
    call = prompt()
    made = attend(policy(audit=None), call)
    assert audit(policy(audit=None), call, made.lse).shape == (2, 4, 0)
    assert dataclasses.replace(policy(), audit=None).audit is None
