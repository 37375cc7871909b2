"""What tests of `generate_many` share: prompts, what they get together, and a comparison."""

import functools

import torch

import adaptive

LENGTHS = (3, 17, 1, 40, 8)


@functools.cache
def prompt_of(length):
    rng = torch.Generator().manual_seed(length)
    return torch.randint(2, 128, (length,), generator=rng)


def together(model, policies, lengths, new, **options):
    """What prompts of these lengths get in one call, and the report."""
    prompts = [prompt_of(length) for length in lengths]
    with adaptive.patch(model, *policies) as patched:
        made = patched.generate_many(prompts, max_new_tokens=new, **options)
        return made, patched.report()


def same(made, wanted):
    assert len(made) == len(wanted)
    for one, other in zip(made, wanted, strict=True):
        assert torch.equal(one, other)
