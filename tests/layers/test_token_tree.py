"""The table of successors and the trees that grow from it."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from adaptive.layers.token_tree import WIDTH, Successors, Tree, TreeSize, tree_tensors

TEXTS = st.lists(st.integers(0, 9), min_size=2, max_size=60)


@given(TEXTS, st.integers(0, 15), st.integers(0, 9))
def test_every_node_is_a_successor_and_follows_its_parent(text, nodes, token):
    table = Successors()
    table.read(text)
    tree, chances = table.grow(token, nodes)
    assert len(tree.tokens) == len(tree.parents) == len(chances) <= nodes
    pairs = set(pairwise(text))
    for node, parent in enumerate(tree.parents):
        assert parent < node
        before = token if parent < 0 else tree.tokens[parent]
        assert (before, tree.tokens[node]) in pairs
    children = list(zip(tree.parents, tree.tokens, strict=True))
    assert len(set(children)) == len(children)  # no branch twice
    assert chances == sorted(chances, reverse=True)


@given(TEXTS)
def test_depths_and_ancestors_agree(text):
    table = Successors()
    table.read(text)
    tree, _ = table.grow(text[0], 15)
    seen = tree.ancestors()
    assert tree.depths() == [sum(row) for row in seen]
    for node, row in enumerate(seen):
        assert row[node]
        assert not any(row[node + 1 :])


def test_the_latest_successor_comes_first_and_the_oldest_is_forgotten():
    table = Successors()
    table.read([1, 2, 1, 3, 1, 2])
    tree, _ = table.grow(1, 2)
    assert tree.tokens[0] == 2
    for follower in range(10, 10 + WIDTH):
        table.read([1, follower])
    grown, _ = table.grow(1, 15)
    roots = [t for t, p in zip(grown.tokens, grown.parents, strict=True) if p < 0]
    assert roots[0] == 10 + WIDTH - 1
    assert 2 not in roots


def test_ranks_that_were_right_make_deeper_trees():
    table = Successors()
    table.read([1, 2, 1, 3, 1, 4, 2, 1, 3, 1])
    broad, _ = table.grow(1, 8)
    for _ in range(500):
        table.count(1, table.grow(1, 1)[0].tokens[0])
    deep, _ = table.grow(1, 8)
    assert max(deep.depths()) > max(broad.depths())


def test_children_are_found_by_token():
    tree = Tree(tokens=(5, 6, 7, 6), parents=(-1, -1, 0, 0))
    assert tree.child(-1, 6) == 1
    assert tree.child(0, 6) == 3
    assert tree.child(1, 6) is None


def test_tensors_of_trees_of_different_sizes():
    drafted, parents, lengths = tree_tensors([Tree((5, 6), (-1, 0)), Tree((), ())], 3)
    assert drafted.tolist() == [[5, 6, 0], [0, 0, 0]]
    assert parents.tolist() == [[-1, 0, -1], [-1, -1, -1]]
    assert lengths.tolist() == [2, 0]


def run(size, tokens, verify_s, plain_s, steps=400):
    """Steps with a tree, of ``steps``."""
    with_tree = 0
    for _ in range(steps):
        if size.wants():
            with_tree += 1
            size.gained.add(tokens)
            size.verify.add(16, verify_s)
        else:
            size.plain.add(plain_s)
    return with_tree


def test_trees_are_given_up_where_they_cost_more_than_they_bring():
    assert run(TreeSize(most=15), tokens=2.0, verify_s=1.2, plain_s=1.0) > 390
    poor = TreeSize(most=15)
    assert run(poor, tokens=1.05, verify_s=1.2, plain_s=1.0) < 60
    assert poor.turned_off > 0


def test_only_nodes_that_pay_are_checked():
    size = TreeSize(most=15)
    assert size.nodes([0.9, 0.1, 0.001]) == 15  # nothing is known yet
    size.plain.add(1.0)
    for rows in (2, 8, 16, 4, 12):
        size.verify.add(rows, 1.0 + 0.05 * rows)
    assert size.nodes([0.9, 0.1, 0.01, 0.001]) == 2


def test_a_batch_tries_small_trees_first():
    size = TreeSize(most=15, trials=2, first=1)
    size.plain.add(1.0)
    for _ in range(size.trials):
        assert size.nodes([0.9, 0.1, 0.001]) == 1
        size.verify.add(2, 1.2)
        size.gained.add(1.8)
    assert size.nodes([0.9, 0.1, 0.001]) == 3  # what more nodes cost is not known yet
