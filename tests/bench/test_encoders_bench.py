"""The benchmark of encoders: rows are whole, the exact variant is proved, tables can be made."""

import pytest
import torch

from bench import encoders, record, table
from bench.table_encoders import encoders_quality_table

TINY = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64}
MACHINE = {
    "cpu": "A Processor",
    "cores": 2,
    "huge_pages": "madvise",
    "commit": "0123456789ab",
    "date": "2026-01-02T03:04:05+00:00",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
}


@pytest.fixture
def tiny(monkeypatch):
    for name, (config, model, fields) in encoders.SHAPES.items():
        monkeypatch.setitem(encoders.SHAPES, name, (config, model, {**fields, **TINY}))
    monkeypatch.setitem(encoders.GRIDS, 64, (8, 8))


def document(rows):
    return {
        "schema": record.SCHEMA,
        "benchmark": "encoders",
        "machine": MACHINE,
        "settings": {},
        "rows": rows,
        "failures": [],
    }


@pytest.mark.usefixtures("tiny")
def test_rows_and_their_table():
    cases = [("bert-base", True), ("modernbert-base", False), ("vit-large", False)]
    rows = [encoders.measure(shape, 64, padded, torch.float32, 8, 0.05) for shape, padded in cases]
    found = document(rows)
    record.validate(found)
    padded, windowed, images = rows
    assert padded["variants"]["exact"]["computed_share"] == (64**2 + 32**2) / (2 * 64**2)
    assert windowed["variants"]["policy"]["computed_share"] < 0.8
    assert images["tokens"] == 65
    assert images["variants"]["exact"]["error"] == 0.0
    text = table.update("<!-- table:begin encoders -->\n<!-- table:end encoders -->", [found])
    assert "| bert-base, 64 tokens, a full and a half-empty row |" in text
    assert "`GlobalLocalAttention(window=8)`" in text


@pytest.mark.usefixtures("tiny")
def test_what_is_not_exact_is_not_timed(monkeypatch):
    monkeypatch.setattr(encoders, "relative_error", lambda out, truth: 0.5)
    with pytest.raises(RuntimeError, match=r"exact must be within 0.0001, got 0.5"):
        encoders.measure("bert-base", 32, True, torch.float32, 8, 0.05)


def test_the_table_of_quality():
    common = {
        "model": "a model",
        "texts": 3,
        "tokens": 512,
        "computed_share": 0.25,
        "cosine_mean": 0.9,
        "cosine_min": 0.8,
        "same_neighbour": 0.5,
    }
    policy = {**common, "kind": "policy", "window": 64, "globals": 1, "mass_mean": 0.55}
    made = encoders_quality_table(
        {**document([]), "quality": [policy, {**common, "kind": "cut text", "kept": 256}]}
    )
    assert "| window 64, 1 global | 25.0% | 0.55 | 0.900 | 0.800 | 50% |" in made
    assert "| text cut to 256 tokens, stock attention | 25.0% | - |" in made
