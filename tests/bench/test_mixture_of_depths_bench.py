"""The benchmark of Mixture-of-Depths: every part runs, and its rows are whole."""

import torch

from bench import mixture_of_depths, record
from bench.llama import SHAPES, build


def test_rows_are_whole(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "routed", {**SHAPES["tiny"], "num_hidden_layers": 3})
    for name, value in (("TOKENS", 32), ("CONTEXT", 8), ("STEPS", 3), ("BATCH", 3)):
        monkeypatch.setattr(mixture_of_depths, name, value)
    path = tmp_path / "result.json"
    found = record.Recorder("mixture_of_depths", path, {})
    model = build("routed", torch.float32)
    for part in (
        mixture_of_depths.prompts,
        mixture_of_depths.decoding,
        mixture_of_depths.batches,
    ):
        part(model, found, 1, 0.1)
    rows = record.load(path)["rows"]
    assert [row["what"] for row in rows[:4]] == ["prompt"] * 3 + ["decode"]
    assert {row["share"] for row in rows[:3]} == {0.125, 0.25, 0.5}
    assert all(row["error"] < 1e-4 for row in rows[:3])
    assert {row["what"] for row in rows[4:]} == {"decode by token", "decode by sequence"}
