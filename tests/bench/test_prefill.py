"""The benchmarks of prompts by blocks: small runs end to end, and wrong results are refused."""

import argparse

import pytest
import torch
from rich.console import Console

from bench import prefill, quality, quality_prefill, record
from bench.table_prefill import prefill_table, quality_prefill_table
from bench.timing import WrongResultError

TIME = {
    "heads": 4,
    "kv_heads": 2,
    "tokens": 300,
    "head_dim": [32],
    "dtype": "float32",
    "shares": [0.4],
    "threads": 1,
    "repetitions": 1,
}


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def recorder(tmp_path):
    return lambda kind: record.Recorder(kind, tmp_path / "made.json", {})


def test_a_layer_is_timed_checked_and_tabulated(recorder):
    made = recorder("prefill")
    prefill.run(argparse.Namespace(**TIME), made, Console(quiet=True))
    document = record.load(made.path)
    (row,) = document["rows"]
    patterns = {"selected, 40%", "vertical_slash, 40%", "a_shape, 40%"}
    assert row["variants"].keys() == {prefill.DENSE, prefill.OURS, *patterns}
    assert all(v["us"] > 0 and v["error"] < 1e-4 for v in row["variants"].values())
    assert row["split_ms"]["selected, 40%"].keys() == {"pool", "score", "select", "attend", "audit"}
    text = prefill_table(document)
    assert all(pattern in text for pattern in patterns)


def test_a_wrong_choice_of_keys_is_not_timed(recorder, monkeypatch):
    monkeypatch.setattr(
        prefill, "reads", lambda policy, prompt: lambda row: torch.ones(1, row + 1) > 0
    )
    with pytest.raises(WrongResultError, match=r"the error of .* is 0\."):
        prefill.run(argparse.Namespace(**TIME), recorder("prefill"), Console(quiet=True))


def test_quality_is_measured_and_tabulated(monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(
        quality_prefill, "POLICIES", (("selected", {"mass": 0.5}), ("a_shape", {"budget": 0.2}))
    )
    sizes = {"context": 512, "passkey": 1, "text": 1, "threads": 1}
    files = {"json": tmp_path / "made.json", "chart": tmp_path / "made.png"}
    options = argparse.Namespace(**sizes, **files)
    quality.measure("quality_prefill", options, quality_prefill.run, quality_prefill.print_rows)
    assert "same token" in capsys.readouterr().out
    document = record.load(files["json"])
    assert document["settings"] == sizes
    dense, selected, window = document["rows"]
    assert dense["policy"] == "dense"
    assert dense["scores_share"] == 1.0
    assert dense["tasks"]["text"]["kl_from_dense"] == 0
    for row in (selected, window):
        assert 0 < row["scores_share"] < 1
        assert 0 < row["mass_mean"] < 1
        assert row["tasks"]["text"]["kl_from_dense"] > 0
        assert row["tasks"]["text"]["tokens"] == 511
        assert row["tasks"]["passkey"]["answers"] == 1
    assert "selected, mass 0.5" in quality_prefill_table(document)
    assert files["chart"].stat().st_size > 10_000
