"""Models whose later layers change little, so that drafts are right often, and not always."""

from pathlib import Path

import torch
from models import CONFIGS, PAD, greedy, make

import adaptive

LAYERS = 4
TOKENS = 20
LAB = Path(__file__).parents[1] / "bench" / "lab" / "model"
MODELS = {}
SIBLINGS = [
    {"exit_layer": 2, "draft": 4, "tree": True},
    {"skip": ((2, 3), (1, 3)), "draft": 4, "tree": True},
]
"""Forms whose trees are of drafts and their siblings."""
FORMS = [
    {"exit_layer": 2, "draft": 4},
    {"skip": ((2, 3), (1, 3)), "draft": 4},
    {"tree": True},
    SIBLINGS[0],
]
_OUTPUTS = ("o_proj", "down_proj", "c_proj", "dense", "w2")


def fields(case, layers=LAYERS):
    """The configuration field that sets the number of layers."""
    return {"n_layer" if CONFIGS[case][0] == "gpt2" else "num_hidden_layers": layers}


def drafting(case, quiet_from=2, factor=0.2, **options):
    """A model of four layers; those from ``quiet_from`` on add ``factor`` of what they would."""
    implementation = "eager" if case == "gemma2" else "sdpa"
    model = make(case, implementation=implementation, **fields(case), **options)
    base = model.model if hasattr(model, "model") else model.base_model
    layers = base.h if case == "gpt2" else base.layers
    with torch.no_grad():
        for layer in list(layers)[quiet_from:]:
            for name, parameter in layer.named_parameters():
                if any(part in name for part in _OUTPUTS) or "post_" in name:
                    parameter.mul_(factor)
    return model


def model_of(case):
    """A model of the case, made once."""
    if case not in MODELS:
        MODELS[case] = drafting(case)
    return MODELS[case]


def plain(model, inputs, tokens=TOKENS, **options):
    """What the patched model makes without speculation."""
    with adaptive.patch(model):
        return greedy(model, inputs, tokens, **options)


def speculated(model, inputs, tokens=TOKENS, *, policy, **options):
    """What it makes with it, and the log."""
    with adaptive.patch(model, adaptive.SelfSpeculative(**policy)) as patched:
        made = greedy(model, inputs, tokens, **options)
        return made, patched.report().speculation


def check_sampling(policy, tokens):
    """`check_drawn_pairs` for ``generate`` of one batch; the log."""
    logs = []

    def generate(model, prompt, rows, **options):
        with adaptive.patch(model, adaptive.SelfSpeculative(**policy)) as patched:
            made = model.generate(prompt[None].repeat(rows, 1), **options)
            logs.append(patched.report().speculation)
        return made

    check_drawn_pairs(generate, tokens)
    return logs[0]


def check_drawn_pairs(generate, tokens, rows=2000):
    """Chi-square of the last two of ``tokens`` tokens over many rows of one prompt.

    Against the patched model without speculation. ``generate`` is called with the model, a prompt,
    ``rows``, and options.
    """
    model = drafting("llama", vocab_size=16)
    prompt = torch.randint(3, 16, (1, 24), generator=torch.Generator().manual_seed(2))
    options = {
        "max_new_tokens": tokens,
        "do_sample": True,
        "temperature": 3.0,
        "top_k": 0,
        "pad_token_id": PAD,
        "eos_token_id": None,
    }
    torch.manual_seed(11)
    with adaptive.patch(model):
        plainly = model.generate(prompt.repeat(rows, 1), **options)
    torch.manual_seed(11)
    counts = []
    for made in (plainly, generate(model, prompt[0], rows, **options)):
        pairs = made[:, -2] * 16 + made[:, -1]
        counts.append(torch.bincount(pairs, minlength=256).double())
    ours, theirs = counts
    often = ours + theirs >= 10
    statistic = ((ours - theirs) ** 2 / (ours + theirs))[often].sum()
    degrees = int(often.sum()) - 1
    assert degrees > 20
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations
