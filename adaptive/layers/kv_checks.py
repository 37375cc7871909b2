"""Checks of what is handed to a `KVStore`, and the errors that name what is wrong."""

import torch
from torch import Tensor

OP = "adaptive::kv_store"
RANK = 4


def check_append(name: str, new: Tensor, key: Tensor, held: Tensor | None) -> None:
    """Raise unless ``new`` can be appended together with ``key`` behind ``held``."""
    if new.dim() != RANK or key.dim() != RANK:
        must = "[batch, kv_heads, tokens, head_dim]"
        raise ValueError(f"{OP}: {name} must have shape {must}, got {list(new.shape)}")
    batch, heads, _, head_dim = (new if held is None else held).shape
    if held is None:
        batch, heads = key.shape[:2]
    must_shape = (batch, heads, key.shape[2], head_dim)
    if new.shape != must_shape:
        raise ValueError(f"{OP}: {name} must have shape {list(must_shape)}, got {list(new.shape)}")
    if held is not None and new.dtype != held.dtype:
        raise TypeError(f"{OP}: {name} must be {held.dtype}, got {new.dtype}")
    device = (key if held is None else held).device
    if new.device != device:
        raise ValueError(f"{OP}: {name} must be on {device}, got {new.device}")
    if new.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{OP}: {name} must not require grad in grad mode, got one that does; written in "
            "place it would lose its graph"
        )


def check_index(index: Tensor, rows: int) -> None:
    """Raise unless ``index`` names rows of a batch."""
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{OP}: index must be int32 or int64, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"{OP}: index must have one dimension, got shape {list(index.shape)}")
    if index.device.type == "cpu":
        wrong = ((index < 0) | (index >= rows)).nonzero().flatten()
        if len(wrong):
            at = int(wrong[0])
            raise IndexError(f"{OP}: index[{at}] must be in [0, {rows}), got {int(index[at])}")


def check_kept(index: Tensor, batch: int, tokens: int) -> None:
    """Raise unless ``index`` picks some of ``tokens`` tokens for each of ``batch`` rows."""
    if index.dim() != len(("batch", "kept")) or index.shape[0] != batch:
        raise ValueError(f"{OP}: index must have shape [{batch}, kept], got {list(index.shape)}")
    if index.device.type == "cpu" and index.numel():
        least, most = int(index.min()), int(index.max())
        if least < 0 or most >= tokens:
            wrong = least if least < 0 else most
            raise IndexError(f"{OP}: index must be in [0, {tokens}), got {wrong}")
