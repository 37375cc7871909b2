"""The gradient of local_attention: against autograd through dense attention, and by differences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from levels import DTYPES
from torch.autograd import Function, gradcheck
from window_cases import attend, qkv

from adaptive.ops import _local_gradient, block_sparse_attention, local_attention
from adaptive.ops.local_attention import reference_mask


class InFloat64(Function):
    """A dense forward pass in float64 before the backward pass that is tested."""

    @staticmethod
    def forward(ctx, *arguments):
        query, key, value, window, windows, sinks, offsets, scale, softcap, causal = arguments
        seen = reference_mask(
            query, key, window if windows is None else windows, sinks, offsets, causal
        )
        results = attend(query, key, value, seen, scale, softcap)
        _local_gradient.setup_context(ctx, arguments, results)
        return results

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        return _local_gradient.backward(ctx, grad_out, grad_lse)


def offsets_of(rows):
    return torch.tensor(rows, dtype=torch.int32)


CASES = {
    "causal": {},
    "window": {"window": 3},
    "window and sinks": {"window": 2, "sinks": 2},
    "windows per head": {"windows": torch.tensor([1, 4, 9, 2], dtype=torch.int32), "sinks": 1},
    "packed": {"window": 3, "sinks": 1, "offsets": offsets_of([[0, 4, 9], [1, 1, 7]])},
    "padded": {"offsets": offsets_of([[3, 9], [0, 5]])},
    "softcap": {"window": 4, "softcap": 1.5},
    "bidirectional": {"window": 3, "sinks": 2, "causal": False},
    "scale": {"window": 5, "scale": 0.7},
}
DEFAULT = {
    "window": None,
    "windows": None,
    "sinks": 0,
    "offsets": None,
    "scale": None,
    "softcap": 0.0,
    "causal": True,
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_slope(name, monkeypatch):
    """By finite differences in float64; one block of all queries gives what blocks of two give."""
    tensors = [t.double().requires_grad_() for t in qkv(9, 7, head_dim=4)]
    options = {**DEFAULT, **CASES[name]}

    def run(*qkv_):
        out, lse = InFloat64.apply(*qkv_, *options.values())
        return out, lse.masked_fill(lse == -torch.inf, 0)

    given = [torch.linspace(-1, 1, t.numel()).view_as(t).double() for t in run(*tensors)]
    made = []
    for block in (256, 2):
        monkeypatch.setattr(_local_gradient, "BLOCK", block)
        made.append(torch.autograd.grad(run(*tensors), tensors, given))
    torch.testing.assert_close(*made, rtol=1e-12, atol=1e-12)
    assert gradcheck(run, tensors, atol=1e-6)


@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.integers(0, 9),
    st.sampled_from([0.0, 3.0]),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 2**16),
)
def test_it_is_that_of_dense_attention(tokens, window, sinks, softcap, causal, dtype, seed):
    query, key, value = qkv(tokens, dtype=dtype, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    weights = torch.randn(query.shape, generator=rng).double()
    log_weights = torch.randn(query.shape[:3], generator=rng).double()
    seen = reference_mask(query, key, window, sinks, None, causal)
    right = [t.double().requires_grad_() for t in (query, key, value)]
    out, lse = attend(*right, seen, softcap=softcap)
    ((out * weights).sum() + (lse * log_weights).sum()).backward()
    made = [t.clone().requires_grad_() for t in (query, key, value)]
    out, lse = local_attention(*made, window, sinks=sinks, softcap=softcap, causal=causal)
    ((out * weights).sum() + (lse * log_weights).sum()).backward()
    # The output that the backward pass starts from is rounded to the dtype, too.
    eps = 4 * torch.finfo(dtype).eps
    for left, other in zip(made, right, strict=True):
        scale = other.grad.abs().max().item() + 1e-3
        torch.testing.assert_close(
            left.grad.double(), other.grad, rtol=max(eps, 1e-4), atol=max(eps, 2e-5) * scale
        )
        assert left.grad.dtype == dtype


def test_what_no_query_sees_has_no_part_in_it():
    query, key, value = qkv(40, dtype=torch.float32)
    offsets = offsets_of([[10, 40], [0, 40]])
    plain = [t.clone().requires_grad_() for t in (query, key, value)]
    local_attention(*plain, 7, offsets=offsets)[0].sum().backward()
    key[0, :, :10], value[0, :, :10] = torch.nan, torch.nan
    poisoned = [t.clone().requires_grad_() for t in (query, key, value)]
    local_attention(*poisoned, 7, offsets=offsets)[0].sum().backward()
    for left, right in zip(plain, poisoned, strict=True):
        assert torch.equal(left.grad, right.grad)
    assert (poisoned[1].grad[0, :, :10] == 0).all()


def test_only_what_needs_a_gradient_gets_one():
    query, key, value = qkv(20)
    value.requires_grad_()
    local_attention(query, key, value, 5)[0].sum().backward()
    assert value.grad is not None
    assert query.grad is None
    assert key.grad is None


def test_memory_grows_with_the_window_alone():
    """4096 tokens: one tensor of tokens x tokens would take 64 MiB as float."""
    tensors = [t.requires_grad_() for t in qkv(4096, batch=1, heads=1, kv_heads=1)]
    with torch.profiler.profile(profile_memory=True) as profile:
        local_attention(*tensors, 64)[0].sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 16 * 2**20


def test_it_compiles():
    def loss(*tensors):
        return local_attention(*tensors, 9, sinks=1)[0].square().sum()

    eager = [t.requires_grad_() for t in qkv(50)]
    loss(*eager).backward()
    compiled = [t.detach().clone().requires_grad_() for t in eager]
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for left, right in zip(eager, compiled, strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-5, atol=1e-5)


def test_block_sparse_attention_refuses_a_gradient():
    query, key, value = qkv(20)
    query.requires_grad_()
    indices, counts = torch.zeros(2, 2, 1, 1).int(), torch.ones(2, 2, 1).int()
    with pytest.raises(NotImplementedError, match="has no backward"):
        block_sparse_attention(query, key, value, indices, counts)
