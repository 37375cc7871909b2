"""Patch plain PyTorch models: a stock decoder, a module of your own, and a single call.

Run it: python examples/plain_pytorch.py
"""

import time

import torch
import torch.nn.functional as F
from torch import nn

import adaptive

torch.manual_seed(0)
torch.set_grad_enabled(False)


class CachedAttention(nn.Module):
    """What many projects write: one new token attends to a cache that its caller keeps."""

    def __init__(self, width: int = 512, heads: int = 8) -> None:
        """Project with one linear layer; the cache is projected already."""
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend from ``[batch, tokens, width]`` to ``[batch, heads, cached, head_dim]``."""
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def milliseconds(model: nn.Module, *inputs: torch.Tensor) -> float:
    """Best of five calls."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        model(*inputs)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


# 1. A stock decoder whose tokens look back at a long memory.
layer = nn.TransformerDecoderLayer(512, 8, 1024, batch_first=True)
decoder = nn.TransformerDecoder(layer, num_layers=2).eval()
target, memory = torch.randn(1, 2, 512), torch.randn(1, 4096, 512)
expected = decoder(target, memory)

with adaptive.patch(decoder) as patched:
    error = (decoder(target, memory) - expected).abs().max().item()
    ours = milliseconds(decoder, target, memory)
    print(patched.report())
stock = milliseconds(decoder, target, memory)  # the block is over: stock again
print(f"\ndecoder: {stock:.1f} ms stock, {ours:.1f} ms patched, largest difference {error:.1e}\n")
assert error < 1e-4

# 2. A module of your own: say once that its forward calls scaled_dot_product_attention.
adaptive.register_attention(CachedAttention, heads="heads")
mine = CachedAttention().eval()
x, cache = torch.randn(1, 1, 512), torch.randn(1, 8, 8192, 64)
expected = mine(x, cache, cache)

with adaptive.patch(mine) as patched:
    torch.testing.assert_close(mine(x, cache, cache), expected)
    print(f"own module: {patched.report().layers[0].native_calls} call by the native kernel")

# 3. Or call it yourself, in place of F.scaled_dot_product_attention.
query = torch.randn(1, 32, 1, 64)
found = adaptive.attention(query, cache, cache, enable_gqa=True)
torch.testing.assert_close(
    found, F.scaled_dot_product_attention(query, cache, cache, enable_gqa=True)
)
print("one call: the same as F.scaled_dot_product_attention")
