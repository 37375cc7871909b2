"""Small models of the zoo for its tests, and what they are compared with."""

import torch

from adaptive.zoo import (
    BlockTransformer,
    BlockTransformerConfig,
    RecursiveTransformer,
    RecursiveTransformerConfig,
    VanillaTransformer,
    VanillaTransformerConfig,
)

VOCAB = 61
SIZES = {"vocab_size": VOCAB, "width": 128, "heads": 4, "kv_heads": 2, "hidden_width": 96}


def build(kind, **changes):
    """A small model whose logits are far enough apart that rounding swaps no tokens."""
    torch.manual_seed(3)
    sizes = {**SIZES, **changes}
    if kind == "block":
        config = BlockTransformerConfig(**{"block_layers": 2, "token_layers": 2, **sizes})
        model = BlockTransformer(config)
    elif kind == "recursive":
        config = RecursiveTransformerConfig(**{"block_layers": 2, "recursions": 3, **sizes})
        model = RecursiveTransformer(config)
    else:
        model = VanillaTransformer(VanillaTransformerConfig(**{"layers": 3, **sizes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model.eval()


def draw(*shape, seed=0):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def prompts(lengths):
    return [draw(length, seed=length) for length in lengths]


def forced(model, ids, prompt_tokens):
    """Logits of each next token, in the blocks that a prompt of so many tokens makes."""
    padding = -prompt_tokens % model.block_length
    options = {"padding": padding} if model.block_length > 1 else {}
    with torch.no_grad():
        return model(ids, **options)


def decoded(model, rows, forced_tokens):
    """Logits of each step of generation when these tokens ``[rows, steps]`` are chosen."""
    length, found = model.block_length, []
    with torch.no_grad():
        run = model._start(rows, forced_tokens.shape[1], torch.float32)
        for at in range(forced_tokens.shape[1]):
            inside = at % length
            found.append(run.logits(forced_tokens[:, at - 1] if inside else None))
            if inside == length - 1:
                run.advance(forced_tokens[:, at + 1 - length : at + 1])
    return torch.stack(found, 1)
