"""Gemma 3n's sparse FFNs in a patched model: the same mathematics, followed weights, no trace."""

import copy
import gc
import io
import weakref

import pytest
import torch
from gemma3n_models import SPARSE_LAYERS, ffns, gemma3n
from models import greedy, token_ids
from torch import nn

import adaptive
from adaptive import _native
from adaptive.layers import hf_linear
from adaptive.layers.hf_linear import most_rows
from adaptive.layers.sparse_ffn import SparseFfnForward, TransposedCopy

TOKENS = 5


@pytest.fixture(autouse=True)
def _same_on_every_processor(monkeypatch):
    monkeypatch.setattr(hf_linear, "SLOW_DTYPES", frozenset((torch.bfloat16, torch.float16)))


def ran():
    return _native.calls().get("sparse_row_ffn:cpu", 0)


def patched_ffns(model):
    return [
        name
        for name, m in model.named_modules()
        if isinstance(vars(m).get("forward"), SparseFfnForward)
    ]


def draw(rows, dtype=torch.float32, width=128):
    return torch.randn(1, rows, width, generator=torch.Generator().manual_seed(3)).to(dtype)


def test_decoding_computes_active_neurons_alone_and_says_so():
    model, ids = gemma3n(), token_ids(tokens=24)[:1]
    stock = greedy(model, ids, TOKENS)
    active = []
    for ffn in ffns(model):
        ffn.act_fn.register_forward_hook(lambda *call: active.append(call[-1]))
    with adaptive.patch(model) as patched:
        assert len(patched_ffns(model)) == SPARSE_LAYERS
        active.clear()
        assert torch.equal(greedy(model, ids, TOKENS), stock)
        report = patched.report()
        calls = SPARSE_LAYERS * (TOKENS - 1)  # the prompt has too many rows
        log = report.sparse_ffn
        assert report.native_calls["sparse_row_ffn:cpu"] == log.calls == calls
        single = [a for a in active if a.numel() == a.shape[-1]]
        sparse = [a for a in single if (a == 0).float().mean() > 0.5]
        assert len(sparse) == calls
        assert log.active == sum(int(a.count_nonzero()) for a in sparse)
        assert log.neurons == calls * 256
        assert log.copied_bytes == SPARSE_LAYERS * 256 * 128 * 4
        assert "sparse FFN, 2 layers: 8 calls" in str(report)
        assert report.to_dict()["sparse_ffn"]["calls"] == calls
        before = patched.report().sparse_ffn
        assert patched.verify(ids, new_tokens=3).token_agreement == 1
        assert patched.report().sparse_ffn == before
        patched.reset_stats()
        assert patched.report().sparse_ffn.calls == 0
        copies = [weakref.ref(vars(ffn)["forward"].down.of(ffn.down_proj.weight))
                  for ffn in ffns(model)]  # fmt: skip
    gc.collect()
    assert all(copy() is None for copy in copies)
    assert patched_ffns(model) == []
    assert not any("forward" in vars(module) for module in model.modules())
    before = ran()
    assert torch.equal(greedy(model, ids, TOKENS), stock)
    assert ran() == before


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_further_from_the_truth_than_stock(dtype, rows):
    ffn = ffns(model := gemma3n(dtype=dtype))[0]
    x = draw(rows, dtype)
    # The neurons that stock chooses in this dtype, and all products in float64.
    chosen = ffn.act_fn(ffn._gaussian_topk(ffn.gate_proj(x))).double()
    up, down = (getattr(ffn, name).weight.double() for name in ("up_proj", "down_proj"))
    truth = (chosen * (x.double() @ up.T)) @ down.T
    stock = ffn(x)
    with adaptive.patch(model):
        before = ran()
        ours = ffn(x)
        if rows <= most_rows(dtype, widens=True):
            assert ran() == before + 1
    assert ours.shape == stock.shape
    assert ours.dtype == dtype
    error, stock_error = ((made.double() - truth).norm() for made in (ours, stock))
    assert error <= 2 * stock_error


