"""Arrays of other libraries as arguments of ops: same bits, no copy, refusals by name."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from adaptive import _native
from adaptive.ops import decode_attention, interop

SIZES = {"batch": 2, "heads": 4, "kv_heads": 2, "capacity": 70, "head_dim": 64, "query_tokens": 3}


def tensors(dtype=torch.float32, mask="bool"):
    return decode_attention.make_inputs(**SIZES, ragged=True, mask=mask, dtype=dtype, device="cpu")


def arrays(**changes):
    return {
        name: tensor.numpy()
        for name, tensor in zip(
            ("query", "key", "value", "lengths", "mask"), tensors(**changes), strict=True
        )
    }


def op(query, key, value=None, scale=1.0):
    """Stands in for a reference: to_torch reads the names of its parameters."""


@pytest.mark.parametrize("mask", ["bool", "add"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_numpy_gives_the_bits_of_torch(dtype, mask):
    expected = decode_attention(*tensors(dtype, mask))
    before = _native.calls()["decode_attention:cpu"]
    found = decode_attention(**arrays(dtype=dtype, mask=mask))
    assert _native.calls()["decode_attention:cpu"] == before + 1
    for array, tensor in zip(found, expected, strict=True):
        assert type(array) is np.ndarray
        np.testing.assert_array_equal(array, tensor.numpy())


def test_positional_and_optional_arguments_go_through():
    named = arrays()
    query, key, value = named["query"], named["key"], named["value"]
    expected = decode_attention(*map(torch.from_numpy, (query, key, value)), scale=0.5)
    found = decode_attention(query, key, value, None, None, scale=0.5, causal=True)
    np.testing.assert_array_equal(found[0], expected[0].numpy())


def test_gradients_need_not_be_switched_off():
    with torch.enable_grad():
        out, _ = decode_attention(**arrays())
    assert math.isfinite(out.sum())


@pytest.mark.parametrize("writeable", [True, False])
def test_arrays_are_viewed_not_copied(writeable):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)[:, ::2]
    array.flags.writeable = writeable
    (viewed, other), _, restore = interop.to_torch(op, (array, array), {})
    assert viewed.data_ptr() == other.data_ptr() == array.ctypes.data
    assert viewed.stride() == (12, 8, 1)
    np.testing.assert_array_equal(viewed.numpy(), array)
    assert array.flags.writeable == writeable
    assert restore(viewed).ctypes.data == array.ctypes.data


def test_a_read_only_file_on_disk_is_read_in_place(tmp_path, recwarn):
    cache = arrays()
    np.save(tmp_path / "key.npy", cache["key"])
    on_disk = np.load(tmp_path / "key.npy", mmap_mode="r")
    expected = decode_attention(**cache)
    found = decode_attention(**{**cache, "key": on_disk})
    np.testing.assert_array_equal(found[0], expected[0])
    assert not recwarn.list


def test_the_view_keeps_a_read_only_array_alive():
    array = np.full(1 << 16, 7, np.float32)
    array.flags.writeable = False
    (viewed,), _, _ = interop.to_torch(op, (array,), {})
    del array
    assert viewed.eq(7).all()


def test_a_strided_cache_gives_the_same_as_a_dense_one():
    named = arrays()
    wide = np.full((2, 2, 140, 72), np.nan, np.float32)
    wide[:, :, ::2, :64] = named["key"]
    expected = decode_attention(**named)
    found = decode_attention(**{**named, "key": wide[:, :, ::2, :64]})
    np.testing.assert_array_equal(found[0], expected[0])


FLOATS = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.ones(2, 3), TypeError, "key must be a numpy.ndarray like query, got torch.Tensor"),
        (np.ma.array(FLOATS), TypeError, "key must .* without a mask .* numpy.MaskedArray"),
        (FLOATS.astype(object), TypeError, "key must have a dtype that torch knows, got object"),
        (FLOATS.astype(np.longdouble), TypeError, "key must have a dtype .* got (float|longd)"),
        (FLOATS.astype(">f4"), ValueError, "key must have the byte order .* got >f4"),
        (FLOATS[:, ::-1], ValueError, r"key must have .* none negative, got \[12, -4\] bytes"),
        (
            np.zeros(4, [("a", "f4"), ("b", "i1")])["a"],
            ValueError,
            r"key must have aligned .* \[5\]",
        ),
        (np.zeros(9, "u1")[1:].view("f4"), ValueError, "key must have aligned elements"),
    ],
    ids=["torch", "masked", "object", "longdouble", "byte order", "negative", "packed", "offset"],
)
def test_what_cannot_be_viewed_is_refused_by_name(value, error, message):
    for arguments, named in (((FLOATS, value), {}), ((FLOATS,), {"key": value})):
        with pytest.raises(error, match=f"adaptive::op: {message}"):
            interop.to_torch(op, arguments, named)


def test_the_first_argument_must_be_an_array():
    with pytest.raises(TypeError, match=r"adaptive::decode_attention: query must .* got list"):
        decode_attention([1.0], np.ones(1), np.ones(1))


@pytest.mark.parametrize(
    ("argument", "dtype", "condition"),
    [
        ("query", np.float64, "float32 or float16 or bfloat16"),
        ("key", np.float16, "float32"),
        ("lengths", np.int64, "int32"),
        ("mask", np.uint8, "bool or float32"),
    ],
)
def test_the_op_names_the_argument_of_a_wrong_dtype(argument, dtype, condition):
    named = arrays()
    named[argument] = named[argument].astype(dtype)
    with pytest.raises(TypeError, match=rf"decode_attention: {argument} must be {condition}, got"):
        decode_attention(**named)


def test_a_tensor_among_arrays_and_an_array_among_tensors_are_refused():
    named, query = arrays(), torch.from_numpy(arrays()["query"])
    tensors = {name: torch.from_numpy(array) for name, array in named.items()}
    with pytest.raises(TypeError, match=r"value must be a torch\.Tensor like query, got numpy\.nd"):
        decode_attention(**{**tensors, "value": named["value"]})
    with pytest.raises(TypeError, match=r"value must be a numpy\.ndarray like query, got torch"):
        decode_attention(**{**named, "value": torch.from_numpy(named["value"])})
    refused = pytest.raises(TypeError, match=r"key must be a .*torch\.Tensor.* got ndarray")
    with torch.no_grad(), refused:
        decode_attention(query, named["key"], named["value"])


@dataclass
class Exported:
    """An array of some other library: speaks DLPack, and has a namespace with from_dlpack."""

    tensor: torch.Tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __array_namespace__(self):
        return Exported

    @staticmethod
    def from_dlpack(array):
        return Exported(torch.utils.dlpack.from_dlpack(array))


def test_any_library_that_speaks_dlpack_gets_its_own_kind_back():
    expected = decode_attention(*tensors())
    found = decode_attention(*map(Exported, tensors()))
    for array, tensor in zip(found, expected, strict=True):
        assert type(array) is Exported
        assert torch.equal(array.tensor, tensor)


def test_an_export_that_fails_is_refused_by_name():
    class Broken(Exported):
        def __dlpack__(self, **options):
            raise BufferError("this device is elsewhere")

    with pytest.raises(TypeError, match=r"op: key must be .* got this device is elsewhere"):
        interop.to_torch(op, (Exported(torch.ones(1)), Broken(torch.ones(1))), {})


def test_cupy_gives_the_bits_of_torch_on_the_gpu():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not (torch.cuda.is_available() and _native.cuda):
        pytest.skip("no GPU, or a build without CUDA")
    on_gpu = [tensor.cuda() for tensor in tensors()]
    expected = decode_attention(*on_gpu)
    with cupy.cuda.Stream(non_blocking=True):
        found = decode_attention(*map(cupy.from_dlpack, on_gpu))
        assert all(isinstance(array, cupy.ndarray) for array in found)
        np.testing.assert_array_equal(cupy.asnumpy(found[0]), expected[0].cpu().numpy())
