"""Calls the CUDA ops of sparse selection on the simulator, on torch CPU tensors."""

import ctypes

import torch
from simulated import DTYPES, ROOT, Args, decode_args, pointer

SPARSE_SOURCES = [
    ROOT / "csrc/cuda/gather_attention.cu",
    ROOT / "csrc/cuda/gather_attention_mma.cu",
    ROOT / "csrc/cuda/score_tokens.cu",
    ROOT / "csrc/cuda/score_tokens_mma.cu",
    ROOT / "csrc/cuda/select_tokens.cu",
    ROOT / "csrc/cuda/sum_tokens.cu",
    ROOT / "tests/cuda_on_cpu/sparse_shim.cpp",
]
REDUCTIONS = ("sum", "max", "logit")
NONE = (0, 0, 0)
UNWRITTEN = 7777777  # of int32 outputs
GUARD = (
    1 << 17
)  # elements around the indices that a wrong kernel may write and a right one must not


class GatherArgs(ctypes.Structure):
    """GatherAttentionArgs of csrc/gather_attention.h."""

    _fields_ = (
        ("attention", Args),
        ("indices", ctypes.c_void_p),
        ("indices_stride", ctypes.c_int64 * 2),
        ("counts", ctypes.c_void_p),
        ("counts_stride", ctypes.c_int64 * 2),
        ("chosen", ctypes.c_int64),
        ("page_size", ctypes.c_int64),
        ("extra_key", ctypes.c_void_p),
        ("extra_value", ctypes.c_void_p),
        ("extra_bias", ctypes.c_void_p),
        ("extra", ctypes.c_int64),
        ("extra_key_stride", ctypes.c_int64 * 3),
        ("extra_value_stride", ctypes.c_int64 * 3),
        ("extra_bias_stride", ctypes.c_int64 * 3),
    )


class ScoreArgs(ctypes.Structure):
    """ScoreTokensArgs of csrc/score_tokens.h."""

    _fields_ = (
        ("attention", Args),
        ("scores", ctypes.c_void_p),
        ("reduce", ctypes.c_int32),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
    )


class SelectArgs(ctypes.Structure):
    """SelectTokensArgs of csrc/select_tokens.h."""

    _fields_ = (
        ("scores", ctypes.c_void_p),
        ("scores_stride", ctypes.c_int64 * 2),
        *((name, ctypes.c_void_p) for name in ("lengths", "indices", "counts")),
        *((name, ctypes.c_int64) for name in ("batch", "kv_heads", "capacity", "budget", "width")),
        *((name, ctypes.c_int64) for name in ("sinks", "recent")),
        ("mass", ctypes.c_double),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
    )


class SumArgs(ctypes.Structure):
    """SumTokensArgs of csrc/sum_tokens.h."""

    _fields_ = (
        ("source", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("batch", "kv_heads", "capacity", "head_dim")),
        ("source_stride", ctypes.c_int64 * 3),
        ("indices", ctypes.c_void_p),
        ("indices_stride", ctypes.c_int64 * 2),
        ("counts", ctypes.c_void_p),
        ("counts_stride", ctypes.c_int64 * 2),
        ("chosen", ctypes.c_int64),
        ("sums", ctypes.c_void_p),
    )


KINDS = {"gather": GatherArgs, "score": ScoreArgs, "select": SelectArgs, "sum": SumArgs}