def test_many_rows_training_and_the_switch_are_stock_bit_for_bit():
    model, ids = gemma3n(), token_ids(tokens=20)[:1]
    ffn = ffns(model)[0]
    few, many = draw(2), draw(17)
    stock = ffn(few), ffn(many)
    with adaptive.patch(model) as patched:
        before = ran()
        assert torch.equal(ffn(few), stock[0])  # a gradient is wanted
        assert ffn(few).requires_grad
        with torch.no_grad():
            assert torch.equal(ffn(many), stock[1])
            with patched.disabled():
                assert torch.equal(ffn(few), stock[0])
                expected = greedy(model, ids, TOKENS)
            with torch.autocast("cpu", torch.bfloat16):
                assert ffn(few).dtype == torch.bfloat16
            assert ran() == before
            torch.testing.assert_close(ffn(few), stock[0].detach())
            assert ran() == before + 1
            assert torch.equal(greedy(model, ids, TOKENS), expected)
    with adaptive.patch(model, exact_linear=False):
        assert patched_ffns(model) == []


@torch.no_grad()
def test_the_copy_follows_its_weight():
    ffn = ffns(model := gemma3n())[0]
    x = draw(1)

    def agrees():
        before = ran()
        torch.testing.assert_close(ffn(x), type(ffn).forward(ffn, x))
        return ran() == before + 1

    with adaptive.patch(model):
        assert agrees()
        ffn.down_proj.weight.mul_(-2)
        assert agrees()
        ffn.down_proj.weight.data = torch.randn(128, 256)
        assert agrees()
        ffn.down_proj.weight.data.add_(1)  # past what PyTorch counts
        assert agrees()
        ffn.down_proj.weight = nn.Parameter(torch.randn(128, 256))
        assert agrees()
        held = vars(ffn)["forward"].down
        first = held.of(ffn.down_proj.weight)
        assert held.of(ffn.down_proj.weight) is first  # and is made once


@torch.no_grad()
def test_what_is_wrapped_watched_or_strange_runs_stock():
    model = gemma3n()
    first, second = ffns(model)
    x = draw(1)
    with adaptive.patch(model):
        seen = []
        handle = second.up_proj.register_forward_hook(lambda *_: seen.append(1))
        before = ran()
        second(x)
        assert ran() == before
        assert seen == [1]
        handle.remove()
        second(x)
        assert ran() == before + 1

        class Own(nn.Linear):
            pass

        second.down_proj.__class__ = Own
        second(x)
        assert ran() == before + 1
        second.down_proj.__class__ = nn.Linear
    first.act_fn = nn.Sigmoid()  # 0.5 where the gate is 0: nothing can be left out
    second.activation_sparsity = 0.1
    with adaptive.patch(model):
        assert patched_ffns(model) == []


def test_copies_and_files_carry_no_transposed_weight():
    model, ids = gemma3n(), token_ids(tokens=20)[:1]
    with adaptive.patch(model):
        stock = greedy(model, ids, TOKENS)
        held = vars(ffns(model)[0])["forward"].down
        assert held.held_bytes == 256 * 128 * 4
        twin = copy.deepcopy(model)
        own = vars(ffns(twin)[0])["forward"].down
        assert own.held_bytes == 0
        assert torch.equal(greedy(twin, ids, TOKENS), stock)
        assert own.held_bytes == held.held_bytes
        assert adaptive.patched(twin).report().sparse_ffn.calls > 0
        adaptive.patched(twin).unpatch()
        assert patched_ffns(twin) == []
        assert len(patched_ffns(model)) == SPARSE_LAYERS
        memory = io.BytesIO()
        torch.save(model, memory)
        memory.seek(0)
        loaded = torch.load(memory, weights_only=False)
        assert torch.equal(greedy(loaded, ids, TOKENS), stock)


def test_a_copied_ffn_must_go_before_unpatching():
    model = gemma3n()
    patched = adaptive.patch(model)
    model.model.twin = copy.deepcopy(ffns(model)[0])
    with pytest.raises(adaptive.PatchConflict, match=r"'model\.twin' came later"):
        patched.unpatch()
    del model.model.twin
    patched.unpatch()


def test_an_inference_tensor_counts_nothing_and_is_copied():
    with torch.inference_mode():
        weight = torch.randn(8, 5)
        copied = TransposedCopy()
        assert torch.equal(copied.of(weight), weight.T)
        weight.zero_()
        assert not copied.of(weight).any()


@torch.no_grad()
def test_a_compiled_pass_is_stock():
    ffn = ffns(model := gemma3n())[0]
    x = draw(1)
    stock = ffn(x)
    with adaptive.patch(model):
        compiled = torch.compile(ffn, backend="eager")
        before = ran()
        assert torch.equal(compiled(x), stock)
        assert ran() == before
