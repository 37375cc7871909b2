"""Recognises the weights of a model, from a small sample of each tensor."""

import hashlib
import re

import torch
from torch import Tensor, nn

from adaptive.policy import ModelShape

SAMPLES = 16
"""Elements of each tensor that are looked at, evenly spread."""

_DIGITS = 16
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def fingerprint(root: nn.Module, shape: ModelShape) -> tuple[tuple[str, str], ...]:
    """Return a hash of the shape and one for each layer, and for the rest, of the weights.

    Rotary frequencies and other floating buffers count as weights. Samples are rounded to bfloat16
    first, so a model has one fingerprint in all the dtypes it is loaded in. Tensors that are not
    plain, such as those of quantised linears, are known by name and size alone.

    Args:
        root: The model of transformers itself.
        shape: Of it.

    Returns:
        (part of the model, hexadecimal digits) pairs, in the order of the parts.
    """
    hashes = {"shape": hashlib.sha256(str(sorted(shape.to_dict().items())).encode())}
    with torch.no_grad():
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            found = _LAYER.search(name)
            part = f"layer {found[1]}" if found else "rest"
            own = name[found.end() :] if found else name.rpartition(".")[2]
            digest = hashes.setdefault(part, hashlib.sha256())
            digest.update(f"{own}{tuple(tensor.shape)}".encode())
            if type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point():
                digest.update(sample(tensor))
    return tuple((part, digest.hexdigest()[:_DIGITS]) for part, digest in hashes.items())


def sample(tensor: Tensor) -> bytes:
    """`SAMPLES` elements of the tensor, evenly spread, in bfloat16."""
    count = tensor.numel()
    places = torch.arange(min(SAMPLES, count), device=tensor.device) * count
    flat = tensor.detach().reshape(-1)[places // max(min(SAMPLES, count), 1)]
    return flat.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()


def source_of(weight: Tensor) -> tuple[object, ...]:
    """What a copy was made of: it is another weight, or was written to, where this differs.

    Memory, layout and dtype; how often PyTorch's operators wrote to it, which they count; and a
    sample of its values, for those who write past PyTorch.
    """
    version = None if weight.is_inference() else weight._version  # inference tensors count nothing
    layout = weight.data_ptr(), tuple(weight.shape), weight.stride(), weight.dtype, weight.device
    return *layout, version, sample(weight)
