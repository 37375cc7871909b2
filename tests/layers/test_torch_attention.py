"""Plain PyTorch models patched: nn.MultiheadAttention and the transformer layers around it."""

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from torch import nn

import adaptive
from adaptive import _native

MEMORY = 100


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def native_calls():
    return _native.calls().get("decode_attention:cpu", 0)


def answered(handle):
    """Calls of each layer that stock did not answer."""
    return [layer.native_calls + layer.torch_calls for layer in handle.report().layers]


def attention(width=128, heads=2, seed=0, **options):
    torch.manual_seed(seed)
    module = nn.MultiheadAttention(width, heads, **options).eval()
    for name, parameter in module.named_parameters():
        if "bias" in name:  # zero by default, which would hide a mistake
            nn.init.normal_(parameter)
    return module


def inputs(tokens=1, memory=MEMORY, width=128, batch=2, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(batch, tokens, width).to(dtype), torch.randn(batch, memory, width).to(dtype)


def decoder(layers=2, **options):
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(128, 2, 256, batch_first=True, **options)
    return nn.TransformerDecoder(layer, layers).eval()


QUERY, KEYS = inputs()


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"bias": False}], ids=str)
def test_decoder_identity_undo_and_honesty(options):
    model, (x, memory) = decoder(**options), inputs(tokens=4)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    padding = torch.zeros(2, MEMORY, dtype=torch.bool)
    padding[1, 60:] = True
    call = {"tgt_mask": mask, "tgt_is_causal": True, "memory_key_padding_mask": padding}
    expected, keys = model(x, memory, **call), list(model.state_dict())
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    handle = adaptive.patch(model)
    torch.testing.assert_close(model(x, memory, **call), expected)
    assert answered(handle) == [1, 1]
    assert handle.report().forward_calls == 1
    assert "left to PyTorch: 2 self_attn of nn.TransformerDecoderLayer" in str(
        handle.report().notes
    )
    assert list(model.state_dict()) == keys
    with handle.disabled():
        assert torch.equal(model(x, memory, **call), expected)
    assert answered(handle) == [1, 1]
    handle.unpatch()
    after = {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert torch.equal(model(x, memory, **call), expected)
    assert after.keys() == before.keys()
    for name, attributes in before.items():
        assert after[name].keys() == attributes.keys()
        assert all(after[name][key] is value for key, value in attributes.items())


def test_the_whole_transformer_and_what_is_left_alone():
    torch.manual_seed(0)
    model = nn.Transformer(128, 2, 1, 1, 256, batch_first=True).eval()
    source, target = torch.randn(2, 70, 128), torch.randn(2, 4, 128)
    expected = model(source, target)
    with adaptive.patch(model) as handle:
        torch.testing.assert_close(model(source, target), expected)
        assert [layer.name for layer in handle.report().layers] == [
            "decoder.layers.0.multihead_attn"
        ]
        assert answered(handle) == [1]


def test_an_encoder_alone_is_refused_with_the_reason():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 64, batch_first=True), 2)
    found = adaptive.check(encoder)
    assert not found.ok
    assert "2 self_attn of nn.TransformerEncoderLayer (it sees its own tokens only" in str(found)
    assert "register_attention" in str(found)
    with pytest.raises(adaptive.UnsupportedModel, match="fused in evaluation"):
        adaptive.patch(encoder)


def test_a_layer_with_its_own_self_attention_is_not_left_alone():
    class Layer(nn.TransformerDecoderLayer):
        """Keeps a history, as incremental decoders do."""

        def _sa_block(self, x, *args, **kwargs):
            return self.self_attn(x, self.history, self.history, need_weights=False)[0]

    layer = Layer(128, 2, 256, batch_first=True).eval()
    layer.history = KEYS
    with adaptive.patch(layer) as handle:
        layer(QUERY, KEYS)
        assert answered(handle) == [1, 1]


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_modules_that_add_keys_are_left_alone(option):
    module = attention(batch_first=True, **{option: True})
    assert "bias_k or add_zero_attn" in str(adaptive.check(module))
    model = nn.ModuleList([module, attention(batch_first=True)])
    expected = module(QUERY, KEYS, KEYS)[0]
    with adaptive.patch(model) as handle:
        assert [layer.name for layer in handle.report().layers] == ["1"]
        assert torch.equal(module(QUERY, KEYS, KEYS)[0], expected)


