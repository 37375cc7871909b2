"""Rows of a generate call: trees are walked by draws from the model, and rows end on their own."""

from types import SimpleNamespace

import torch
from transformers import MaxLengthCriteria, StoppingCriteriaList

from adaptive.layers.hf_rows import Rows
from adaptive.layers.token_tree import Tree


def rows_of(batch, most=40, sample=False):
    criteria = StoppingCriteriaList([MaxLengthCriteria(most)])
    config = SimpleNamespace(do_sample=sample, max_length=most, _pad_token_tensor=torch.tensor(0))
    return Rows(torch.full((batch, 4), 7), [], criteria, config, None)


def test_a_walk_draws_from_the_model_whatever_the_tree_holds():
    """Chi-square of the first token, and of the second after each first that the tree holds."""
    torch.manual_seed(4)
    batch, vocabulary = 20_000, 6
    tree = Tree(tokens=(1, 2, 3, 1), parents=(-1, -1, 0, 1))
    logits = torch.randn(1, 5, vocabulary)
    rows = rows_of(batch, sample=True)
    paths, chosen = rows.walk(logits.expand(batch, -1, -1), [tree] * batch, most=4)
    chances = logits[0].softmax(-1)
    first = torch.tensor([tokens[0] for tokens in chosen])
    assert _fits(first, chances[0])
    for node, token in ((0, 1), (1, 2)):
        after = [tokens[1] for tokens in chosen if tokens[0] == token]
        assert len(after) > 500
        assert _fits(torch.tensor(after), chances[node + 1])
    for path, tokens in zip(paths, chosen, strict=True):
        assert [tree.tokens[node] for node in path] == tokens[:-1]


def _fits(drawn, chances):
    counts = torch.bincount(drawn, minlength=len(chances)).double()
    expected = chances.double() * len(drawn)
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = len(chances) - 1
    return statistic < degrees + 5 * (2 * degrees) ** 0.5


def test_a_walk_is_no_longer_than_there_is_room():
    tree = Tree(tokens=(1, 1, 1), parents=(-1, 0, 1))
    logits = torch.zeros(1, 4, 3)
    logits[..., 1] = 5.0
    for most in range(4):
        paths, chosen = rows_of(1).walk(logits, [tree], most)
        assert paths == [[0, 1, 2][:most]]
        assert chosen == [[1] * (most + 1)]


def test_rows_that_went_ahead_and_ended_keep_their_tokens():
    rows = rows_of(2, most=8)
    rows.keep([[1, 2, 3, 4], [1]])  # the first row is finished, and longer
    assert rows.alive.tolist() == [False, True]
    assert rows.keep([[9, 9, 9], [2, 3]]) == 2
    assert rows.keep([[9], [4]]) == 1
    assert rows.all_finished()
    assert rows.sequences()[:, 4:].tolist() == [[1, 2, 3, 4], [1, 2, 3, 4]]


def test_a_finished_row_is_padded():
    rows = rows_of(2, most=7)
    rows.keep([[5], [6]])
    rows.alive[0] = False
    rows.keep([[9], [1]])
    assert rows.sequences()[:, 4:].tolist() == [[5, 0], [6, 1]]
