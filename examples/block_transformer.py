"""A Block Transformer: one KV entry per four tokens, prompts of any lengths, files, sampling.

Run it: python examples/block_transformer.py
"""

import tempfile

import torch

from adaptive.zoo import (
    BlockTransformer,
    BlockTransformerConfig,
    VanillaTransformer,
    VanillaTransformerConfig,
)

torch.manual_seed(0)
sizes = {"vocab_size": 64, "width": 128, "heads": 4}
model = BlockTransformer(BlockTransformerConfig(**sizes, block_layers=2, token_layers=2))
vanilla = VanillaTransformer(VanillaTransformerConfig(**sizes, layers=4))

# 1. Teach it to count: every next token is one more.
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(60):
    ids = (torch.randint(64, (16, 1)) + torch.arange(20)) % 64
    loss = model.loss(ids, padding=int(torch.randint(4, ())))  # text begins anywhere in a block
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss.item():.3f} nats per token, of {torch.tensor(64.0).log().item():.3f} at first")

# 2. Continue prompts of different lengths in one batch.
prompts = [[10, 11, 12, 13, 14], list(range(20, 40))]
for prompt, new in zip(prompts, model.generate(prompts, max_new_tokens=8), strict=True):
    print(f"...{prompt[-3:]} -> {new.tolist()}")

# 3. What the cache costs, beside a vanilla model of as many layers.
print(
    f"KV bytes per token: {model.kv_bytes_per_token:.0f}, vanilla {vanilla.kv_bytes_per_token:.0f}"
)
print(model.report())

# 4. Files: JSON and safetensors.
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = BlockTransformer.from_pretrained(folder)
drawn = again.generate(prompts, 8, do_sample=True, generator=torch.Generator().manual_seed(1))
print("drawn:", drawn[0].tolist())
