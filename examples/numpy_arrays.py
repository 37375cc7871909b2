"""Attend to a KV cache that lies in a file, with NumPy arrays only and nothing copied.

Run it: python examples/numpy_arrays.py
"""

import tempfile
from pathlib import Path

import numpy as np

from adaptive.ops import decode_attention

HEADS, KV_HEADS, CAPACITY, HEAD_DIM = 8, 2, 4096, 64
rng = np.random.default_rng(0)

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "cache.npy"
    np.save(file, rng.standard_normal((2, 2, KV_HEADS, CAPACITY, HEAD_DIM), dtype=np.float32))
    key, value = np.load(file, mmap_mode="r")  # read-only, and read from disk as it is needed

    # Two rows: the first has 1000 tokens so far, the second 4000. What lies beyond is not read.
    query = rng.standard_normal((2, HEADS, 1, HEAD_DIM), dtype=np.float32)
    lengths = np.array([1000, 4000], dtype=np.int32)
    out, lse = decode_attention(query, key, value, lengths)

    print(type(out).__name__, out.dtype, out.shape, "log-sum-exp", lse.shape)

    # The same by hand, for one head of the first row.
    scores = key[0, 0, :1000] @ query[0, 0, 0] / np.sqrt(HEAD_DIM)
    weights = np.exp(scores - scores.max())
    by_hand = weights / weights.sum() @ value[0, 0, :1000]
    error = float(np.abs(by_hand - out[0, 0, 0]).max())
    print(f"largest difference from NumPy by hand: {error:.1e}")
    assert error < 1e-5

# An array that torch cannot view is refused by name, never copied behind your back.
try:
    decode_attention(query, key[..., ::-1], value)
except ValueError as refusal:
    print(refusal)
