"""Every op, on every device: native matches reference, and the registration is sound."""

import inspect

import pytest
import torch

from adaptive import _native
from adaptive.ops import OPS

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}  # of sums in float32, whatever the inputs are
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

every_op = pytest.mark.parametrize(
    ("op", "sizes"),
    [
        pytest.param(op, sizes, id=f"{op.name}-{i}")
        for op in OPS.values()
        for i, sizes in enumerate(op.edges)
    ],
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_native_kernel_is_built_and_runs(op, device):
    """Without this, the tests below could compare the reference with itself and pass."""
    assert device in op.native
    sizes = next(sizes for sizes in op.edges if all(sizes.values()))  # none of them empty
    before = _native.calls().get(f"{op.name}:{device}", 0)
    op(*op.make_inputs(**sizes, dtype=torch.float32, device=device))
    assert _native.calls()[f"{op.name}:{device}"] == before + 1


def tensors(results):
    return results if isinstance(results, tuple) else (results,)


@every_op
@every_dtype
def test_native_matches_reference(op, sizes, dtype, device):
    arguments = op.make_inputs(**sizes, dtype=dtype, device=device)
    for made, right in zip(tensors(op(*arguments)), tensors(op.reference(*arguments)), strict=True):
        # Where a result is rounded to 16 bits, two sums may fall on two sides of a tie.
        last_place = torch.finfo(made.dtype).eps if made.is_floating_point() else 0
        relative = max(TOLERANCE["rtol"], last_place)
        torch.testing.assert_close(made, right, rtol=relative, atol=TOLERANCE["atol"])


@every_op
def test_registration_is_sound(op, sizes, device):
    arguments = op.make_inputs(**sizes, dtype=torch.float32, device=device)
    torch.library.opcheck(getattr(torch.ops.adaptive, op.name).default, arguments)


@every_op
def test_outputs_tells_shape_dtype_and_strides(op, sizes, device):
    arguments = op.make_inputs(**sizes, dtype=torch.float32, device=device)
    made_all, promised_all = tensors(op.reference(*arguments)), tensors(op.outputs(*arguments))
    for made, promised in zip(made_all, promised_all, strict=True):
        assert (made.shape, made.dtype, made.device) == (
            promised.shape,
            promised.dtype,
            promised.device,
        )
        strides = zip(made.shape, made.stride(), promised.stride(), strict=True)
        assert made.numel() == 0 or all(a == b for size, a, b in strides if size > 1)


@every_op
def test_inputs_are_not_modified(op, sizes, device):
    arguments = op.make_inputs(**sizes, dtype=torch.float32, device=device)
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    op(*arguments)
    for left, right in zip(arguments, before, strict=True):
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@every_op
def test_into_fills_what_a_call_returns(op, sizes, device):
    arguments = op.make_inputs(**sizes, dtype=torch.float32, device=device)
    made = tensors(op.outputs(*arguments))
    # What make_inputs leaves out has its default.
    op.into(*made, **dict(zip(inspect.signature(op.reference).parameters, arguments, strict=False)))
    for left, right in zip(made, tensors(op(*arguments)), strict=True):
        assert torch.equal(left, right)
