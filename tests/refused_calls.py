"""What tests of refusals share: calls that policies with a router refuse alike, and a module."""

import pytest
import torch
from models import token_ids
from torch import nn

import adaptive


class Logits(nn.Module):
    """What a model says of tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


def check_compiling_is_refused(model, policy, whole):
    ids, name = token_ids(), type(policy).__name__
    with adaptive.patch(model, policy), torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        with pytest.raises(Exception, match=f"{name} cannot run under torch"):
            torch.compile(model, backend="eager", fullgraph=whole)(ids, use_cache=False)
        assert torch.equal(model(ids, use_cache=False).logits, wanted)


def check_nan_is_named(model, norm):
    """Of what the norm before the scores of layer 1 gives."""
    nan = norm.register_forward_hook(lambda *call: call[-1] * float("nan"))
    with pytest.raises(ValueError, match="scores of layer 1 must be numbers, got NaN"):
        model(token_ids())
    nan.remove()
