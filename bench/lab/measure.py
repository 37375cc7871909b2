"""Measurements on the lab model: bits per byte, passkey, induction heads and exit curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lab import model as lab
from bench.lab import tasks


def exit_logits(model: Any, hidden: Tensor) -> Tensor:
    """Return the logits of any layer's residual stream through the shared norm and head."""
    norm = model.model.norm
    n = F.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)
    return F.linear(n, model.lm_head.weight)


@torch.no_grad()
def passkey_exits(model: Any, tokenizer: Any, length: int, depth: float, seed: int) -> np.ndarray:
    """Return for every exit layer whether greedy decoding gives the five digits.

    All digits are scored in one forward pass: greedy decoding gives the right answer exactly
    when each digit is the most likely one after the right digits before it.
    """
    prompt, answer = tasks.passkey_document(tokenizer, length, depth, seed)
    digits = tasks.encoder(tokenizer)(answer)
    ids = torch.tensor([prompt + digits[:-1]])
    positions = torch.arange(ids.shape[1])[None]
    states = lab.forward_hidden(model, ids, positions)
    want = torch.tensor(digits)
    tail = len(digits)
    right = [(exit_logits(model, s[0, -tail:]).argmax(-1) == want).all().item() for s in states]
    return np.asarray(right, dtype=bool)


@torch.no_grad()
def text_losses(
    model: Any, tokens: np.ndarray, bos: int, context: int, windows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean nats per token and next-token accuracy of every exit on evenly spread windows."""
    starts = np.linspace(0, len(tokens) - context - 1, windows).astype(int)
    nats, hits = [], []
    for start in starts:
        piece = torch.from_numpy(tokens[start : start + context].astype(np.int64))
        ids = torch.cat([torch.tensor([bos]), piece[:-1]])[None]
        states = lab.forward_hidden(model, ids, torch.arange(ids.shape[1])[None])
        logits = [exit_logits(model, s[0]) for s in states]
        nats.append([F.cross_entropy(x, piece).item() for x in logits])
        hits.append([(x.argmax(-1) == piece).float().mean().item() for x in logits])
    return np.mean(nats, axis=0), np.mean(hits, axis=0)


def quick(
    model: Any, tokenizer: Any, heldout: np.ndarray, lengths: Sequence[int]
) -> dict[str, Any]:
    """Return a cheap evaluation for the training log."""
    bos = tasks.bos_id(tokenizer)
    nats, _ = text_losses(model, heldout, bos, 512, 8)
    passkey = {}
    for length in lengths:
        count = 12 if length <= 2048 else 4
        right = [
            passkey_exits(model, tokenizer, length, (i + 0.5) / count, 1000 + i)[-1]
            for i in range(count)
        ]
        passkey[str(length)] = round(float(np.mean(right)), 3)
    heads = induction_scores(model, length=64, batch=2, seed=0)
    return {
        "heldout_nats": round(float(nats[-1]), 4),
        "passkey": passkey,
        "copy": copy_accuracy(model, length=64, batch=2, seed=0)[-1],
        "induction": sorted((round(float(x), 2) for x in heads.flatten()), reverse=True)[:4],
    }


def repeated_tokens(vocab: int, length: int, batch: int, seed: int) -> Tensor:
    """Return begin-of-text and the same ``length`` random tokens twice, ``batch`` times."""
    rng = np.random.default_rng(seed)
    half = rng.integers(3, vocab, (batch, length))
    ids = np.concatenate([np.zeros((batch, 1), dtype=np.int64), half, half], axis=1)
    return torch.from_numpy(ids)


@torch.no_grad()
def induction_scores(model: Any, length: int, batch: int, seed: int) -> np.ndarray:
    """Return the prefix-matching score of every head, ``[layers, heads]``.

    On random tokens laid down twice: the attention that each token of the second half pays to
    the token after its own first occurrence, averaged.
    """
    ids = repeated_tokens(model.config.vocab_size, length, batch, seed)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        attentions = model(ids, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    queries = torch.arange(length + 1, 2 * length)
    return np.stack(
        [a[:, :, queries, queries - length + 1].mean((0, 2)).numpy() for a in attentions]
    )


@torch.no_grad()
def copy_accuracy(model: Any, length: int, batch: int, seed: int) -> list[float]:
    """Return for every exit how often the second half of repeated random tokens is predicted."""
    ids = repeated_tokens(model.config.vocab_size, length, batch, seed)
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    want = ids[:, length + 2 :]
    accuracy = []
    for state in lab.forward_hidden(model, ids, positions):
        guess = exit_logits(model, state)[:, length + 1 : -1].argmax(-1)
        accuracy.append(round((guess == want).float().mean().item(), 4))
    return accuracy


@torch.no_grad()
def transformers_difference(model: Any) -> float:
    """Return the largest difference between this module's logits and those of transformers."""
    ids = repeated_tokens(model.config.vocab_size, 64, 2, 1)
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    ours = exit_logits(model, lab.forward_hidden(model, ids, positions)[-1])
    return float((ours - model(ids).logits).abs().max())
