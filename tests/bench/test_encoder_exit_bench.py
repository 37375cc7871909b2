"""The benchmark of early exits of an encoder: rows are whole, tables and pictures can be made."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from small_encoders import markers, needs_text_encoders, texts

from bench import encoder_exit, minilm, record, table

ROOT = Path(__file__).parents[2]
MARKERS = markers("encoder_exit")


class Words:
    """A tokenizer that makes a token of each word."""

    def __call__(
        self, given, padding=False, return_tensors=None, truncation=False, max_length=None
    ):
        rows = [given] if isinstance(given, str) else given
        ids = [[1 + len(word) % 40 for word in text.split()][:max_length] for text in rows]
        if not padding:
            return transformers.BatchEncoding({"input_ids": ids[0]})
        most = max(map(len, ids))
        return transformers.BatchEncoding(
            {
                "input_ids": torch.tensor([row + [0] * (most - len(row)) for row in ids]),
                "attention_mask": torch.tensor(
                    [[1] * len(row) + [0] * (most - len(row)) for row in ids]
                ),
            }
        )


@needs_text_encoders
def test_rows_tables_and_pictures(tmp_path, monkeypatch):
    model, path, picture = texts(num_hidden_layers=3), tmp_path / "result.json", tmp_path / "a.png"
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda _: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _: Words())
    monkeypatch.setattr(encoder_exit, "SENTENCES", 32)
    monkeypatch.setattr(encoder_exit, "LEARNED", 32)
    threads = str(torch.get_num_threads())
    call = ["bench.encoder_exit", "--minilm", str(tmp_path), "--json", str(path), "--budget", "0.5"]
    monkeypatch.setattr(sys, "argv", [*call, "--picture", str(picture), "--threads", threads])
    minilm.run("encoder_exit", encoder_exit.__doc__, encoder_exit.measure)
    found = record.load(path)
    fixed = [row for row in found["rows"] if row["rule"] == "fixed"]
    assert [row["mean_depth"] for row in fixed] == [1, 2]
    assert fixed[0]["skipped_share"] == pytest.approx(2 / 3, abs=1e-4)
    exact = next(row for row in found["rows"] if row["rule"] == "exact")
    assert exact["cosine_min"] > 0.999
    assert exact["time_saved"] == 0.0
    assert "| `layer=1` | 1.00 | 66.7% |" in table.update(MARKERS, [found])
    assert picture.stat().st_size > 10_000


def test_the_time_saved_is_the_share_of_layers_skipped():
    """The committed result holds what the page says it does."""
    rows = record.load(ROOT / "bench/results/2026-11-21-cascadelake-encoder-exit.json")["rows"]
    shares = [row["saved_of_skipped"] for row in rows if row["saved_of_skipped"] is not None]
    assert len(shares) > 8
    assert min(shares) >= 0.85
