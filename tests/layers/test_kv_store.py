"""The store holds, bit for bit, what concatenation would hold."""

import copy
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kv_pairs import filled, holds, random_pair

from adaptive.layers.kv_store import KVStore

NUMBERS = st.lists(st.integers(0, 11), min_size=1, max_size=4)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.one_of(st.integers(0, 3), st.integers(100, 700))),
        st.tuples(st.just("crop"), st.integers(0, 4)),
        st.tuples(st.sampled_from(["reorder", "select"]), NUMBERS),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.sampled_from(["reset", "copy"]), st.none()),
    ),
    max_size=12,
)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@given(
    steps=STEPS, batch=st.sampled_from([0, 1, 2, 3]), heads=st.integers(1, 3), k=DTYPES, v=DTYPES
)
def test_any_history_equals_concatenation(device, steps, batch, heads, k, v):
    store, model = KVStore(), None
    for number, (name, argument) in enumerate([("append", 5), *steps]):
        rows = batch if model is None else len(model[0])
        if name == "append":
            new = random_pair(rows, heads, argument, number, device, (k, v))
            model = [torch.cat(x, 2) for x in zip(model, new, strict=True)] if model else new
            returned = store.append(*new)
            assert all(torch.equal(a, b) for a, b in zip(returned, model, strict=True))
        elif name == "reset":
            store.reset()
            model = None
        elif name == "copy":
            store = copy.deepcopy(store)
        elif name == "crop":
            length = store.length * argument // 4
            store.crop(length)
            model = model and [x[:, :, :length] for x in model]
        elif name == "repeat":
            store.repeat(argument)
            model = model and [x.repeat_interleave(argument, 0) for x in model]
        elif rows:
            count = rows if name == "reorder" else len(argument)
            index = [argument[i % len(argument)] % rows for i in range(count)]
            getattr(store, name)(torch.tensor(index, device=device))
            model = model and [x[index] for x in model]
        assert store.length == (model[0].shape[2] if model else 0)
        assert store.length <= store.capacity
        assert store.used_bytes <= store.held_bytes <= store.reserved_bytes
        assert model is None or holds(store, model)


@pytest.mark.parametrize("index", list(product(range(3), repeat=3)))
def test_every_reorder_of_three_rows(device, index):
    store, pair = filled(5, batch=3, device=device)
    start = store.keys.data_ptr()
    store.reorder(torch.tensor(index, device=device))
    assert holds(store, [x[list(index)] for x in pair])
    assert store.keys.data_ptr() == start


@given(st.lists(st.integers(0, 600), min_size=2, max_size=6))
def test_views_show_the_same_tokens_whatever_is_appended_later(device, chunks):
    store, seen = KVStore(), []
    for number, tokens in enumerate(chunks):
        views = store.append(*random_pair(2, 2, tokens, number, device))
        seen.append((views, [x.clone() for x in views]))
    for views, content in seen:
        assert all(torch.equal(a, b) for a, b in zip(views, content, strict=True))


def test_a_store_filled_in_inference_mode_goes_on_outside():
    with torch.inference_mode():
        store, pair = filled(5)
        store.append(*random_pair(2, 2, 500, 1, "cpu"))
        assert not store.keys.is_inference()
    store.append(*random_pair(2, 2, 5, 2, "cpu"))
    query = torch.ones(2, 2, 1, 3, requires_grad=True)
    (query @ store.keys.transpose(-1, -2)).sum().backward()
    assert torch.allclose(query.grad, store.keys.sum(2, keepdim=True), atol=1e-4)
    assert torch.equal(store.keys[:, :, :5], pair[0])


def test_a_tensor_with_a_graph_is_refused_in_grad_mode_alone():
    store, pair = filled(5)
    key, value = (x.detach().requires_grad_() for x in random_pair(2, 2, 1, 1, "cpu"))
    for arguments in [(key, value.detach()), (key.detach(), value)]:
        with pytest.raises(ValueError, match="must not require grad in grad mode"):
            store.append(*arguments)
    assert holds(store, pair)
    with torch.no_grad():
        assert not store.append(key, value)[0].requires_grad


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
def test_a_copy_and_its_original_never_share_storage(make):
    store, pair = filled(5)
    other = make(store)
    store.append(*random_pair(2, 2, 1, 1, "cpu"))
    other.append(*random_pair(2, 2, 1, 2, "cpu"))
    store.reorder(torch.tensor([1, 0]))
    one_more = random_pair(2, 2, 1, 2, "cpu")
    assert holds(other, [torch.cat(x, 2) for x in zip(pair, one_more, strict=True)])


def test_reset_accepts_another_shape_and_crop_keeps_the_storage():
    store, _ = filled(300)
    start = store.keys.data_ptr()
    store.crop(0)
    store.append(*random_pair(2, 2, 300, 1, "cpu"))
    assert store.keys.data_ptr() == start
    store.reset()
    pair = random_pair(5, 1, 2, 1, "cpu", (torch.float16, torch.bfloat16))
    store.append(*pair)
    assert holds(store, pair)


