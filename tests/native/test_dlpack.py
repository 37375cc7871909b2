"""What DLPack allows and torch does not send: strides left out, devices that nobody knows."""

import ctypes

import pytest
import torch

from adaptive import _native
from adaptive.ops import decode_attention

CPU, ONE_API = 1, 14
FLOAT = 2


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))
def borrow(array, out):
    out[0] = array.view
    return 0


class ExchangeApi(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("unused", ctypes.c_void_p * 4),
        ("borrow", type(borrow)),
        ("current_stream", ctypes.c_void_p),
    ]


def capsule(api):
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = (
        ctypes.py_object,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
    )
    return make(ctypes.addressof(api), NAME, None)


API, NAME = ExchangeApi(major=1, minor=3, borrow=borrow), b"dlpack_exchange_api"


class Compact:
    """A float32 tensor of another library: compact, and without strides."""

    __dlpack_c_exchange_api__ = capsule(API)
    dtype = torch.float32

    def __init__(self, tensor, device_type=CPU):
        self.tensor = tensor.contiguous()
        self.device = "cpu" if device_type == CPU else "elsewhere:0"
        self.shape = (ctypes.c_int64 * tensor.ndim)(*tensor.shape)
        self.view = DLTensor(
            self.tensor.data_ptr(), device_type, 0, tensor.ndim, FLOAT, 32, 1, self.shape, None, 0
        )


def arguments():
    sizes = {"batch": 2, "heads": 4, "kv_heads": 2, "capacity": 70, "head_dim": 64}
    return decode_attention.make_inputs(**sizes, query_tokens=3, dtype=torch.float32, device="cpu")[
        :3
    ]


def test_strides_may_be_left_out():
    given = arguments()
    outputs = decode_attention.outputs(*given)
    _native.decode_attention(*outputs, None, *map(Compact, given))
    with torch.no_grad():
        assert all(map(torch.equal, outputs, decode_attention(*given)))


def test_a_device_without_a_kernel_is_refused_by_name():
    given = arguments()
    outputs = [Compact(t.contiguous(), ONE_API) for t in decode_attention.outputs(*given)]
    elsewhere = [Compact(t, ONE_API) for t in given]
    with pytest.raises(
        NotImplementedError, match=r"query must be on cpu.*kernels.*got elsewhere:0"
    ):
        _native.decode_attention(*outputs, None, *elsewhere)
