"""Calls the CUDA kernels that route tokens, on the CPU; nothing around an output may be written."""

import ctypes

import torch
from guarded import Guarded, call, prepare
from simulated import DTYPES, ROOT, pointer

NAMES = ("combine_tokens", "gather_tokens", "route_tokens", "router_scores")
SHIM = ROOT / "tests/cuda_on_cpu/routing_shim.cpp"


def sources(changed=None, mutant=None):
    """The sources of the four kernels; `mutant` in place of the one of the name `changed`."""
    return [mutant if n == changed else ROOT / f"csrc/cuda/{n}.cu" for n in NAMES] + [SHIM]


def struct(name, *fields):
    """A structure of fields that are pointers unless their type is given."""
    full = [f if isinstance(f, tuple) else (f, ctypes.c_void_p) for f in fields]
    return type(name, (ctypes.Structure,), {"_fields_": full})


I64, PAIR, FLOAT, DTYPE = ctypes.c_int64, ctypes.c_int64 * 2, ctypes.c_float, ctypes.c_int32


def sizes(*names):
    return [(name, I64) for name in names]


RouteArgs = struct(
    "RouteArgs", "scores", "valid", *sizes("batch", "tokens", "scores_stride", "valid_stride"),
    ("capacity", I64), ("share", ctypes.c_double), ("threshold", FLOAT), "list", "counts", "slots",
)  # fmt: skip
GatherArgs = struct(
    "GatherArgs", "hidden", ("dtype", DTYPE), *sizes("batch", "tokens", "width", "chosen"),
    ("hidden_stride", PAIR), "list", ("list_stride", I64), "out",
)  # fmt: skip
CombineArgs = struct(
    "CombineArgs", "hidden", "out", "update", "list", "weights", ("dtype", DTYPE),
    *sizes("batch", "tokens", "width", "chosen"), ("hidden_stride", PAIR), ("out_stride", PAIR),
    ("update_stride", PAIR), *sizes("list_stride", "weights_stride"),
)  # fmt: skip
ScoreArgs = struct(
    "ScoreArgs", "hidden", "weight", "norm_weight", ("dtype", DTYPE),
    *sizes("batch", "tokens", "width", "routes"), ("hidden_stride", PAIR), ("weight_stride", I64),
    ("eps", FLOAT), ("sigmoid", ctypes.c_bool), "scores",
)  # fmt: skip
ARGS = dict(zip(NAMES, (CombineArgs, GatherArgs, RouteArgs, ScoreArgs), strict=True))


class Routing:
    """The four ops as CUDA would run them, with the arguments that the ops have."""

    def __init__(self, library):
        self.library = library
        for name, args in ARGS.items():
            prepare(library, f"{name}_args_bytes", args)

    def _run(self, name, args, *outputs):
        call(self.library, name, args, *outputs)

    def route_tokens(self, scores, threshold=None, capacity=None, valid=None):
        batch, tokens = scores.shape
        made = [Guarded(s, torch.int32, 77) for s in ((batch, tokens), (batch,), (batch, tokens))]
        share = capacity if isinstance(capacity, float) else 0.0
        args = RouteArgs(
            pointer(scores), pointer(valid), batch, tokens, scores.stride(0),
            0 if valid is None else valid.stride(0), 0 if share else capacity or 0, share,
            threshold or 0.0, *(pointer(g.inside) for g in made),
        )  # fmt: skip
        self._run("route_tokens", args, *made)
        return tuple(g.inside for g in made)

    def gather_tokens(self, hidden, listed):
        batch, tokens, width = hidden.shape
        chosen = listed.shape[1]
        out = Guarded((batch, chosen, width), hidden.dtype, 77)
        args = GatherArgs(
            pointer(hidden), DTYPES[hidden.dtype], batch, tokens, width, chosen,
            hidden.stride()[:2], pointer(listed), listed.stride(0), pointer(out.inside),
        )  # fmt: skip
        self._run("gather_tokens", args, out)
        return out.inside

    def combine_tokens(self, hidden, update, listed, weights=None, *, out=None):
        guarded = [] if out is not None else [Guarded(hidden.shape, hidden.dtype, 77)]
        out = guarded[0].inside if out is None else out
        args = CombineArgs(
            *map(pointer, (hidden, out, update, listed, weights)), DTYPES[hidden.dtype],
            *hidden.shape, listed.shape[1], hidden.stride()[:2], out.stride()[:2],
            update.stride()[:2], listed.stride(0), 0 if weights is None else weights.stride(0),
        )  # fmt: skip
        self._run("combine_tokens", args, *guarded)
        return out

    def router_scores(self, hidden, weight, norm_weight=None, eps=1e-6, function="sigmoid"):
        out = Guarded(hidden.shape[:2], torch.float32, 77)
        args = ScoreArgs(
            *map(pointer, (hidden, weight, norm_weight)), DTYPES[hidden.dtype], *hidden.shape,
            len(weight), hidden.stride()[:2], weight.stride(0), eps, function != "identity",
            pointer(out.inside),
        )  # fmt: skip
        self._run("router_scores", args, out)
        return out.inside
