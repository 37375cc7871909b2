"""The lab model: it loads, its tasks are seeded, and it does what its results file says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.lab import data, evaluate, measure, model, tasks
from bench.lab.muon import orthogonalise
from bench.lab.tokenizer import decode_bytes, encode_bytes

LAB = Path(evaluate.__file__).parent


@pytest.fixture(scope="module")
def lab() -> tuple[Any, Any]:
    """The exported model and tokenizer, loaded as any user loads them."""
    return evaluate.load(LAB / "model")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """What the last full evaluation found."""
    return json.loads((LAB / "results.json").read_text())


def test_config_facts(lab: tuple[Any, Any]) -> None:
    config = lab[0].config
    assert config.model_type == "llama"
    assert config.num_hidden_layers >= 8
    assert config.num_attention_heads >= 2 * config.num_key_value_heads
    assert config.max_position_embeddings >= 8192
    assert not lab[0].generation_config.do_sample
    assert all(p.dtype == torch.float32 for p in lab[0].parameters())


def test_weights_are_small() -> None:
    assert (LAB / "model" / "model.safetensors").stat().st_size <= 16 << 20


@pytest.mark.parametrize(
    "text", ["", "def f(x):\n\treturn x  # naïve €\n", "日本 😀\r\n\x00\x7f", " 007 1234567890"]
)
def test_tokenizer_round_trips_text(lab: tuple[Any, Any], text: str) -> None:
    tokenizer = lab[1]
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_tokenizer_round_trips_any_bytes(lab: tuple[Any, Any]) -> None:
    backend = lab[1].backend_tokenizer
    noise = np.random.default_rng(0).integers(0, 256, 2000).astype(np.uint8).tobytes()
    for raw in (bytes(range(256)), noise, "half a €".encode()[:-1]):
        assert decode_bytes(backend, encode_bytes(backend, raw)) == raw


def test_digits_are_single_tokens(lab: tuple[Any, Any]) -> None:
    ids = lab[1].encode("31415926", add_special_tokens=False)
    assert [lab[1].decode([i]) for i in ids] == list("31415926")


def test_prompts_begin_with_bos(lab: tuple[Any, Any]) -> None:
    assert lab[1].encode("x")[0] == lab[1].bos_token_id == tasks.bos_id(lab[1])


def test_held_out_split_is_stable() -> None:
    assert data.split_of(data.LONG_DOCUMENT) == "heldout"
    listed = json.loads((LAB / "data_list.json").read_text())["files"]
    assert len(listed) > 300
    assert all(entry["split"] == data.split_of(entry["path"]) for entry in listed)
    share = sum(entry["split"] == "heldout" for entry in listed) / len(listed)
    assert 0.01 < share < 0.15


@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_passkey_document_is_seeded_and_exact(lab: tuple[Any, Any], depth: float) -> None:
    ids, answer = tasks.passkey_document(lab[1], 700, depth, seed=5)
    assert (ids, answer) == tasks.passkey_document(lab[1], 700, depth, seed=5)
    assert len(ids) == 700
    assert ids[0] == lab[1].bos_token_id
    text = lab[1].decode(ids)
    assert text.endswith("The pass key is ")
    assert tasks.NEEDLE.format(key=answer) in text
    assert answer != tasks.passkey_document(lab[1], 700, depth, seed=6)[1]
    where = text.index(f"key is {answer}") / len(text)
    assert abs(where - depth) < 0.2


def test_passkey_document_takes_other_text(lab: tuple[Any, Any]) -> None:
    ids, _ = tasks.passkey_document(lab[1], 300, 0.5, seed=1, text="A plain line.\n" * 9)
    assert len(ids) == 300
    assert "A plain line." in lab[1].decode(ids)
    with pytest.raises(ValueError, match="depth"):
        tasks.passkey_document(lab[1], 300, 1.5, seed=1)
    with pytest.raises(ValueError, match="too few"):
        tasks.passkey_document(lab[1], 20, 0.5, seed=1)


def test_training_tasks_are_seeded(lab: tuple[Any, Any]) -> None:
    encode = tasks.encoder(lab[1])
    corpus = np.asarray(encode("some words of filler, again and again. " * 60))

    def draw(seed: int) -> list[tasks.Sample]:
        rng = np.random.default_rng(seed)
        return [
            tasks.copy_sample(rng, 257, 0, np.arange(3, 1024)),
            tasks.text_sample(rng, corpus, 257, 0),
            tasks.keys_sample(rng, encode, corpus, 257, 0, keys=1),
            tasks.keys_sample(rng, encode, corpus, 257, 0, keys=3, confusable=1.0),
            tasks.variables_sample(rng, encode, corpus, 257, 0, hops=2),
        ]

    for first, second in zip(draw(3), draw(3), strict=True):
        assert len(first.ids) == len(first.weights) == 257
        assert (first.ids == second.ids).all()
        assert (first.weights == second.weights).all()
        assert first.weights[0] == 0
    assert (draw(3)[0].ids != draw(4)[0].ids).any()


def test_confusable_keys_have_few_digits() -> None:
    rng = np.random.default_rng(0)
    keys = [tasks.confusable_key(rng) for _ in range(50)]
    assert all(len(key) == tasks.KEY_DIGITS and len(set(key)) <= 3 for key in keys)
    assert len(set(keys)) > 40


def test_skip_positions_grow_and_stay_inside() -> None:
    for seed in range(20):
        positions = tasks.skip_positions(np.random.default_rng(seed), 128, 9000, 4)
        assert positions[0] == 0
        assert (np.diff(positions) >= 1).all()
        assert positions[-1] < 9000


def test_layerskip_schedules() -> None:
    assert model.layer_dropout(8, 0.1, 1.0)[0] == 0.0
    assert model.layer_dropout(8, 0.1, 1.0)[-1] == pytest.approx(0.1)
    assert model.layer_dropout(8, 0.1, 0.0) == [0.0] * 8
    weights = model.exit_weights(8, 0.1, [3, 7])
    assert sum(weights.values()) == pytest.approx(1.0)
    assert weights[3] / weights[7] == pytest.approx(0.6 / 9.1)


def test_muon_updates_are_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.3
        assert values.max() < 1.5


def test_lean_forward_equals_transformers(lab: tuple[Any, Any]) -> None:
    assert measure.transformers_difference(lab[0]) < 1e-3


def test_passkey_at_2048_by_greedy_generation(lab: tuple[Any, Any]) -> None:
    """Real token-by-token generation, so that the one-pass scoring is checked too."""
    right = []
    for seed in range(4):
        ids, answer = tasks.passkey_document(lab[1], 2048, (seed + 0.5) / 4, seed=seed)
        out = lab[0].generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)
        right.append(lab[1].decode(out[0, len(ids) :]) == answer)
        scored = measure.passkey_exits(lab[0], lab[1], 2048, (seed + 0.5) / 4, seed)
        assert bool(scored[-1]) == right[-1]
    assert sum(right) >= 3


def test_results_hold_what_the_readme_promises(results: dict[str, Any]) -> None:
    assert results["passkey"]["lengths"]["8192"]["accuracy"] >= 0.95
    assert results["induction"]["heads_above_0.3"] >= 2


def test_results_agree_with_a_small_sample(lab: tuple[Any, Any], results: dict[str, Any]) -> None:
    heads = measure.induction_scores(lab[0], length=256, batch=4, seed=0)
    np.testing.assert_allclose(heads, results["induction"]["scores"], atol=0.01)
    text = data.long_document()
    tokens = np.asarray(tasks.encoder(lab[1])(text[:60_000]))
    nats, _ = measure.text_losses(lab[0], tokens, lab[1].bos_token_id, 1024, 4)
    bits = nats[-1] / math.log(2) * len(tokens) / len(text[:60_000].encode())
    assert bits == pytest.approx(results["text"]["long_document"]["bits_per_byte"], rel=0.15)
