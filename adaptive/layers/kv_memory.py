"""Memory for keys and values: how much is reserved, with which pages, and what a failure says."""

import torch
from torch import Tensor

GRANULE = 256
"""Capacities are multiples of this many tokens."""

HUGE_STRIPE_BYTES = 8 << 20
"""Storage of one head from which huge pages are asked for."""


def is_lazy(device: torch.device) -> bool:
    """Whether fresh memory of this device becomes resident only where it is written.

    True on CPU, unless PyTorch fills fresh memory to make its contents deterministic.
    """
    filled = (
        torch.are_deterministic_algorithms_enabled()
        and torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    )
    return device.type == "cpu" and not filled


def capacities(tokens: int, device: torch.device, limit: int | None = None) -> tuple[int, int]:
    """How many tokens to reserve for ``tokens``: what is wanted, and what would just do.

    Room that is not resident costs address space alone, so there is twice what is needed of it;
    where it costs memory, a quarter more. Growth by a constant factor makes an append O(new
    tokens) on average.

    Args:
        tokens: To be held now; not negative.
        device: Where.
        limit: The most tokens there will ever be; at least ``tokens``.

    Returns:
        Two capacities, multiples of `GRANULE` unless the limit cuts them.
    """
    headroom = 2.0 if is_lazy(device) else 1.25
    wanted = (max(int(tokens * headroom), 1), max(tokens, 1))
    roomy, tight = (-(-count // GRANULE) * GRANULE for count in wanted)
    return (roomy, tight) if limit is None else (min(roomy, limit), min(tight, limit))


def allocate(like: Tensor, batch: int, tokens: int, limit: int | None = None) -> Tensor:
    """Storage for the ``tokens`` about to be written, and room for more.

    If the room cannot be had, as much as the tokens need is tried. Never an inference tensor, which
    could not be written outside `torch.inference_mode`.

    Huge pages are asked for on the stripes of the tokens alone: a long prompt is then written 1.4
    times as fast and scattered rows are read 1.25 times as fast (measured on AVX-512 servers).
    Asking for them on the room too gained nothing and kept up to 2 MiB a head resident.

    Args:
        like: ``[any, kv_heads, any, head_dim]``: heads, head dim, dtype and device.
        batch: Rows.
        tokens: To be written at once.
        limit: As for `capacities`.

    Returns:
        ``[batch, kv_heads, capacity, head_dim]``, contents undefined.

    Raises:
        MemoryError: There is no memory on the CPU; says what was asked.
        torch.OutOfMemoryError: The same on another device.
    """
    heads, head_dim = like.shape[1], like.shape[3]
    failure: Exception | None = None
    for capacity in capacities(tokens, like.device, limit):
        shape = (batch, heads, capacity, head_dim)
        try:
            storage = _empty(shape, like)
        except (RuntimeError, MemoryError) as error:
            failure = error
            continue
        if storage.device.type == "cpu" and not torch.compiler.is_compiling():
            _advise_huge_pages(storage, tokens)
        return storage
    size_bytes = batch * heads * capacity * head_dim * like.element_size()
    message = (
        f"adaptive::kv_store: no memory for {list(shape)} of {like.dtype} on {like.device} "
        f"({size_bytes} bytes); nothing that was held is lost"
    )
    if isinstance(failure, torch.OutOfMemoryError):
        raise torch.OutOfMemoryError(message) from failure
    raise MemoryError(message) from failure


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=like.dtype, device=like.device)
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _advise_huge_pages(storage: Tensor, tokens: int) -> None:
    """Ask for huge pages behind the first ``tokens`` of every head."""
    batch, heads, capacity, head_dim = storage.shape
    if capacity * head_dim * storage.element_size() < HUGE_STRIPE_BYTES:
        return
    from adaptive import _native  # here, so that a store without large stripes needs no extension

    for stripe in storage.view(batch * heads, capacity, head_dim):
        _native.advise_huge_pages(stripe.narrow(0, 0, tokens))


def move_kept(tail: Tensor, index: Tensor) -> None:
    """Move the tokens at ``index``, ``[batch, kept]``, of ``tail`` to its front, in place.

    Args:
        tail: ``[batch, heads, tokens, width]``.
        index: int64, on the same device.
    """
    whole = index[:, None, :, None].expand(-1, tail.shape[1], -1, tail.shape[3])
    tail.narrow(2, 0, index.shape[1]).copy_(tail.gather(2, whole))
