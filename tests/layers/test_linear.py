"""Large linear layers of a patched model: right, few rows only, and gone without a trace."""

import copy
import gc
import io
import weakref

import pytest
import torch
from models import make, token_ids
from torch import nn

import adaptive
from adaptive import _native
from adaptive.layers import hf_linear
from adaptive.layers.hf_linear import MIN_WEIGHT_BYTES, LinearForward

LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 1536,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 2048,
}
LINEARS = 2 * 5 + 1  # of two layers: q, o, gate, up and down; k and v are too small; and the head
TOKENS = 6


@pytest.fixture(autouse=True)
def _same_on_every_processor(monkeypatch):
    monkeypatch.setattr(hf_linear, "SLOW_DTYPES", frozenset((torch.bfloat16, torch.float16)))
    if _native.best_cpu_level() == "baseline":
        pytest.skip("counts rows as AVX2 does")


def large(case="llama", dtype=torch.float32, **fields):
    return make(case, dtype=dtype, **{**LARGE, **fields})


def ran():
    return _native.calls().get("skinny_linear:cpu", 0)


def patched_linears(model):
    return [
        name
        for name, m in model.named_modules()
        if isinstance(vars(m).get("forward"), LinearForward)
    ]


def greedy(model, ids):
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=TOKENS, do_sample=False, use_cache=True)


@torch.no_grad()
def step(model, ids, rows=1):
    """Logits of the last `rows` tokens, decoded together from the cache of the others."""
    cache = model(ids[:, :-rows], use_cache=True).past_key_values
    return model(ids[:, -rows:], past_key_values=cache, use_cache=True).logits


def test_large_layers_run_natively_and_are_reported():
    model, ids = large(), token_ids(tokens=30)[:1]
    stock = greedy(model, ids)
    with adaptive.patch(model) as patched:
        assert len(patched_linears(model)) == LINEARS
        assert all(
            model.get_submodule(name).weight.nbytes >= MIN_WEIGHT_BYTES
            for name in patched_linears(model)
        )
        assert torch.equal(greedy(model, ids), stock)
        # The prompt has too many rows, but for the head, which sees its last.
        expected = LINEARS * (TOKENS - 1) + 1
        assert patched.report().native_calls["skinny_linear:cpu"] == expected
        assert "skinny_linear:cpu" in str(patched.report())
        assert patched.verify(ids, new_tokens=3).token_agreement == 1
    assert patched_linears(model) == []
    assert not any("forward" in vars(module) for module in model.modules())
    before = ran()
    assert torch.equal(greedy(model, ids), stock)
    assert ran() == before


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_further_from_the_truth_than_stock(dtype, rows):
    model, ids = large(dtype=dtype), token_ids(tokens=40)[:1]
    truth = step(copy.deepcopy(model).double(), ids, rows)
    stock = step(model, ids, rows).double()
    with adaptive.patch(model):
        before = ran()
        ours = step(model, ids, rows).double()
        assert ran() == before + LINEARS
    assert (ours - truth).norm() <= 2 * (stock - truth).norm()


def test_many_rows_and_training_are_stock_bit_for_bit():
    model, ids = large(), token_ids(tokens=17)[:1]
    linear = model.model.layers[0].mlp.up_proj
    few, many = torch.randn(2, 8, 1024), torch.randn(17, 1024)
    stock = [linear(few), linear(many)]
    with torch.no_grad():
        logits = model(ids).logits
    with adaptive.patch(model):
        before = ran()
        assert torch.equal(linear(few), stock[0])  # a gradient is wanted
        assert linear(few).requires_grad
        with torch.no_grad():
            assert torch.equal(linear(many), stock[1])
            assert torch.equal(model(ids).logits, logits)
            assert ran() == before
            assert linear(few).shape == (2, 8, 1536)
            assert ran() == before + 1
            assert linear(many[:0]).shape == (0, 1536)
            torch.testing.assert_close(linear(few.mT.contiguous().mT), stock[0].detach())
            with pytest.raises(RuntimeError, match="mat1 and mat2"):
                linear(torch.randn(1, 1000))
            with pytest.raises(RuntimeError, match="dtype"):
                linear(few.double())
            with torch.autocast("cpu", torch.bfloat16):
                assert linear(few).dtype == torch.bfloat16
        assert ran() == before + 2


def test_switched_off_it_is_stock_bit_for_bit():
    model, ids = large(dtype=torch.bfloat16), token_ids(tokens=20)[:1]
    stock = step(model, ids)
    with adaptive.patch(model) as patched:
        before = ran()
        with patched.disabled():
            assert torch.equal(step(model, ids), stock)
        assert ran() == before
        assert not torch.equal(step(model, ids), stock)
        assert ran() > before
    with adaptive.patch(model, exact_linear=False) as patched:
        assert patched_linears(model) == []


