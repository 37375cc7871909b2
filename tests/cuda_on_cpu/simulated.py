"""Builds CUDA sources for the CPU and calls decode_attention in them, on torch CPU tensors."""

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SOURCES = [
    ROOT / "csrc/cuda/decode_attention_mma.cu",
    ROOT / "csrc/cuda/decode_attention.cu",
    ROOT / "csrc/cuda/plan.cu",
    ROOT / "tests/cuda_on_cpu/decode_attention_shim.cpp",
]
FLAGS = [
    "-std=c++20", "-O1", "-march=native", "-fPIC", "-fopenmp",
    "-Wall", "-Wno-unknown-pragmas", "-Werror", f"-I{ROOT / 'csrc'}",
]  # fmt: skip
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
POINTERS = [
    "query", "key", "value", "lengths", "mask", "parents", "cache_rows", "out", "lse", "workspace"
]  # fmt: skip
SIZES = ["batch", "heads", "kv_heads", "query_tokens", "capacity", "head_dim", "cache_batch"]


class Args(ctypes.Structure):
    """DecodeAttentionArgs of csrc/decode_attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("workspace_bytes", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("mask_add", ctypes.c_bool),
        ("causal", ctypes.c_bool),
        *((name, ctypes.c_int64) for name in SIZES),
        ("query_stride", ctypes.c_int64 * 3),
        ("key_stride", ctypes.c_int64 * 3),
        ("value_stride", ctypes.c_int64 * 3),
        ("out_stride", ctypes.c_int64 * 3),
        ("mask_stride", ctypes.c_int64 * 4),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


def pointer(tensor):
    """The address of a tensor's elements; None: null."""
    return None if tensor is None else tensor.data_ptr()


def decode_args(  # noqa: PLR0913
    query, key, value, out, lse,
    *, lengths=None, mask=None, parents=None, cache_rows=None,
    causal=True, scale=None, softcap=0.0,
):  # fmt: skip
    """The Args of these tensors, without a workspace; value and out may be None."""
    batch, heads, query_tokens, head_dim = query.shape
    capacity, none = key.shape[2], (0, 0, 0)
    strides = (0, 0, 0, 0)
    if mask is not None:
        mask = mask.expand(batch, heads, query_tokens, capacity)
        strides = mask.stride()
    return Args(
        pointer(query), pointer(key), pointer(value), pointer(lengths), pointer(mask),
        pointer(parents), pointer(cache_rows), pointer(out), pointer(lse), None, 0,
        DTYPES[query.dtype],
        mask is not None and mask.dtype == torch.float32, causal,
        batch, heads, key.shape[1], query_tokens, capacity, head_dim, len(key),
        query.stride()[:3], key.stride()[:3], none if value is None else value.stride()[:3],
        none if out is None else out.stride()[:3], strides,
        head_dim**-0.5 if scale is None else scale, softcap,
    )  # fmt: skip