def test_rows_that_stay_are_not_written_by_a_reorder():
    store, pair = filled(5, batch=4)
    store.keys[0].fill_(float("nan"))  # would spread if row 0 were read for another
    store.reorder(torch.tensor([0, 3, 2, 1]))
    assert torch.equal(store.keys[1:], pair[0][[3, 2, 1]])
    assert store.keys[0].isnan().all()


def bad_append(**changes):
    """Call append on a filled store with one thing wrong."""

    def call(store):
        tensors = dict(zip(("key", "value"), random_pair(2, 2, 1, 0, "cpu"), strict=True))
        store.append(**{name: changes.get(name, lambda x: x)(x) for name, x in tensors.items()})

    return call


def select(*index, dtype=torch.int64):
    return lambda store: store.select(torch.tensor(index, dtype=dtype))


ERRORS = [
    (bad_append(key=lambda x: x[0]), ValueError, r"key must have shape \[batch, kv_heads, tokens"),
    (bad_append(value=lambda x: x[0]), ValueError, r"value must have shape \[batch, kv_heads"),
    (bad_append(key=lambda x: x[:1]), ValueError, r"shape \[2, 2, 1, 3\], got \[1, 2, 1, 3\]"),
    (bad_append(value=lambda x: x[:, :1]), ValueError, r"\[2, 2, 1, 5\], got \[2, 1, 1, 5\]"),
    (bad_append(value=lambda x: x.repeat(1, 1, 2, 1)), ValueError, r"got \[2, 2, 2, 5\]"),
    (bad_append(key=lambda x: x[..., :2]), ValueError, r"got \[2, 2, 1, 2\]"),
    (bad_append(key=lambda x: x.half()), TypeError, "key must be torch.float32, got torch.float16"),
    (bad_append(value=lambda x: x.to("meta")), ValueError, "value must be on cpu, got meta"),
    (lambda s: s.crop(-1), ValueError, r"length must be in \[0, 5\], got -1"),
    (lambda s: s.crop(6), ValueError, r"length must be in \[0, 5\], got 6"),
    (lambda s: s.repeat(0), ValueError, "times must be at least 1, got 0"),
    (lambda s: s.reorder(torch.tensor([0])), ValueError, r"index must have shape \[2\], got \[1\]"),
    (select(0, 2), IndexError, r"index\[1\] must be in \[0, 2\), got 2"),
    (select(-1), IndexError, r"index\[0\] must be in \[0, 2\), got -1"),
    (select(1, 1, dtype=torch.float32), TypeError, "index must be int32 or int64"),
    (select(True, False, dtype=torch.bool), TypeError, "index must be int32 or int64"),
    (lambda s: s.select(torch.zeros(1, 1).long()), ValueError, "index must have one dimension"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_an_error_names_the_argument_and_changes_nothing(call, error, message):
    store, pair = filled(5)
    with pytest.raises(error, match=f"adaptive::kv_store: .*{message}"):
        call(store)
    assert holds(store, pair)


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        KVStore(max_tokens=0)


def test_the_first_append_checks_values_against_keys():
    key, value = random_pair(2, 2, 1, 0, "cpu")
    for wrong in (value[:1], value[:, :1], value.repeat(1, 1, 2, 1), value.to("meta")):
        store = KVStore()
        with pytest.raises(ValueError, match="value must"):
            store.append(key, wrong)
        assert store.keys is None


@given(
    batch=st.integers(1, 3),
    before=st.integers(0, 9),
    tail=st.integers(0, 9),
    data=st.data(),
)
def test_keeping_moves_the_chosen_tokens_together(batch, before, tail, data):
    key, value = torch.randn(2, batch, 2, before + tail, 8).unbind(0)
    store = KVStore()
    store.append(key, value)
    size = data.draw(st.integers(0, tail))
    rows = st.lists(st.integers(0, max(tail - 1, 0)), min_size=size, max_size=size)
    index = torch.tensor([data.draw(rows) for _ in range(batch)], dtype=torch.long)
    store.keep(index.view(batch, size), tail)
    assert store.length == before + size
    for held, given_ in ((store.keys, key), (store.values, value)):
        assert torch.equal(held[:, :, :before], given_[:, :, :before])
        for row in range(batch):
            want = given_[row][:, before:][:, index[row]]
            assert torch.equal(held[row, :, before:], want)


def test_keeping_refuses_what_is_not_there_and_changes_nothing():
    store = KVStore()
    store.append(*torch.randn(2, 2, 2, 5, 8).unbind(0))
    before = store.keys.clone()
    for index, tokens, error in (
        (torch.tensor([[0], [3]]), 3, IndexError),
        (torch.tensor([[0]]), 3, ValueError),
        (torch.tensor([0, 1]), 3, ValueError),
        (torch.tensor([[0], [0]]), 6, ValueError),
    ):
        with pytest.raises(error):
            store.keep(index, tokens)
        assert torch.equal(store.keys, before)