def test_a_forward_on_the_instance_is_a_named_problem():
    model = decoder()
    model.layers[1].multihead_attn.forward = model.layers[1].multihead_attn.forward
    with pytest.raises(adaptive.UnsupportedModel, match=r"layers\.1\.multihead_attn has a forward"):
        adaptive.patch(model)


def test_someone_else_wrapped_a_forward():
    model = decoder()
    handle = adaptive.patch(model)
    ours = model.layers[0].multihead_attn.forward
    model.layers[0].multihead_attn.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(adaptive.PatchConflict, match=r"layers\.0\.multihead_attn"):
        handle.unpatch()
    model.layers[0].multihead_attn.forward = ours
    handle.unpatch()
    assert "forward" not in model.layers[0].multihead_attn.__dict__


def test_another_model_is_untouched():
    model, other = decoder(), decoder()
    adaptive.patch(model)
    assert not any("forward" in module.__dict__ for module in other.modules())
    assert not any(module._forward_hooks for module in other.modules())


def test_a_deepcopy_is_patched_with_weights_of_its_own():
    model, (x, memory) = decoder(), inputs(tokens=2)
    adaptive.patch(model)
    expected = model(x, memory)
    twin = copy.deepcopy(model)
    twin.layers[0].multihead_attn.in_proj_weight.zero_()
    assert torch.equal(model(x, memory), expected)
    assert not torch.equal(twin(x, memory), expected)
    handle = adaptive.patched(twin)
    assert answered(handle) == [2, 2]
    handle.unpatch()
    assert answered(adaptive.patched(model)) == [2, 2]


def test_an_unpatched_model_saves_and_a_dropped_one_is_collected():
    model, (x, memory) = decoder(), inputs(tokens=2)
    handle = adaptive.patch(model)
    expected = handle.unpatch()(x, memory)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x, memory), expected)
    adaptive.patch(model)
    gone = weakref.ref(model)
    del model, handle
    gc.collect()
    assert gone() is None


def test_a_failure_while_patching_leaves_nothing(monkeypatch):
    from adaptive.layers.changes import ChangeLog

    model = decoder()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    make, left = ChangeLog.make, []

    def failing(log, root, change):
        make(log, root, change)
        left.pop()

    monkeypatch.setattr(ChangeLog, "make", failing)
    for changes in range(8):  # the record, two states, two forwards, a note and two hooks
        left[:] = [None] * changes
        with pytest.raises(IndexError):
            adaptive.patch(model)
        assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    left[:] = [None] * 8
    adaptive.patch(model).unpatch()


def test_compiles_to_one_graph():
    model, (x, memory) = decoder(layers=1), inputs(tokens=2)
    expected = model(x, memory)
    handle = adaptive.patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = native_calls()
    torch.testing.assert_close(compiled(x, memory), expected)
    assert native_calls() == before + 1
    assert answered(handle) == [0]  # what runs compiled is not counted per layer


def test_threads_get_their_own_results():
    module = attention(batch_first=True)
    adaptive.patch(module)
    memories = [torch.randn(1, 80, 128) for _ in range(4)]
    expected = [module(QUERY[:1], memory, memory)[0] for memory in memories]
    wrong = []

    def run(memory, result):
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(module(QUERY[:1], memory, memory)[0], result):
                    wrong.append(memory)

    threads = [threading.Thread(target=run, args=p) for p in zip(memories, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_verify_compares_outputs():
    model, (x, memory) = decoder(), inputs(tokens=2)
    handle = adaptive.patch(model)
    result = handle.verify({"tgt": x, "memory": memory})
    assert result.max_logit_error < 1e-5
    assert answered(handle) == [0, 0]
