"""What derives from a cache stays true to its content, whatever happens to the cache."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive.layers.derived import PageBounds, RunningSums
from adaptive.layers.kv_store import KVStore

SIZE = 4


def bounds_of(keys):
    pages = [keys[:, :, i : i + SIZE] for i in range(0, keys.shape[2], SIZE)]
    return torch.stack([torch.cat([p.amax(2), p.amin(2)], -1) for p in pages], 2)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 9)),
        st.tuples(st.just("crop"), st.integers(1, 9)),
        st.tuples(st.just("select"), st.sampled_from([[0], [1, 0], [1, 1, 0]])),
        st.tuples(st.just("copy"), st.just(0)),
        st.tuples(st.just("look"), st.just(0)),
    ),
    max_size=12,
)


@given(steps=STEPS, seed=st.integers(0, 1000))
def test_it_equals_what_is_computed_afresh(steps, seed):
    rng = torch.Generator().manual_seed(seed)
    store = KVStore()

    def append(tokens):
        rows = store.batch or 2
        store.append(*(torch.randn(rows, 2, tokens, 8, generator=rng) for _ in "kv"))

    def look():
        keys, values = store.keys, store.values
        sums = store.derived["sums"].update(keys, values)
        for made, source in zip(sums, (keys, values), strict=True):
            torch.testing.assert_close(made, source.double().sum(2))
        assert torch.equal(store.derived["pages"].update(keys), bounds_of(keys))

    append(5)
    store.derived = {"sums": RunningSums(), "pages": PageBounds(SIZE)}
    for what, argument in steps:
        if what == "append":
            append(argument)
        elif what == "crop":
            store.crop(max(store.length - argument, 1))
        elif what == "select":
            store.select(torch.tensor(argument).clamp(max=store.batch - 1))
        elif what == "copy":
            store = copy.deepcopy(store)
        elif what == "look":
            look()
    look()


@pytest.mark.parametrize("tokens", [1, 4, 7])
def test_the_bound_holds_for_every_key_of_a_page(tokens):
    rng = torch.Generator().manual_seed(tokens)
    keys = torch.randn(1, 1, tokens, 8, generator=rng)
    query = torch.randn(1, 1, 1, 8, generator=rng)
    packed = torch.cat([query.clamp(min=0), query.clamp(max=0)], 3)
    bound = (PageBounds(SIZE).update(keys) @ packed.transpose(2, 3))[0, 0, :, 0]
    for page, most in enumerate(bound):
        scores = keys[0, 0, page * SIZE : (page + 1) * SIZE] @ query[0, 0, 0]
        assert (scores <= most + 1e-6).all()


def test_a_crop_can_be_undone_until_it_is_written_over():
    store = KVStore()
    keys = torch.randn(1, 1, 6, 8)
    store.append(keys, keys)
    store.crop(2)
    store.append(-keys[:, :, 2:3], keys[:, :, 2:3])
    store.restore(6)
    assert torch.equal(store.keys[:, :, 3:], keys[:, :, 3:])
    assert torch.equal(store.keys[:, :, 2], -keys[:, :, 2])
    for length in (5, 300):
        with pytest.raises(ValueError, match=rf"length must be in \[6, \d+\], got {length}"):
            store.restore(length)
