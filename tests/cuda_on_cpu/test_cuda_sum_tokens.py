"""The CUDA kernel of sum_tokens, run on the CPU, against sums in float64."""

import pytest
import torch

from adaptive.ops import sum_tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def inputs(dtype, **sizes):
    """Source, indices and counts of these sizes, as the op's own make_inputs draws them."""
    full = {"batch": 2, "heads": 3, "kv_heads": 3, "capacity": 700, "head_dim": 72, "chosen": 600}
    return sum_tokens.make_inputs(**{**full, **sizes}, dtype=dtype, device="cpu")


def check(sums, source, indices, counts):
    for b in range(source.shape[0]):
        for h in range(source.shape[1]):
            rows = source[b, h, indices[b, h, : int(counts[b, h])].long()].double()
            # A chain of float32 additions is at most as long as the passes of a block, and a tree.
            bound = 32 * torch.finfo(torch.float32).eps * rows.abs().sum(0)
            assert ((sums[b, h] - rows.sum(0)).abs() <= bound).all()


@every_dtype
@pytest.mark.parametrize("number", range(len(sum_tokens.edges)))
def test_edges(sparse, dtype, number):
    given = inputs(dtype, **sum_tokens.edges[number])
    check(sparse.sum(*given), *given)


@every_dtype
@pytest.mark.parametrize("head_dim", [32, 40, 64, 128, 256])
def test_head_dims(sparse, dtype, head_dim):
    given = inputs(dtype, head_dim=head_dim)
    check(sparse.sum(*given), *given)


@every_dtype
def test_layouts_and_what_was_not_chosen(sparse, dtype):
    """Token-major, then an odd pitch; NaN in every row that was not chosen, and between rows."""
    source, indices, counts = inputs(dtype, capacity=300, chosen=100)
    expected = sparse.sum(source, indices, counts)
    taken = torch.zeros(source.shape[:3], dtype=torch.bool)
    for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        taken[b, h, indices[b, h, : int(counts[b, h])].long()] = True
        indices[b, h, int(counts[b, h]) :] = -1
    source[~taken] = torch.nan
    odd = torch.full((*source.shape[:3], 75), torch.nan, dtype=dtype)
    for other in (
        source.transpose(1, 2).contiguous().transpose(1, 2),
        odd[..., :72].copy_(source),
    ):
        strided = indices.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(sparse.sum(other, strided, counts.t().contiguous().t()), expected)


@every_dtype
@pytest.mark.parametrize(
    ("at", "entry"), [(0, -1), (-1, 700), (-1, 2**31 - 1), (300, None), (130, 0)], ids=str
)
def test_a_bad_list_makes_its_head_nan_alone(sparse, dtype, at, entry):
    source, indices, counts = inputs(dtype)
    counts[:] = 600
    expected = sparse.sum(source, indices, counts)
    indices[1, 2, at] = indices[1, 2, at - 1] if entry is None else entry
    sums = sparse.sum(source, indices, counts)
    assert sums[1, 2].isnan().all()
    sums[1, 2] = expected[1, 2]
    assert torch.equal(sums, expected)


@every_dtype
def test_a_bad_count_makes_its_head_nan_alone(sparse, dtype):
    source, indices, counts = inputs(dtype, chosen=20)
    counts[:] = torch.tensor([[-1, 20, 21], [0, 5, 2**31 - 1]])
    sums = sparse.sum(source, indices, counts)
    assert sums.isnan().all(-1).tolist() == [[True, False, True], [False, False, True]]
    assert torch.equal(sums[1, 0], torch.zeros(72))


@every_dtype
@pytest.mark.parametrize("seed", [1, 2])
def test_results_do_not_depend_on_the_order_of_threads(sparse, dtype, seed):
    given = inputs(dtype)
    expected = sparse.sum(*given)
    sparse.set_seed(seed)
    assert torch.equal(sparse.sum(*given), expected)


def test_refusals_name_the_argument(sparse):
    with pytest.raises(RuntimeError, match=r"adaptive::sum_tokens: head_dim must be a multiple"):
        sparse.sum(torch.zeros(1, 1, 9, 44), *inputs(torch.float32)[1:])
