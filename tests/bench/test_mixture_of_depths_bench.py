"""The benchmark of Mixture-of-Depths: every part runs, and its rows are whole."""

import torch

from bench import mixture_of_depths, record, sequence_groups
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


def test_sequences_that_run_the_same_layers_come_together():
    runs = torch.tensor([[1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 1, 0]]).bool()
    order = sequence_groups.alike_first(runs)
    assert order.tolist() == [5, 0, 2, 4, 1, 3]


def test_grouped_sequences_give_whole_rows(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "routed", {**SHAPES["tiny"], "num_hidden_layers": 3})
    for module, name, value in (
        (mixture_of_depths, "CONTEXT", 8),
        (mixture_of_depths, "STEPS", 3),
        (sequence_groups, "CONTEXT", 8),
        (sequence_groups, "BATCH", 3),
        (sequence_groups, "SEQUENCES", 12),
    ):
        monkeypatch.setattr(module, name, value)
    path = tmp_path / "result.json"
    found = record.Recorder("sequence_groups", path, {})
    sequence_groups.measure(build("routed", torch.float32), found, 1, 0.1)
    rows = record.load(path)["rows"]
    assert len(rows) == 6
    for came, alike in zip(rows[::2], rows[1::2], strict=True):
        assert (came["what"], alike["what"]) == ("as they came", "alike together")
        assert came["share"] == alike["share"]
