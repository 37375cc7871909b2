"""Exits learn by their own losses what plain training does not teach them."""

import pytest
import torch
from models import make

from adaptive.train import early_exit


@pytest.fixture(scope="module")
def learn():
    """Train 60 steps to repeat three tokens; deep layers write louder, as in large models.

    With layers of the same size, plain training teaches the exits, too.
    """
    known = {}

    def run(exit_scale, curriculum):
        if (exit_scale, curriculum) not in known:
            rng = torch.Generator().manual_seed(0)
            batches = [torch.randint(2, 18, (8, 3), generator=rng).repeat(1, 8) for _ in range(60)]
            model = make("llama", num_hidden_layers=4, hidden_size=64, head_dim=16)
            with torch.no_grad():
                for index, layer in enumerate(model.model.layers):
                    layer.self_attn.o_proj.weight.mul_(5**index)
                    layer.mlp.down_proj.weight.mul_(5**index)
            torch.manual_seed(0)
            known[exit_scale, curriculum] = early_exit(
                model, batches, steps=60, exit_scale=exit_scale, curriculum=curriculum,
                rotation=2, learning_rate=1e-3,
            )  # fmt: skip
        return known[exit_scale, curriculum]

    return run


@pytest.mark.parametrize("curriculum", ["rotational", "gradual", None])
def test_exits_learn_what_plain_training_does_not_teach_them(learn, curriculum):
    """The exit in the middle falls twice as far, and the whole model is as good."""
    plain, ours = learn(0.0, None), learn(1.0, curriculum)
    fall = [run.exit_losses_before[1] - run.exit_losses_after[1] for run in (plain, ours)]
    assert fall[1] > 2 * fall[0]
    assert fall[1] > 1.5
    assert ours.exit_losses_after[-1] < 1.1 * plain.exit_losses_after[-1] < 3
