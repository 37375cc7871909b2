"""Synthetic retrieval tasks for the lab model: seeded, pure, planted in real text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

_NAMES = (
    "amber birch cedar delta ember fjord garnet harbor indigo jasper kernel lagoon maple nickel "
    "olive pepper quartz raven silver timber umber velvet willow xenon yellow zephyr"
)
NAMES = _NAMES.split()
NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is "
NAMED_NEEDLE = "\n\nThe pass key of {name} is {key}. Remember it.\n\n"
NAMED_QUESTION = "\n\nWhat is the pass key of {name}? The pass key of {name} is "
VARIABLE_QUESTION = "\n\nThe value of {name} is "
KEY_DIGITS = 5
#: Weights as training targets: real text around a task, and the answers to its questions.
FILLER_WEIGHT, ANSWER_WEIGHT = 0.5, 4.0

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Sample:
    """One training sequence: tokens and the weight of each token as a target."""

    ids: np.ndarray
    weights: np.ndarray


def encoder(tokenizer: Any) -> Encode:
    """Return ``text -> ids`` without special tokens, for either kind of tokenizer."""

    def encode(text: str) -> list[int]:
        out = tokenizer.encode(text, add_special_tokens=False)
        return list(getattr(out, "ids", out))

    return encode


def bos_id(tokenizer: Any) -> int:
    """Return the id of the begin-of-text token, for either kind of tokenizer."""
    if hasattr(tokenizer, "token_to_id"):
        return int(tokenizer.token_to_id("<|bos|>"))
    return int(tokenizer.bos_token_id)


def random_key(rng: np.random.Generator, digits: int = KEY_DIGITS) -> str:
    """Return a random number as text, its first digit not zero."""
    return str(rng.integers(10 ** (digits - 1), 10**digits))


def confusable_key(rng: np.random.Generator, digits: int = KEY_DIGITS) -> str:
    """Return a number of only two or three different digits.

    Such keys repeat digits and pairs of digits, so that looking one or two tokens back does not
    tell where one is in the key: the hard cases of copying.
    """
    alphabet = rng.choice(9, size=int(rng.integers(2, 4)), replace=False) + 1
    return "".join(str(digit) for digit in rng.choice(alphabet, digits))


def plant(
    filler: np.ndarray,
    needles: Sequence[Sequence[int]],
    depths: Sequence[float],
    questions: Sequence[tuple[Sequence[int], Sequence[int]]],
    length: int,
    bos: int,
    filler_weight: float = FILLER_WEIGHT,
    answer_weight: float = ANSWER_WEIGHT,
) -> Sample:
    """Build one document: needles in filler at relative depths, then questions with answers.

    The result has exactly ``length`` tokens; the filler takes what the rest leaves.
    """
    tail_ids: list[int] = []
    tail_weights: list[float] = []
    for question, answer in questions:
        tail_ids += [*question, *answer]
        tail_weights += [filler_weight] * len(question) + [answer_weight] * len(answer)
    room = length - 1 - len(tail_ids) - sum(map(len, needles))
    if room < 0:
        raise ValueError(f"{length} tokens are too few for the needles and questions")
    if len(filler) < room:
        raise ValueError(f"the filler has {len(filler)} tokens, {room} are needed")
    ids: list[int] = [bos]
    weights = [0.0]
    used = 0
    for index in np.argsort(np.asarray(depths), kind="stable"):
        cut = round(depths[index] * room)
        ids += filler[used:cut].tolist()
        weights += [filler_weight] * (cut - used)
        ids += needles[index]
        weights += [0.0] * len(needles[index])
        used = cut
    ids += filler[used:room].tolist() + tail_ids
    weights += [filler_weight] * (room - used) + tail_weights
    return Sample(np.asarray(ids, dtype=np.int64), np.asarray(weights, dtype=np.float32))


def _filler(rng: np.random.Generator, corpus: np.ndarray, length: int) -> np.ndarray:
    start = int(rng.integers(0, max(1, len(corpus) - length)))
    return corpus[start : start + length]


def keys_sample(
    rng: np.random.Generator,
    encode: Encode,
    corpus: np.ndarray,
    length: int,
    bos: int,
    keys: int = 1,
    confusable: float = 0.0,
) -> Sample:
    """Return a passkey document with ``keys`` named keys (one key: without a name).

    ``confusable`` is the share of keys made of few different digits.
    """
    names = rng.permutation(NAMES)[:keys]
    numbers = [
        confusable_key(rng) if rng.random() < confusable else random_key(rng) for _ in range(keys)
    ]
    if keys == 1:
        needles = [encode(NEEDLE.format(key=numbers[0]))]
        asked = [(encode(QUESTION), encode(numbers[0]))]
    else:
        pairs = list(zip(names, numbers, strict=True))
        needles = [encode(NAMED_NEEDLE.format(name=n, key=k)) for n, k in pairs]
        asked = [
            (encode(NAMED_QUESTION.format(name=pairs[i][0])), encode(pairs[i][1]))
            for i in rng.permutation(keys)
        ]
    depths = rng.random(keys).tolist()
    filler = _filler(rng, corpus, length)
    return plant(filler, needles, depths, asked, length, bos)


def variables_sample(
    rng: np.random.Generator,
    encode: Encode,
    corpus: np.ndarray,
    length: int,
    bos: int,
    hops: int = 2,
) -> Sample:
    """Return a variable-tracking document: a chain of assignments, every link asked."""
    names = rng.permutation(NAMES)[: hops + 1]
    value = random_key(rng)
    needles = [encode(f"\n{names[0]} = {value}\n")]
    needles += [encode(f"\n{b} = {a}\n") for a, b in pairwise(names)]
    depths = np.sort(rng.random(hops + 1)).tolist()
    order = rng.permutation(hops + 1)[:2]
    asked = [(encode(VARIABLE_QUESTION.format(name=names[i])), encode(value)) for i in order]
    filler = _filler(rng, corpus, length)
    return plant(filler, needles, depths, asked, length, bos)


def copy_sample(
    rng: np.random.Generator, length: int, bos: int, alphabet: np.ndarray, longest: int = 64
) -> Sample:
    """Return random tokens of ``alphabet`` in which segments come back, repeats weighted.

    Random segments are laid down one after another; about half of the time a segment that was
    already seen is laid down again, and only the tokens of such a repeat (after its first) are
    targets: nothing but looking back can predict them. With a small alphabet it takes several
    tokens of context to know where in a segment one is.
    """
    ids: list[int] = [bos]
    weights = [0.0]
    seen: list[list[int]] = []
    while len(ids) < length:
        if seen and rng.random() < 0.6:
            segment = seen[int(rng.integers(len(seen)))]
            weights += [0.0] + [1.0] * (len(segment) - 1)
        else:
            segment = rng.choice(alphabet, int(rng.integers(6, longest))).tolist()
            seen.append(segment)
            weights += [0.0] * len(segment)
        ids += segment
    return Sample(
        np.asarray(ids[:length], dtype=np.int64), np.asarray(weights[:length], dtype=np.float32)
    )


def text_sample(rng: np.random.Generator, corpus: np.ndarray, length: int, bos: int) -> Sample:
    """Return a stretch of the corpus, every token a target."""
    ids = np.concatenate([[bos], _filler(rng, corpus, length - 1)]).astype(np.int64)
    weights = np.ones(length, dtype=np.float32)
    weights[0] = 0.0
    return Sample(ids, weights)


def skip_positions(
    rng: np.random.Generator, length: int, span: int, chunks: int, least: float = 0.0
) -> np.ndarray:
    """Return position ids with random jumps (PoSE) that end at or below ``span - 1``.

    The jumps add up to at least the share ``least`` of what ``span`` has room for; without it,
    long distances are possible but rare.
    """
    positions = np.arange(length, dtype=np.int64)
    if span <= length or chunks < 2:
        return positions
    room = span - length
    total = int(rng.integers(int(least * room), room + 1))
    cuts = np.sort(rng.integers(1, length, chunks - 1))
    jumps = np.sort(rng.integers(0, total + 1, chunks - 1))
    if least > 0.0:
        jumps[-1] = total
    for cut, before, after in zip(cuts, np.r_[0, jumps[:-1]], jumps, strict=True):
        positions[cut:] += after - before
    return positions


@lru_cache(maxsize=4)
def _encoded(tokenizer: Any, text: str | None) -> np.ndarray:
    from bench.lab.data import long_document

    source = long_document() if text is None else text
    return np.asarray(encoder(tokenizer)(source), dtype=np.int64)


def passkey_document(
    tokenizer: Any, length_tokens: int, depth: float, seed: int, text: str | None = None
) -> tuple[list[int], str]:
    """Return the token ids of a passkey prompt and the five digits that must follow it.

    The prompt has exactly ``length_tokens`` tokens (begin-of-text included): a stretch of
    ``text`` (by default the held-out language reference that every Python carries), the needle
    at relative ``depth`` in ``[0, 1]`` and the question at its end. The same arguments always
    give the same prompt.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must lie in [0, 1], not {depth}")
    rng = np.random.default_rng([seed, length_tokens, round(depth * 10_000)])
    corpus = _encoded(tokenizer, text)
    if len(corpus) < length_tokens:
        corpus = np.tile(corpus, -(-length_tokens // max(1, len(corpus))))
    encode = encoder(tokenizer)
    key = random_key(rng)
    filler = _filler(rng, corpus, length_tokens)
    question = [(encode(QUESTION), [])]
    needle = [encode(NEEDLE.format(key=key))]
    bos = bos_id(tokenizer)
    sample = plant(filler, needle, [depth], question, length_tokens, bos)
    return sample.ids.tolist(), key
