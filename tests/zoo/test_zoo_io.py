"""The zoo's models at their edges: files, dtypes, kernels, and input that is wrong."""

import json

import pytest
import torch
from zoo_models import SIZES, VOCAB, build, draw, prompts

from adaptive import _native
from adaptive.zoo import BlockTransformerConfig


@pytest.fixture(scope="module", params=["block", "vanilla"])
def model(request):
    return build(request.param)


def test_files_bring_back_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = type(model).from_pretrained(tmp_path)
    assert again.config == model.config
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    ids = draw(2, 9)
    assert torch.equal(again(ids), model(ids))


def test_files_that_do_not_fit_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for changed, message in [
        ({**values, "width": 256, "head_dim": 64}, "must have shape"),
        ({**values, "depth": 3}, "fields of config.json must be"),
        ({**values, "model_type": "other"}, "model_type of config.json must be"),
        ({**values, "heads": 5}, "kv_heads must divide heads=5"),
    ]:
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("kv_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(model, dtype, kv_dtype):
    narrow = build("block" if model.block_length > 1 else "vanilla").to(dtype)
    rows = prompts([80, 3])
    new = narrow.generate(rows, 6, kv_dtype=kv_dtype)
    assert [len(row) for row in new] == [6, 6]
    entries = narrow.report().kv_entries
    itemsize = (kv_dtype or dtype).itemsize
    assert narrow.report().kv_bytes == 2 * entries * narrow.kv_layers * 2 * 2 * 32 * itemsize


def test_large_weights_are_read_by_the_native_kernel():
    model = build("vanilla", vocab_size=8192, layers=1)  # the head has 4 MiB
    before = _native.calls().get("skinny_linear:cpu", 0)
    model.generate(draw(3, 5), 4)
    assert _native.calls()["skinny_linear:cpu"] == before + 4
    model.generate(draw(17, 5), 4)  # more rows than it gains from
    assert _native.calls()["skinny_linear:cpu"] == before + 4


@pytest.mark.parametrize("ids", [[[1, 2], [3]], [(4,), [5, 6]], draw(2, 3).int()])
def test_prompts_may_be_lists_or_any_whole_numbers(model, ids):
    rows = [torch.as_tensor(row) for row in ids]
    expected = model.generate(rows, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.generate(ids, 3), expected, strict=True))
    assert all(row.dtype == torch.int64 for row in expected)


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        (torch.zeros(0, 4, dtype=torch.int64), {}, ValueError, "ids must have at least one row"),
        ([], {}, ValueError, "ids must have at least one row, got none"),
        (torch.zeros(2, 0, dtype=torch.int64), {}, ValueError, r"ids\[0\] must hold at least one"),
        ([[1], []], {}, ValueError, r"ids\[1\] must hold at least one token"),
        (torch.zeros(4, dtype=torch.int64), {}, ValueError, r"must be \[batch, tokens\]"),
        ([[1, VOCAB]], {}, IndexError, r"ids\[0\] must be in \[0, 61\), got 61"),
        ([[3], [-1]], {}, IndexError, r"ids\[1\] must be in \[0, 61\), got -1"),
        ([[1.5]], {}, TypeError, r"ids\[0\] must be int32 or int64, got torch.float32"),
        ([[1]], {"max_new_tokens": 0}, ValueError, "max_new_tokens must be a whole number from 1"),
        ([[1]], {"max_new_tokens": 2.0}, ValueError, "max_new_tokens must be a whole number"),
        ([[1]], {"temperature": 0.0}, ValueError, "temperature must be above 0 and finite, got 0"),
        ([[1]], {"temperature": float("nan")}, ValueError, "temperature must be above 0"),
        ([[1]], {"eos_token_id": VOCAB}, ValueError, r"eos_token_id must be in \[0, 61\), got 61"),
        ([[1]], {"kv_dtype": torch.float64}, TypeError, "kv_dtype must be one of"),
    ],
)
def test_bad_input_of_generate_is_named(model, ids, options, error, message):
    with pytest.raises(error, match="adaptive::zoo: .*" + message):
        model.generate(ids, **{"max_new_tokens": 4, **options})


def test_autocast_is_for_training(model):
    ids = draw(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(ids)
        with pytest.raises(
            NotImplementedError, match=r"generation cannot run under torch\.autocast"
        ):
            model.generate(ids, 2)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert len(model.generate(ids, 2)) == 2


def test_bad_input_of_forward_is_named(model):
    for ids, error, message in [
        (torch.zeros(3, dtype=torch.int64), ValueError, r"ids must be \[batch, tokens\]"),
        (torch.zeros(0, 3, dtype=torch.int64), ValueError, "with at least one token"),
        ([[1, 2]], ValueError, "got list"),
        (torch.full((1, 2), VOCAB), IndexError, r"must be in \[0, 61\), got 61"),
        (torch.zeros(1, 2), TypeError, "must be int32 or int64"),
    ]:
        with pytest.raises(error, match=message):
            model(ids)
    if model.block_length > 1:
        for padding in (-1, 4, 1.0):
            with pytest.raises(ValueError, match=r"padding must be in \[0, 4\)"):
                model(draw(1, 5), padding=padding)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a whole number from 1 on, got 0"),
        ({"width": 128.0}, "width must be a whole number"),
        ({"heads": 3}, "heads must divide width=128, got 3"),
        ({"kv_heads": 3}, "kv_heads must divide heads=4, got 3"),
        ({"heads": 8}, r"head_dim must be a multiple of 8 in 32..256, got 16"),
        ({"block_layers": 0}, "block_layers must be a whole number from 1 on"),
        ({"block_length": 3}, "block_length must divide width=128, got 3"),
        ({"rope_theta": 0.0}, "rope_theta must be a positive number"),
        ({"norm_eps": float("nan")}, "norm_eps must be a positive number"),
    ],
)
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match="adaptive::zoo: " + message):
        BlockTransformerConfig(**{**SIZES, "block_layers": 1, "token_layers": 1, **changes})
