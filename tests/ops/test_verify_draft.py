"""Laws of verify_draft: the tokens are those that the target model would have said itself."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive.ops import verify_draft


@st.composite
def drafts(draw, most=40):
    """``(drafted, choices, parents, lengths)`` of few different tokens, so that many fit."""
    batch, nodes = draw(st.integers(1, 4)), draw(st.integers(0, most))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    drafted = torch.randint(0, 2, (batch, nodes), generator=rng)
    choices = torch.randint(0, 2, (batch, nodes + 1), generator=rng)
    parents = lengths = None
    if draw(st.booleans()):
        chance = torch.rand(batch, nodes, generator=rng)
        parents = (torch.arange(1, nodes + 1) * chance).floor().long() - 1
    if draw(st.booleans()):
        lengths = torch.randint(0, nodes + 1, (batch,), generator=rng)
    return drafted, choices, parents, lengths


def walk(drafted, choices, parents, length):
    """The path of one row, by its children."""
    children = {}
    for node in range(length):
        children.setdefault(node - 1 if parents is None else parents[node], []).append(node)
    path, choice = [], choices[0]
    while True:
        here = path[-1] if path else -1
        fitting = [node for node in children.get(here, []) if drafted[node] == choice]
        if not fitting:
            return path, choice
        path.append(fitting[0])
        choice = choices[fitting[0] + 1]


@given(drafts())
def test_each_row_is_the_walk_from_child_to_child(draft):
    drafted, choices, parents, lengths = draft
    accepted, paths, tokens = verify_draft(*draft)
    for row in range(len(drafted)):
        length = drafted.shape[1] if lengths is None else int(lengths[row])
        parent = None if parents is None else parents[row].tolist()
        path, last = walk(drafted[row].tolist(), choices[row].tolist(), parent, length)
        rest = [-1] * (drafted.shape[1] - len(path))
        assert accepted[row] == len(path)
        assert paths[row].tolist() == [*path, -1, *rest]
        assert tokens[row].tolist() == [*drafted[row, path].tolist(), last, *rest]


@given(drafts(most=10))
def test_a_chain_of_parents_is_a_list(draft):
    drafted, choices, _, lengths = draft
    chain = torch.arange(-1, drafted.shape[1] - 1).expand(len(drafted), -1).contiguous()
    made = verify_draft(drafted, choices, chain, lengths)
    listed = verify_draft(drafted, choices, None, lengths)
    assert all(torch.equal(a, b) for a, b in zip(made, listed, strict=True))
    leading = (drafted == choices[:, :-1]).long().cumprod(1).sum(1)
    assert torch.equal(listed[0], leading if lengths is None else leading.minimum(lengths))


@given(drafts())
def test_rows_do_not_depend_on_each_other(draft):
    made = verify_draft(*draft)
    for row in range(len(draft[0])):
        alone = verify_draft(*(t if t is None else t[row : row + 1] for t in draft))
        assert all(torch.equal(a[row], b[0]) for a, b in zip(made, alone, strict=True))


@given(drafts(), st.integers(-(2**62), 2**62))
def test_what_is_not_real_may_hold_anything(draft, value):
    drafted, choices, parents, _ = draft
    lengths = torch.arange(len(drafted)).clamp(max=drafted.shape[1])
    made = verify_draft(drafted, choices, parents, lengths)
    unreal = torch.arange(drafted.shape[1]) >= lengths[:, None]
    drafted, choices = drafted.masked_fill(unreal, value), choices.clone()
    choices[:, 1:].masked_fill_(unreal, value)
    parents = parents if parents is None else parents.masked_fill(unreal, value)
    again = verify_draft(drafted, choices, parents, lengths)
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))


def said(context, vocab):
    """What a model says after these tokens: any function of all of them."""
    return hash(tuple(context)) % vocab


@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 30), st.booleans())
def test_tokens_are_those_of_greedy_decoding(start, vocab, nodes, tree):
    rng = np.random.default_rng(start)
    contexts, parents, drafted = [[start]], [], []
    for node in range(nodes):
        parents.append(int(rng.integers(-1, node)) if tree and node else node - 1)
        drafted.append(int(rng.integers(0, vocab)))
        contexts.append([*contexts[parents[-1] + 1], drafted[-1]])
    choices = [said(context, vocab) for context in contexts]
    accepted, _, tokens = verify_draft(*(torch.tensor([t]) for t in (drafted, choices, parents)))
    greedy = [start]
    for token in tokens[0, : accepted + 1].tolist():
        assert token == said(greedy, vocab)
        greedy.append(token)


def test_the_first_of_twins_is_taken():
    drafted, parents = torch.tensor([[5, 5, 6, 6, 7]]), torch.tensor([[-1, -1, 1, 0, 3]])
    choices = torch.tensor([[5, 6, 6, 0, 7, 9]])
    accepted, path, tokens = verify_draft(drafted, choices, parents)
    assert accepted.tolist() == [3]
    assert path.tolist() == [[0, 3, 4, -1, -1, -1]]
    assert tokens.tolist() == [[5, 6, 7, 9, -1, -1]]


def test_rows_may_have_gaps_between_them():
    drafted, choices, parents, lengths = verify_draft.make_inputs(
        4, 9, tree=True, ragged=True, device="cpu"
    )
    wide = torch.full((4, 30), -7)
    wide[:, 2:11], wide[:, 15:25] = drafted, choices
    made = verify_draft(wide[:, 2:11], wide[:, 15:25], parents, lengths)
    expected = verify_draft(drafted, choices, parents, lengths)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    same = verify_draft(drafted[:1].expand(3, -1), choices[:1].expand(3, -1))
    assert (same[2] == same[2][:1]).all()


def test_numpy_comes_back_as_numpy():
    accepted, path, tokens = verify_draft(np.array([[3, 4]]), np.array([[3, 9, 1]]))
    assert all(isinstance(made, np.ndarray) for made in (accepted, path, tokens))
    assert tokens.tolist() == [[3, 9, -1]]


DRAFTED, CHOICES = torch.zeros(2, 3).long(), torch.zeros(2, 4).long()
BAD = {
    "drafted is a list": ({"drafted": [[1]]}, TypeError, "drafted must be .*got list"),
    "drafted of rank 1": (
        {"drafted": DRAFTED[0]}, ValueError, r"drafted must have 2 dimensions, got shape \[3\]"),
    "drafted int32": (
        {"drafted": DRAFTED.int()}, TypeError, r"drafted must be int64, got torch\.int32"),
    "drafted transposed": (
        {"drafted": torch.zeros(3, 2).long().T}, ValueError, "drafted must be contiguous in its"),
    "choices too short": (
        {"choices": CHOICES[:, :3]}, ValueError, r"choices must have size 4 in dim.*\[2, 3\]"),
    "choices of one row": (
        {"choices": CHOICES[:1]}, ValueError, "choices must have size 2 in dimension 0"),
    "choices float": (
        {"choices": CHOICES.float()}, TypeError, "choices must be int64, got torch.float32"),
    "choices is None": ({"choices": None}, TypeError, "choices must be .*got None"),
    "parents of one row": (
        {"parents": DRAFTED[:1]}, ValueError, "parents must have size 2 in dimension 0"),
    "parents with gaps": (
        {"parents": torch.full((2, 5), -1)[:, :3]}, ValueError, "parents must be contiguous"),
    "a node after itself": (
        {"parents": torch.tensor([[-1, 0, 1], [-1, 1, 0]])}, IndexError,
        r"parents\[1, 1\] must be in -1\.\.0, got 1"),
    "a node before the context": (
        {"parents": torch.tensor([[-2, 0, 1], [-1, 0, 0]])}, IndexError,
        r"parents\[0, 0\] must be in -1\.\.-1, got -2"),
    "lengths int32": (
        {"lengths": torch.tensor([1, 2]).int()}, TypeError, "lengths must be int64, got torch.int"),
    "lengths of one row": (
        {"lengths": torch.tensor([1])}, ValueError, "lengths must have size 2 in dimension 0"),
    "a length too large": (
        {"lengths": torch.tensor([3, 4])}, IndexError, r"lengths\[1\] must be in 0\.\.3, got 4"),
    "a length below 0": (
        {"lengths": torch.tensor([-1, 3])}, IndexError, r"lengths\[0\] must be in 0\.\.3, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    changes, error, message = BAD[name]
    with torch.no_grad(), pytest.raises(error, match="adaptive::verify_draft: .*" + message):
        verify_draft(**{"drafted": DRAFTED, "choices": CHOICES, **changes})


def test_a_wrong_output_is_refused_by_name():
    accepted, path, tokens = verify_draft.outputs(DRAFTED, CHOICES)
    with pytest.raises(ValueError, match="tokens must have size 4 in dimension 1"):
        verify_draft.into(accepted, path, tokens[:, :3], drafted=DRAFTED, choices=CHOICES)
    with pytest.raises(TypeError, match="path must be int64"):
        verify_draft.into(accepted, path.int(), tokens, drafted=DRAFTED, choices=CHOICES)
