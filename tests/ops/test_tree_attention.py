"""Laws of tree_attention: each node gets what it would get if its own path were the cache."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from levels import DTYPES, EVERY, set_for_a_test
from tree_cases import SHAPES, parents_of, seen_by_nodes

from adaptive.ops import decode_attention, tree_attention
from adaptive.ops.tree_attention import ancestors

level = set_for_a_test(EVERY)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@st.composite
def trees(draw, masked=None):
    """Arguments by name; the context ends anywhere around a block of 64 keys."""
    nodes = draw(st.integers(1, 16))
    context = draw(st.one_of(st.integers(0, 140), st.integers(1000, 1050)))
    seed = draw(st.integers(0, 2**16))
    kv_heads = draw(st.integers(1, 2))
    query, key, value, *_, mask = tree_attention.make_inputs(
        batch=2,
        heads=kv_heads * draw(st.sampled_from([1, 3, 4])),
        kv_heads=kv_heads,
        capacity=context + nodes,
        head_dim=draw(st.sampled_from([32, 40, 64, 136])),
        nodes=nodes,
        masked=draw(st.booleans()) if masked is None else masked,
        dtype=draw(st.sampled_from(DTYPES)),
        device="cpu",
        seed=seed,
    )
    parents = parents_of(draw(st.sampled_from(SHAPES)), 2, nodes, seed)
    softcap = draw(st.sampled_from([0.0, 5.0]))
    return {
        "query": query, "key": key, "value": value, "parents": parents, "mask": mask,
        "softcap": softcap,
    }  # fmt: skip


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


def by_mask(arguments):
    """decode_attention with the mask of nodes by tokens that tree_attention does without."""
    tokens = arguments["key"].shape[2]
    seen = seen_by_nodes(arguments["parents"], tokens, arguments["mask"])
    others = {name: arguments[name] for name in ("query", "key", "value", "softcap")}
    return decode_attention(**others, mask=seen, causal=False)


@given(trees())
def test_a_tree_is_its_mask_bit_for_bit(arguments):
    assert_same(tree_attention(**arguments), by_mask(arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("context", [0, 5, 48, 49, 59, 63, 64, 120, 1023])
def test_a_tree_is_its_mask_on_every_level(context, dtype, level):
    for shape in SHAPES:
        query, key, value, *_ = tree_attention.make_inputs(
            2, 6, 2, context + 16, 72, 16, dtype=dtype, device="cpu"
        )
        arguments = {"query": query, "key": key, "value": value, "mask": None, "softcap": 0.0}
        arguments["parents"] = parents_of(shape, 2, 16)
        assert_same(tree_attention(**arguments), by_mask(arguments))


@given(trees())
def test_a_chain_gives_the_bits_of_causal_decode_attention(arguments):
    arguments["parents"] = parents_of("chain", 2, arguments["query"].shape[2])
    made = tree_attention(**arguments)
    mask = arguments["mask"]
    del arguments["parents"]
    arguments["mask"] = None if mask is None else mask[:, None, None]
    assert_same(made, decode_attention(**arguments, causal=True))


@given(trees(masked=False))
def test_each_node_attends_as_if_its_path_were_the_cache(arguments):
    out, lse = tree_attention(**arguments)
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    seen = seen_by_nodes(arguments["parents"], key.shape[2])
    for row, node in ((0, 0), (1, query.shape[2] - 1)):
        path = seen[row, 0, node].nonzero()[:, 0]
        alone = decode_attention(
            query[row : row + 1, :, node : node + 1],
            key[row : row + 1, :, path],
            value[row : row + 1, :, path],
            softcap=arguments["softcap"],
        )
        made = out[row : row + 1, :, node : node + 1], lse[row : row + 1, :, node : node + 1]
        for a, b in zip(made, alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@given(trees(), st.integers(0, 15))
def test_a_node_depends_on_its_ancestors_alone(arguments, node):
    nodes = arguments["query"].shape[2]
    node %= nodes
    out, lse = tree_attention(**arguments)
    others = ~ancestors(arguments["parents"])[:, node]
    for name in ("key", "value"):
        changed = arguments[name].clone()
        tail = changed[:, :, -nodes:]
        tail.masked_fill_(others[:, None, :, None], -3.5)
        arguments[name] = changed
    again = tree_attention(**arguments)
    assert_same((again[0][:, :, node], again[1][:, :, node]), (out[:, :, node], lse[:, :, node]))


@given(trees(masked=True))
def test_what_the_mask_excludes_may_hold_anything(arguments):
    made = tree_attention(**arguments)
    hidden = ~arguments["mask"][:, None, :, None]
    for name in ("key", "value"):
        arguments[name] = arguments[name].masked_fill(hidden, torch.nan)
    assert_same(tree_attention(**arguments), made)


@given(trees())
def test_the_number_of_threads_changes_no_bit(arguments):
    before = torch.get_num_threads()
    made = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        made.append(tree_attention(**arguments))
    torch.set_num_threads(before)
    assert_same(*made)


def test_a_mask_of_nothing_gives_zeros():
    query, key, value, parents, _ = tree_attention.make_inputs(
        1, 2, 1, 9, 64, 3, dtype=torch.float32, device="cpu"
    )
    out, lse = tree_attention(query, key, value, parents, torch.zeros(1, 9, dtype=torch.bool))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_ancestors_are_found_by_walking_up(shape):
    parents = parents_of(shape, 3, 16, seed=4)
    assert torch.equal(ancestors(parents), seen_by_nodes(parents, 16)[:, 0])


QUERY, KEY = torch.ones(2, 4, 3, 64), torch.ones(2, 2, 10, 64)
PARENTS, MASK = torch.tensor([[-1, 0, 1]] * 2), torch.ones(2, 10, dtype=torch.bool)
BAD = {
    "parents is None": ({"parents": None}, TypeError, "parents must be a strided .*got None"),
    "parents int32": ({"parents": PARENTS.int()}, TypeError, "parents must be int64, got torch.i"),
    "parents of two nodes": (
        {"parents": PARENTS[:, :2].contiguous()}, ValueError, "parents must have size 3 in dim"),
    "parents of one row": ({"parents": PARENTS[:1]}, ValueError, "parents must have size 2 in"),
    "parents with gaps": (
        {"parents": torch.full((2, 4), -1)[:, :3]}, ValueError, "parents must be contiguous, got"),
    "a node after itself": (
        {"parents": torch.tensor([[-1, 0, 1], [-1, 0, 2]])}, IndexError,
        r"parents\[1, 2\] must be in -1\.\.1, got 2"),
    "a parent below the context": (
        {"parents": torch.tensor([[-1, -2, 1], [-1, 0, 1]])}, IndexError,
        r"parents\[0, 1\] must be in -1\.\.0, got -2"),
    "fewer keys than nodes": (
        {"key": KEY[:, :, :2], "value": KEY[:, :, :2], "mask": None}, ValueError,
        r"key must end with the keys of the 3 nodes, got shape \[2, 2, 2, 64\]"),
    "17 nodes": (
        {"query": torch.ones(2, 4, 17, 64)}, ValueError, "query must have at most 16 query tokens"),
    "heads no multiple": (
        {"query": QUERY[:, :3]}, ValueError, "query must have a multiple of key's 2 heads, got 3"),
    "query of rank 3": ({"query": QUERY[0]}, ValueError, "query must have 4 dimensions"),
    "float64": ({"query": QUERY.double()}, TypeError, "query must be float32 or float16 or bfl"),
    "key of other dtype": ({"key": KEY.half()}, TypeError, "key must be float32, got torch.float"),
    "head_dim 20": ({"query": QUERY[..., :20]}, ValueError, "query must have a head_dim of 32"),
    "a mask of scores": ({"mask": MASK.float()}, TypeError, "mask must be bool, got torch.float"),
    "a mask of nodes": (
        {"mask": MASK[:, None, None]}, ValueError, "mask must have 2 dimensions, got shape"),
    "a mask of the context": ({"mask": MASK[:, :7]}, ValueError, "mask must have size 10 in dim"),
    "a mask of one row": ({"mask": MASK[:1]}, ValueError, "mask must have size 2 in dimension 0"),
    "scale nan": ({"scale": float("nan")}, ValueError, "scale must be finite"),
    "softcap below 0": ({"softcap": -1.0}, ValueError, "softcap must be 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    changes, error, message = BAD[name]
    good = {"query": QUERY, "key": KEY, "value": KEY, "parents": PARENTS, "mask": MASK}
    with pytest.raises(error, match="adaptive::tree_attention: " + message):
        tree_attention(**{**good, **changes})


def test_options_go_by_name_alone():
    with pytest.raises(TypeError, match="adaptive::tree_attention: arguments must be query, key"):
        tree_attention(QUERY, KEY, KEY, PARENTS, MASK, 0.5)