class Sparse:
    """The CUDA ops of sparse selection on the CPU."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        for kind, made in KINDS.items():
            size = getattr(library, f"{kind}_args_bytes")
            size.restype = ctypes.c_int64
            assert size() == ctypes.sizeof(made)
        library.gather_workspace_bytes.restype = ctypes.c_int64
        library.score_workspace_bytes.restype = ctypes.c_int64
        library.select_workspace_bytes.restype = ctypes.c_int64
        self.set_device()
        self.set_seed(0)

    def set_seed(self, seed: int) -> None:
        self.library.set_seed(seed)

    def set_device(self, multiprocessors: int = 4, block_kib: int = 227, kib: int = 228) -> None:
        self.library.set_device(multiprocessors, block_kib << 10, kib << 10)

    def gather(  # noqa: PLR0913
        self, query, key, value, indices, counts,
        extra_key=None, extra_value=None, extra_bias=None,
        *, page_size=1, short_workspace=0, **options,
    ):  # fmt: skip
        """As adaptive.ops.gather_attention."""
        out, lse = torch.full(query.shape, torch.nan), torch.full(query.shape[:3], torch.nan)
        extras = (extra_key, extra_value, extra_bias)
        args = GatherArgs(
            decode_args(query, key, value, out, lse, **options),
            pointer(indices), indices.stride()[:2], pointer(counts), counts.stride(),
            indices.shape[2], page_size, *map(pointer, extras),
            0 if extra_bias is None else extra_bias.shape[2],
            *(NONE if t is None else t.stride()[:3] for t in extras),
        )  # fmt: skip
        wanted = self.library.gather_workspace_bytes(ctypes.byref(args))
        workspace = torch.full((max(wanted // 4, 1),), torch.nan)
        args.attention.workspace = workspace.data_ptr()
        args.attention.workspace_bytes = wanted - short_workspace
        self.one_split = wanted == 0
        self._run(self.library.gather, args)
        return out, lse

    def score(self, query, key, value=None, *, reduce="sum", short_workspace=0, **options):
        """As adaptive.ops.score_tokens, or, given values, as scored_attention."""
        out = None if value is None else torch.full(query.shape, torch.nan)
        lse = torch.full(query.shape[:3], torch.nan)
        scores = torch.full(key.shape[:3], torch.nan)
        args = ScoreArgs(
            decode_args(query, key, value, out, lse, **options),
            pointer(scores), REDUCTIONS.index(reduce),
        )  # fmt: skip
        wanted = self.library.score_workspace_bytes(ctypes.byref(args))
        workspace = torch.full((max(wanted // 4, 1),), torch.nan)
        args.workspace = workspace.data_ptr()
        args.workspace_bytes = wanted - short_workspace
        self._run(self.library.score, args)
        return (scores, lse) if value is None else (out, lse, scores)

    def select(
        self, scores, budget, lengths=None, sinks=0, recent=0, mass=1.0, *, short_workspace=0
    ):
        """As adaptive.ops.select_tokens; limited to the capacity by the binding."""
        batch, kv_heads, capacity = scores.shape
        width = min(budget, capacity)
        around = torch.full((batch * kv_heads * width + 2 * GUARD,), UNWRITTEN, dtype=torch.int32)
        indices = around[GUARD:-GUARD].view(batch, kv_heads, width)
        counts = torch.full((batch, kv_heads), UNWRITTEN, dtype=torch.int32)
        args = SelectArgs(
            pointer(scores), scores.stride()[:2], pointer(lengths), pointer(indices),
            pointer(counts), batch, kv_heads, capacity, width, width,
            min(sinks, capacity), min(recent, capacity), mass,
        )  # fmt: skip
        wanted = self.library.select_workspace_bytes(ctypes.byref(args))
        workspace = torch.full((wanted // 4 + 1,), torch.nan)
        args.workspace = workspace.data_ptr()
        args.workspace_bytes = wanted - short_workspace
        self._run(self.library.select_keys, args)
        assert (around[:GUARD] == UNWRITTEN).all()
        assert (around[-GUARD:] == UNWRITTEN).all()
        return indices, counts

    def sum(self, source, indices, counts):
        """As adaptive.ops.sum_tokens."""
        batch, kv_heads, _, head_dim = source.shape
        sums = torch.full((batch, kv_heads, head_dim), torch.nan)
        args = SumArgs(
            pointer(source), DTYPES[source.dtype], *source.shape, source.stride()[:3],
            pointer(indices), indices.stride()[:2], pointer(counts), counts.stride(),
            indices.shape[2], pointer(sums),
        )  # fmt: skip
        self._run(self.library.sum, args)
        return sums

    @staticmethod
    def _run(function, args):
        message = ctypes.create_string_buffer(1000)
        if function(ctypes.byref(args), message):
            raise RuntimeError(message.value.decode())
