"""Train a small Llama so that its early layers predict tokens, too, and see each exit's loss.

Run it: python examples/train_early_exit.py
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adaptive.train import early_exit

torch.manual_seed(0)

# 1. A text file of your own; its bytes are the tokens.
animals = ("cat", "dog", "owl", "fox", "hen")
places = ("the roof", "a tree", "the barn", "a boat")
lines = [f"The {a} sat on {p} and saw the {b}.\n" for a in animals for p in places for b in animals]
order = torch.randperm(len(lines)).tolist()
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "animals.txt"
    file.write_text("".join(lines[i] for i in order))
    text = torch.tensor(list(file.read_bytes()))
learn, held_out = text[:-640], text[-640:].view(10, 64)


def batches(rows: int = 16, tokens: int = 64) -> Iterator[torch.Tensor]:
    """Pieces of the text from anywhere, for ever."""
    while True:
        starts = torch.randint(len(learn) - tokens, (rows, 1))
        yield learn[starts + torch.arange(tokens)]


# 2. Any causal LM of transformers; here a tiny one with random weights.
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
)

# 3. Train it: layer dropout, losses of the exits in turns.
result = early_exit(
    model,
    batches(),
    steps=150,
    learning_rate=3e-3,
    exit_scale=0.5,
    rotation=3,
    held_out=held_out,
)
print(result)

# 4. The last exit is the model itself; it is stock again, and saves and loads as ever.
with torch.no_grad():
    loss = model.eval()(held_out, labels=held_out).loss.item()
print(f"the model's own loss on the held-out text: {loss:.3f}")
