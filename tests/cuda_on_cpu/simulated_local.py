"""Calls the CUDA local_attention and pool_blocks on the simulator, on torch CPU tensors."""

import ctypes

import torch
from simulated import DTYPES, ROOT, pointer

LOCAL_SOURCES = [
    ROOT / "csrc/cuda/local_attention.cu",
    ROOT / "csrc/cuda/local_attention_mma.cu",
    ROOT / "csrc/cuda/pool_blocks.cu",
    ROOT / "csrc/cuda/plan.cu",
    ROOT / "tests/cuda_on_cpu/local_shim.cpp",
]
POINTERS = ["query", "key", "value", "windows", "offsets", "blocks", "counts", "out", "lse"]
SIZES = [
    "batch", "heads", "kv_heads", "query_tokens", "tokens", "head_dim",
    "window", "sinks", "cuts", "block_size", "lists", "chosen",
]  # fmt: skip
STRIDES = ["query", "key", "value", "out"]


class LocalArgs(ctypes.Structure):
    """LocalAttentionArgs of csrc/local_attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("dtype", ctypes.c_int32),
        ("causal", ctypes.c_bool),
        *((name, ctypes.c_int64) for name in SIZES),
        *((f"{name}_stride", ctypes.c_int64 * 3) for name in STRIDES),
        ("offsets_stride", ctypes.c_int64),
        ("blocks_stride", ctypes.c_int64 * 3),
        ("counts_stride", ctypes.c_int64 * 3),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class PoolArgs(ctypes.Structure):
    """PoolBlocksArgs of csrc/pool_blocks.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("source", "offsets", "means")),
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "tokens", "head_dim")),
        *((name, ctypes.c_int64) for name in ("block_size", "cuts")),
        ("source_stride", ctypes.c_int64 * 3),
        ("offsets_stride", ctypes.c_int64),
    )


class Local:
    """The CUDA kernels of local_attention, block_sparse_attention and pool_blocks on the CPU."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        library.local_args_bytes.restype = library.pool_args_bytes.restype = ctypes.c_int64
        assert library.local_args_bytes() == ctypes.sizeof(LocalArgs)
        assert library.pool_args_bytes() == ctypes.sizeof(PoolArgs)
        self.set_device()
        self.set_seed(0)

    def set_seed(self, seed: int) -> None:
        self.library.set_seed(seed)

    def set_device(self, multiprocessors: int = 4, block_kib: int = 227, kib: int = 228) -> None:
        self.library.set_device(multiprocessors, block_kib << 10, kib << 10)

    def local(self, query, key, value, window=None, windows=None, sinks=0, offsets=None, *rest):
        """As adaptive.ops.local_attention, with its arguments in order."""
        limits = {"window": key.shape[2] if window is None else window, "sinks": sinks}
        return self(query, key, value, offsets, *rest, windows=windows, **limits)

    def block_sparse(self, query, key, value, indices, counts, block_size=64, *rest):
        """As adaptive.ops.block_sparse_attention, with its arguments in order."""
        lists = {"indices": indices, "counts": counts, "block_size": block_size}
        return self(query, key, value, *rest, **lists)

    def __call__(  # noqa: PLR0913
        self, query, key, value, offsets=None, scale=None, softcap=0.0, causal=True,
        *, window=None, windows=None, sinks=0, indices=None, counts=None, block_size=0, out=None,
    ):  # fmt: skip
        """Everything the kernels can do at once; `out` may be given to choose its strides."""
        batch, heads, query_tokens, head_dim = query.shape
        kv_heads, tokens = key.shape[1:3]
        if out is None:
            out = torch.full(query.shape, torch.nan, dtype=query.dtype)
        lse = torch.full(query.shape[:3], torch.nan)
        none = (0, 0, 0)
        args = LocalArgs(
            *map(pointer, (query, key, value, windows, offsets, indices, counts, out, lse)),
            DTYPES[query.dtype], causal,
            batch, heads, kv_heads, query_tokens, tokens, head_dim,
            max(tokens, 1) if window is None else window, min(sinks, tokens),
            0 if offsets is None else offsets.shape[1], block_size,
            *((0, 0) if indices is None else (indices.shape[1], indices.shape[3])),
            *(t.stride()[:3] for t in (query, key, value, out)),
            0 if offsets is None else offsets.stride(0),
            none if indices is None else indices.stride()[:3],
            none if counts is None else counts.stride(),
            head_dim**-0.5 if scale is None else scale, softcap,
        )  # fmt: skip
        self._run(self.library.local_attention, args)
        return out, lse

    def pool(self, source, block_size=64, offsets=None):
        """As adaptive.ops.pool_blocks."""
        batch, heads, tokens, head_dim = source.shape
        means = torch.full((batch, heads, -(-tokens // block_size), head_dim), torch.nan)
        args = PoolArgs(
            *map(pointer, (source, offsets, means)), DTYPES[source.dtype],
            *source.shape, block_size, 0 if offsets is None else offsets.shape[1],
            source.stride()[:3], 0 if offsets is None else offsets.stride(0),
        )  # fmt: skip
        self._run(self.library.pool_blocks, args)
        return means

    @staticmethod
    def _run(function, args):
        message = ctypes.create_string_buffer(1000)
        if function(ctypes.byref(args), message):
            raise RuntimeError(message.value.decode())
