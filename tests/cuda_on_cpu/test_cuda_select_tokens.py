"""The CUDA kernels of select_tokens, run on the CPU: the choice of the CPU kernel, to the last."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from simulated_sparse import Sparse

from adaptive.ops import select_tokens


@pytest.fixture(scope="module")
def every_example(builder, objects, sparse_objects):
    """What `sparse` gives, one for all examples of a law."""
    return Sparse(builder.library(*objects, *sparse_objects))


def check(sparse, *arguments, **options):
    """Compares with the CPU kernel, which is compared with sorting, and returns the result."""
    with torch.no_grad():
        expected = select_tokens(*arguments, **options)
    made = sparse.select(*arguments, **options)
    for a, b in zip(made, expected, strict=True):
        assert torch.equal(a, b)
    return made


def scores_of(kind, shape, seed):
    rng = torch.Generator().manual_seed(seed)
    scores = {
        "exp": lambda: (3 * torch.randn(shape, generator=rng)).exp(),
        "ties": lambda: torch.randint(0, 3, shape, generator=rng).float(),
        "close": lambda: 1 + torch.rand(shape, generator=rng) * 2.0**-16,
        "tiny": lambda: torch.rand(shape, generator=rng) * 2.0**-140,
        "equal": lambda: torch.full(shape, 0.5),
    }[kind]()
    scores[(scores == 0) & (torch.rand(shape, generator=rng) < 0.5)] = -0.0
    scores[torch.rand(shape, generator=rng) < 0.1] = -math.inf
    return scores


KINDS = ("exp", "ties", "close", "tiny", "equal")


@pytest.mark.parametrize("sizes", select_tokens.edges, ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 40])
def test_edges(sparse, sizes, multiprocessors):
    sparse.set_device(multiprocessors)
    check(sparse, *select_tokens.make_inputs(**sizes, device="cpu"))


@given(
    kind=st.sampled_from(KINDS),
    capacity=st.integers(1, 1500),
    budget=st.integers(1, 1600),
    sinks=st.integers(0, 20),
    recent=st.integers(0, 20),
    mass=st.sampled_from([1.0, 0.99, 0.5, 1e-6]),
    seed=st.integers(0, 1000),
)
def test_every_choice_is_that_of_the_cpu(
    every_example, kind, capacity, budget, sinks, recent, mass, seed
):
    scores = scores_of(kind, (2, 2, capacity), seed)
    lengths = torch.tensor([capacity, seed % (capacity + 1)], dtype=torch.int32)
    budget = max(budget, sinks + recent)
    check(every_example, scores, budget, lengths, sinks, recent, mass)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mass", [1.0, 0.9])
@pytest.mark.parametrize("budget", [1, 700, 13000])
def test_lines_of_many_blocks(sparse, kind, mass, budget):
    sparse.set_device(8)
    scores = scores_of(kind, (1, 2, 13001), seed=budget)
    check(sparse, scores, budget, mass=mass)
    scores[..., :6000] = -math.inf
    check(sparse, scores, budget + 68, sinks=4, recent=64, mass=mass)


def test_scores_of_both_signs_and_infinity(sparse):
    scores = torch.randn(1, 2, 3000)
    scores[0, 0, 1234] = math.inf
    check(sparse, scores, 1500)
    check(sparse, -scores.abs(), 1500, sinks=3)


def test_strided_rows_are_read_in_place(sparse):
    wide = torch.randn(3, 2, 2, 500)
    check(sparse, wide[::2, :, 1, 100:400].transpose(0, 1), 40)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("mass", [1.0, 0.7])
def test_results_do_not_depend_on_the_order_of_threads(sparse, seed, mass):
    sparse.set_device(8)
    scores = scores_of("exp", (1, 2, 9000), seed)
    sparse.set_seed(seed)
    check(sparse, scores, 900, sinks=2, recent=5, mass=mass)


@pytest.mark.parametrize(
    ("value", "mass"), [(math.nan, 1.0), (math.nan, 0.5), (-1.0, 0.5), (math.inf, 0.5)]
)
@pytest.mark.parametrize("position", [0, 4500, 8999])
@pytest.mark.parametrize("budget", [20, 9000])
def test_a_refused_score_spoils_its_head_alone(sparse, value, mass, position, budget):
    sparse.set_device(8)
    scores = scores_of("exp", (2, 2, 9000), seed=1)
    expected = check(sparse, scores, budget, sinks=1, recent=1, mass=mass)
    scores[1, 0, position] = value
    indices, counts = sparse.select(scores, budget, sinks=1, recent=1, mass=mass)
    assert counts[1, 0] == -1
    assert (indices[1, 0] == -1).all()
    indices[1, 0], counts[1, 0] = expected[0][1, 0], expected[1][1, 0]
    assert torch.equal(indices, expected[0])
    assert torch.equal(counts, expected[1])


@pytest.mark.parametrize("length", [-1, 301, 2**31 - 1])
@pytest.mark.parametrize("mass", [1.0, 0.5])
def test_a_bad_length_spoils_its_row_alone(sparse, length, mass):
    scores = scores_of("exp", (2, 3, 300), seed=1)
    lengths = torch.tensor([300, length], dtype=torch.int32)
    indices, counts = sparse.select(scores, 30, lengths, mass=mass)
    assert (counts[1] == -1).all()
    assert (indices[1] == -1).all()
    with torch.no_grad():
        expected = select_tokens(scores[:1], 30, mass=mass)
    assert torch.equal(indices[:1], expected[0])
    assert torch.equal(counts[:1], expected[1])


def test_a_short_workspace_is_refused(sparse):
    with pytest.raises(RuntimeError, match=r"adaptive::select_tokens: workspace must have \d+ byt"):
        sparse.select(torch.rand(1, 1, 10), 3, short_workspace=1)
