"""LocalStore: however many tokens were dropped, a query sees its window and its row's sinks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive.layers import local_store, window_store
from adaptive.layers.local_store import LocalStore
from adaptive.ops._local_keys import seen_keys


def places(first, count, batch):
    """Keys that hold their position and their row."""
    keys = torch.arange(first, first + count).float()[None, None, :, None].expand(batch, 1, -1, 2)
    return keys + 1000.0 * torch.arange(batch)[:, None, None, None]


def check(store, starts, length, queries):
    """The last queries see the positions that they would in the whole text, by both readings."""
    keys, values = store.tensors()
    assert torch.equal(keys, values)
    held = torch.arange(keys.shape[2])
    sizes = (len(held), store.window, store.sinks, store.offsets(), True)
    by_offsets = seen_keys(held[len(held) - queries :], held, *sizes).expand(len(keys), -1, -1, -1)
    for row, start in enumerate(starts):
        for i in range(queries):
            place = length - queries + i
            near = range(max(start, place - store.window + 1), place + 1)
            wanted = set(near) | set(range(start, min(start + store.sinks, place + 1)))
            for seen in (store.seen(queries), by_offsets):
                found = keys[row, 0, :, 0][seen[row, 0, i]] - 1000 * row
                assert sorted(map(int, found)) == sorted(wanted)


@given(
    starts=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    sinks=st.integers(0, 6),
    window=st.integers(1, 9),
    prompt=st.integers(1, 60),
    chunks=st.lists(st.integers(1, 12), max_size=12),
    spare=st.integers(0, 5),
)
def test_every_query_sees_what_it_would_in_the_whole_text(
    starts, sinks, window, prompt, chunks, spare
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_store, "ROLLBACK", spare)
        patch.setattr(window_store, "LEAST_SLACK", 3)
        starts = [min(start, prompt - 1) for start in starts]
        keys = places(0, prompt, len(starts))
        store = LocalStore(keys, keys, torch.tensor(starts), sinks, window)
        length = prompt
        for count in [*chunks, 1]:
            new = places(length, count, len(starts))
            store.store.append(new, new)
            length += count
            check(store, starts, length, count)
            store.trim()
            assert store.recent <= window - 1 + spare + 3


def test_rows_are_picked_with_their_padding():
    keys = places(0, 100, 3)
    store = LocalStore(keys, keys, torch.tensor([0, 95, 40]), 3, 4)
    store.select(torch.tensor([2, 1, 1]))
    found = store.tensors()[0][:, 0, :, 0]
    seen = store.seen(1)[:, 0, 0]
    assert found[0][seen[0]].tolist() == [2040, 2041, 2042, 2096, 2097, 2098, 2099]
    assert found[1][seen[1]].tolist() == [1095, 1096, 1097, 1098, 1099]
    assert store.starts.tolist()[1] == store.starts.tolist()[2]


def test_a_crop_needs_the_window_before_it():
    keys = places(0, 100, 1)
    store = LocalStore(keys, keys, torch.tensor([0]), 2, 8)
    store.crop(local_store.ROLLBACK)
    kept = 100 - local_store.ROLLBACK
    new = places(kept, 1, 1)
    store.store.append(new, new)
    check(store, [0], kept + 1, 1)
    store.crop(1)
    with pytest.raises(ValueError, match="crop must remove at most 0 tokens, got 1"):
        store.crop(1)
    whole = LocalStore(keys[:, :, :20], keys[:, :, :20], torch.tensor([0]), 2, 8)
    whole.crop(20)  # nothing was dropped, so all of it may go
    assert whole.recent == 0