def test_a_small_or_strange_layer_is_left_alone():
    model = large()
    mlp, attention = model.model.layers[0].mlp, model.model.layers[0].self_attn

    class Own(nn.Linear):
        pass

    mlp.up_proj.__class__ = Own
    mlp.gate_proj.forward = mlp.gate_proj.forward
    nn.utils.parametrizations.weight_norm(mlp.down_proj)
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.randn(1024, 1536).double())
    with adaptive.patch(model):
        found = patched_linears(model)
        assert not any(name.startswith("model.layers.0.mlp") for name in found)
        assert "model.layers.1.mlp.down_proj" not in found
        assert "forward" not in vars(attention.k_proj)
        assert len(found) == LINEARS - 4
    del mlp.gate_proj.forward


def test_a_deepcopy_has_weights_of_its_own():
    model, ids = large(), token_ids(tokens=20)[:1]
    with adaptive.patch(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for weights in twin.parameters():
                weights.mul_(0.5)
        assert not torch.equal(step(twin, ids), step(model, ids))
        with adaptive.patched(twin).disabled():
            before = ran()
            step(twin, ids)
            assert ran() == before
            step(model, ids)
            assert ran() == before + LINEARS
        adaptive.patched(twin).unpatch()
        assert patched_linears(twin) == []
        assert len(patched_linears(model)) == LINEARS


def test_a_copied_layer_copies_nothing_else_and_must_go_before_unpatching():
    model = large()
    patched = adaptive.patch(model)
    head = copy.deepcopy(model.lm_head)
    memory = io.BytesIO()
    torch.save(head, memory)
    assert memory.tell() < 2 * head.weight.nbytes
    model.model.layers[1].twin = head
    with pytest.raises(adaptive.PatchConflict, match=r"'model\.layers\.1\.twin' came later"):
        patched.unpatch()
    del model.model.layers[1].twin
    patched.unpatch()


def test_no_cycle_keeps_the_weights_alive():
    model = large(num_hidden_layers=1)
    layer, weight = (weakref.ref(t) for t in (model.lm_head, model.lm_head.weight))
    adaptive.patch(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert layer() is None
        assert weight() is None
    finally:
        gc.enable()


def test_a_saved_model_is_patched_when_loaded():
    model, ids = large(), token_ids(tokens=20)[:1]
    with adaptive.patch(model):
        expected = step(model, ids)
        memory = io.BytesIO()
        torch.save(model, memory)
        memory.seek(0)
        loaded = torch.load(memory, weights_only=False)
        assert len(patched_linears(loaded)) == LINEARS
        assert torch.equal(step(loaded, ids), expected)
        adaptive.patched(loaded).unpatch()
        assert patched_linears(loaded) == []


def test_someone_elses_forward_is_named():
    model = large()
    patched = adaptive.patch(model)
    head = model.lm_head
    ours = head.forward
    head.forward = lambda x: ours(x)
    with pytest.raises(adaptive.PatchConflict, match="lm_head"):
        patched.unpatch()
    head.forward = ours
    patched.unpatch()


@pytest.mark.parametrize("order", ["before", "after"])
def test_peft(order):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model, ids = large(), token_ids(tokens=20)[:1]
    handle = adaptive.patch(model) if order == "after" else None
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, config)
    handle = handle or adaptive.patch(wrapped)
    names = patched_linears(wrapped)
    assert any(name.endswith("base_layer") for name in names) == (order == "after")
    before = ran()
    ours = greedy(wrapped, ids)
    assert ran() > before
    with handle.disabled():
        assert torch.equal(greedy(wrapped, ids), ours)
    handle.unpatch()
    assert patched_linears(wrapped) == []
    assert torch.equal(greedy(wrapped, ids), ours)


@pytest.mark.parametrize("order", ["before", "after"])
def test_torchao_quantised_layers_are_left_to_it(order):
    quantization = pytest.importorskip("torchao.quantization")
    model, ids = large(), token_ids(tokens=20)[:1]
    handle = adaptive.patch(model) if order == "after" else None
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    handle = handle or adaptive.patch(model)
    before = ran()
    ours = greedy(model, ids)
    assert ran() == before
    with handle.disabled():
        assert torch.equal(greedy(model, ids), ours)
    handle.unpatch()


def test_a_compiled_pass_is_stock():
    model = large(num_hidden_layers=1)
    linear = model.model.layers[0].mlp.up_proj
    x = torch.randn(1, 1024)
    with torch.no_grad(), adaptive.patch(model):
        compiled = torch.compile(linear, backend="eager", fullgraph=True)
        before = ran()
        assert torch.equal(compiled(x), nn.functional.linear(x, linear.weight))
        assert ran() == before


def test_recording_sees_the_layer():
    from torch.utils.flop_counter import FlopCounterMode

    model = large()
    x = torch.randn(1, 1024)
    with torch.no_grad(), adaptive.patch(model), FlopCounterMode(display=False) as counter:
        model.model.layers[0].mlp.up_proj(x)
    assert counter.get_total_flops() == 2 * 1024 * 1536
