"""A block in which nothing drops out leaves every module in the mode that it had."""

import pytest
import torch
from torch import nn

from adaptive.layers.evaluating import evaluating


class Stops(nn.Module):
    """Its eval stops half way, as Ctrl-C does."""

    def eval(self):
        super().eval()
        raise KeyboardInterrupt


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("kind", [nn.Sequential, Stops])
def test_modes_are_restored_one_by_one_even_if_eval_itself_is_stopped(kind):
    model = kind()
    model.add_module("frozen", nn.Dropout().eval())
    model.add_module("free", nn.Dropout())
    before = modes(model)
    assert before == [True, False, True]
    seen = []

    def block():
        with evaluating(model):
            seen.extend(modes(model))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block()
    assert seen == ([] if kind is Stops else [False] * 3)
    assert modes(model) == before
    assert torch.is_grad_enabled()
