"""The benchmark of experts in encoders: a row for each choice, and the committed result."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from small_encoders import needs_text_encoders, sentences, texts

from bench import ffn_encoders, record

RESULT = Path(__file__).parents[2] / "bench/results/2026-11-22-cascadelake-ffn-encoders.json"
TOP = (2, 7)
NAMES = "stock", "exact", "clusters", "cut", "cut, random router"


@needs_text_encoders
def test_rows_of_all_choices(tmp_path, monkeypatch):
    model, path, threads = texts(num_hidden_layers=2), tmp_path / "a.json", torch.get_num_threads()
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda _: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _: None)
    monkeypatch.setattr(ffn_encoders, "batches", sentences)
    monkeypatch.setattr(ffn_encoders, "TOP", TOP)
    call = ["--minilm", str(tmp_path), "--json", str(path), "--budget-s", "0.2"]
    monkeypatch.setattr(sys, "argv", ["bench.ffn_encoders", *call])
    try:
        ffn_encoders.main()
    finally:
        torch.set_num_threads(threads)
    found = record.load(path)
    assert found["sentences"] == 3
    assert found["tokens"] == {"real": 42, "padded": 60}
    rows = {(row["what"], row["top_k"]): row for row in found["rows"]}
    wanted = {(name, top) for name in NAMES[2:] for top in TOP}
    assert set(rows) == wanted | {("stock", 8), ("exact", 8), ("clusters", 8)}
    for (what, top), row in rows.items():
        assert row["share"] == (1.0 if what in NAMES[:2] else top / 8)
        assert (row["ms"] is not None) == (what in NAMES[:3])
        assert (row["ffn_error_mean"] is None) == (what in NAMES[:2])
    assert rows["exact", 8]["time_saved"] == 0
    for what in ("exact", "clusters"):
        assert rows[what, 8]["cosine_min"] == pytest.approx(1, abs=1e-3)
    assert rows["clusters", 8]["ffn_error_mean"] == pytest.approx(0, abs=1e-3)
    assert rows["cut, random router", 2]["ffn_error_mean"] > 0.1
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_committed_result_holds_every_choice():
    rows = record.load(RESULT)["rows"]
    tops = {name: [row["top_k"] for row in rows if row["what"] == name] for name in NAMES}
    every = [*ffn_encoders.TOP]
    assert tops == dict(zip(NAMES, ([8], [8], [*every, 8], every, every), strict=True))
    assert all(row["time_saved"] is not None for row in rows if row["what"] in NAMES[1:3])