class Builder:
    """Compiles to shared libraries, each object cached by the text the compiler sees."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.compiler = shutil.which(os.environ.get("CXX") or "g++")
        self.made: dict[tuple[Path, tuple[str, ...]], Path] = {}
        self.standard: tuple[str, ...] = ()

    def objects(self, *sources: Path, flags: tuple[str, ...] = ()) -> list[Path]:
        """Compiles each source, two at a time; what a file says is looked at once per process."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda source: self._object(source, flags), sources))

    def library(self, *objects: Path) -> ctypes.CDLL:
        """Loads the library made of `objects`; of equal inline functions the first one's stay."""
        return ctypes.CDLL(str(self._link(objects, "-shared", "-fopenmp")))

    def program(self, *sources: Path, flags: tuple[str, ...]) -> Path:
        """The path of the program made of these sources."""
        return self._link(self.objects(*sources, flags=flags), "-fopenmp", *flags)

    def _link(self, objects: Sequence[Path], *flags: str) -> Path:
        name = hashlib.sha256(" ".join([*map(str, objects), *flags]).encode()).hexdigest()[:24]
        return self._make(self.folder / name, *map(str, objects), *flags)

    def _object(self, source: Path, flags: tuple[str, ...]) -> Path:
        if (source, flags) in self.made:
            return self.made[source, flags]
        standard = () if source.is_relative_to(ROOT) else self._standard()
        command = [*FLAGS, *flags, *standard, "-x", "c++", str(source)]
        target = self._make(self.folder / f"{self._digest(command)}.o", *command, "-c")
        return self.made.setdefault((source, flags), target)

    def _standard(self) -> tuple[str, ...]:
        """Flags by which mutants, compiled once each, get the standard library in compiled form."""
        if not self.standard:
            command = [*FLAGS, "-x", "c++-header", str(HERE / "standard.h")]
            folder = self.folder / self._digest(command)
            folder.mkdir(exist_ok=True)
            self._make(folder / "standard.h.gch", *command)
            self.standard = (f"-I{folder}", f"-I{HERE}", "-Winvalid-pch", "-include", "standard.h")
        return self.standard

    def _digest(self, command: list[str]) -> str:
        """Tells apart what the compiler sees; the last word of the command is the source."""
        text = subprocess.run(
            [self.compiler, *command, "-E"], capture_output=True, check=True
        ).stdout
        # Copies of the sources lie in other folders each time; what they say is what counts.
        text = re.sub(rb'(?m)^# (\d+) ".*/([^/"]+)"', rb'# \1 "\2"', text)
        return hashlib.sha256(text + repr(command[:-1]).encode()).hexdigest()[:24]

    def _make(self, target: Path, *arguments: str) -> Path:
        """Compiles `target` unless it exists, once even where test processes run side by side."""
        with target.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                unfinished = target.with_suffix(".unfinished")
                done = subprocess.run(
                    [self.compiler, *arguments, "-o", str(unfinished)],
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                assert done.returncode == 0, done.stderr
                unfinished.replace(target)
        return target


class Simulated:
    """The CUDA decode_attention on the CPU; `splits` records what the last call was cut into."""

    entry, wants = "decode_attention", "workspace_bytes"  # functions of the library

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        library.args_bytes.restype = getattr(library, self.wants).restype = ctypes.c_int64
        assert library.args_bytes() == ctypes.sizeof(Args)
        self.set_device()
        self.set_seed(0)

    def set_seed(self, seed: int) -> None:
        self.library.set_seed(seed)

    def set_device(self, multiprocessors: int = 4, block_kib: int = 227, kib: int = 228) -> None:
        self.library.set_device(multiprocessors, block_kib << 10, kib << 10)

    def __call__(self, query, key, value, *, out=None, short_workspace=0, **options):
        """As adaptive.ops.decode_attention; `out` may be given to choose its strides."""
        out = torch.full(query.shape, torch.nan) if out is None else out
        lse = torch.full(query.shape[:3], torch.nan)
        args = decode_args(query, key, value, out, lse, **options)
        wanted = getattr(self.library, self.wants)(ctypes.byref(args))
        rows, head_dim = lse.numel(), query.shape[3]
        self.splits = wanted // (rows * (head_dim + 2) * 4) if wanted else 1
        workspace = torch.full((max(wanted // 4, 1),), torch.nan)
        args.workspace = workspace.data_ptr()
        args.workspace_bytes = wanted - short_workspace
        message = ctypes.create_string_buffer(1000)
        run = getattr(self.library, self.entry)
        if run(ctypes.byref(args), message, ctypes.c_int64(1000)):
            raise RuntimeError(message.value.decode())
        return out, lse


def plain(query, key, value, lengths=None, mask=None, causal=True, scale=None, softcap=0.0):
    """The formula of csrc/decode_attention.h, in the dtype of the query. Returns (out, lse).

    Slots beyond the length may hold anything: they take no part in the arithmetic.
    """
    batch, heads, query_tokens, head_dim = query.shape
    capacity = key.shape[2]
    if lengths is None:
        lengths = torch.full((batch,), capacity)
    position = torch.arange(capacity)
    used = position < lengths[:, None]
    key, value = (
        torch.where(used[:, None, :, None], t, 0).repeat_interleave(heads // t.shape[1], 1)
        for t in (key, value)
    )
    scores = (query @ key.transpose(-1, -2)) * (head_dim**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = used[:, None, None, :]
    if causal:
        last = lengths[:, None] - query_tokens + torch.arange(query_tokens)
        seen = seen & (position <= last[..., None])[:, None]
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(scores.double(), -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0).to(query.dtype)
    empty = torch.isneginf(lse)
    out = torch.where(empty[..., None], 0.0, weights @ value)
    return out, lse


def assert_close(out, lse, query, key, value, **options):
    """As good as float32 on the same inputs, whatever the dtype of query, key and value."""
    exact, exact_lse = plain(query.double(), key.double(), value.double(), **options)
    rough, _ = plain(query.float(), key.float(), value.float(), **options)
    assert torch.equal(torch.isneginf(lse), torch.isneginf(exact_lse))
    assert not torch.isnan(out).any()
    reference_error = (rough.double() - exact).abs().max().item()
    # Four times float32's own error, and the rounding of the weights on tensor cores.
    floor = 4 * torch.finfo(torch.float32).eps if query.dtype == torch.float32 else 2**-17
    bound = 4 * reference_error + floor * max(1.0, exact.abs().max().item())
    assert (out - exact).abs().max().item() <= bound
    finite = ~torch.isneginf(exact_lse)
    assert torch.allclose(lse[finite].double(), exact_lse[finite], rtol=2e-6, atol=2e-5)


def planted(folder, source, file, old, new):
    """Copies the sources of CUDA to `folder`, with one text of `file` replaced by another.

    Returns where `source` lies then. Of all head sizes only 64 is left, which compiles faster.
    """
    for part in ("cuda", "simt"):
        shutil.copytree(ROOT / "csrc" / part, folder / part)
    for header in (ROOT / "csrc").glob("*.h"):
        shutil.copy(header, folder)
    sizes = "case 128: return run.template operator()<128>();\n    default: return run.template"
    for path, before, after in (
        ("cuda/plan.h", f"{sizes} operator()<256>();", "default: return;"),
        (file, old, new),
    ):
        text = (folder / path).read_text()
        assert text.count(before) == 1, before
        (folder / path).write_text(text.replace(before, after))
    return folder / source
