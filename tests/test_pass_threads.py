"""Threads: layers that share a pass refuse a second one; FFNs know the padding of their thread."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from encoder_models import OLD, inputs, run
from encoder_models import make as make_encoder
from models import make, token_ids
from routed_models import deep, forward, router

import adaptive
from adaptive import FeedForwardExperts, MixtureOfDepths, TokenRouting
from adaptive.layers.one_pass import PASSES

REFUSED = "another thread is running a pass of this model"
REDUCTIONS = {
    "exit": adaptive.EncoderExit(layer=1, audit_every=None),
    "merge": adaptive.TokenMerging(r=4, audit_every=None),
    "prune": adaptive.TokenPruning(keep=0.5, layers=(0,), audit_every=None),
}


def beside(module, call, other):
    """What ``other`` gives or raises in another thread while ``module`` runs within ``call``."""
    found, mine = [], threading.get_ident()

    def hook(*_):
        if threading.get_ident() == mine:
            with ThreadPoolExecutor(1) as pool:
                found.append(pool.submit(other))

    handle = module.register_forward_hook(hook)
    made = call()
    handle.remove()
    return made, found[0]


def mod():
    model = copy.deepcopy(deep("llama"))
    given = {"input_ids": token_ids(tokens=9)}
    return model, lambda: forward(model, given), MixtureOfDepths(router=router(model))


@pytest.mark.parametrize("off", [False, True])
def test_a_second_pass_of_routed_layers_is_refused(off):
    model, call, policy = mod()
    with adaptive.patch(model, policy) as patched:
        wanted = call()

        def other():
            if not off:
                return call()
            # as an audit of the first thread does, while it runs the whole model
            patched._root.__dict__["_adaptive_record"].enabled = False
            try:
                return call()
            finally:
                patched._root.__dict__["_adaptive_record"].enabled = True

        made, late = beside(model.model.layers[0], call, other)
        assert torch.equal(made, wanted)
        with pytest.raises(RuntimeError, match=f"MixtureOfDepths: {REFUSED}"):
            late.result()
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(call).result(), wanted)
        assert torch.equal(call(), wanted)


def test_a_pass_that_ended_badly_belongs_to_nobody():
    model, call, policy = mod()
    with adaptive.patch(model, policy):
        wanted = call()

        def stop(*_):
            raise OSError("stopped")

        handle = model.model.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(OSError, match="stopped"):
            call()
        handle.remove()
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(call).result(), wanted)
        passes = model.model.__dict__[PASSES]
        thread = threading.Thread(target=passes.enter)
        thread.start()
        thread.join()
        assert torch.equal(call(), wanted)  # the thread is gone, and will not end its pass
        passes.enter()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with ThreadPoolExecutor(1) as pool:
                assert torch.equal(pool.submit(forward, twin, GIVEN).result(), forward(twin, GIVEN))
        passes.leave()
    assert PASSES not in model.model.__dict__
    assert not model.model._forward_hooks_always_called


GIVEN = {"input_ids": token_ids(tokens=9)}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_second_pass_of_an_encoder_is_refused(name):
    case = "vit" if OLD else "bert"
    model, given = make_encoder(case), inputs(case)
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.0") or n.endswith(".0"))
    with adaptive.patch(model, REDUCTIONS[name]):
        wanted = run(model, given)
        made, late = beside(layer, lambda: run(model, given), lambda: run(model, given))
        assert torch.equal(made, wanted)
        with pytest.raises(RuntimeError, match=REFUSED):
            late.result()


@pytest.mark.parametrize(
    "policy",
    [FeedForwardExperts(experts=6, audit_every=None), TokenRouting(widths=0.5, audit_every=None)],
    ids=["experts", "widths"],
)
def test_padding_is_that_of_the_own_thread(policy):
    model, ids = make("llama"), token_ids(2, 8)
    masks = [torch.ones_like(ids), torch.ones_like(ids)]
    masks[0][0, :3] = 0
    masks[1][1, :5] = 0
    calls = [
        lambda m=m: forward(model, {"input_ids": ids, "attention_mask": m})[m.bool()] for m in masks
    ]
    with adaptive.patch(model, policy) as patched:
        wanted = [call() for call in calls]
        patched.reset_stats()
        made, late = beside(model.model.layers[0].self_attn, calls[0], calls[1])
        assert torch.equal(made, wanted[0])
        assert torch.equal(late.result(), wanted[1])
        report = patched.report()
        log = report.experts or report.widths
        counted = [
            layer.rows if report.experts else sum(layer.tokens.values())
            for layer in log.layers.values()
        ]
        assert counted == [int(sum(mask.sum() for mask in masks))] * 2
