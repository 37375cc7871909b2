"""The benchmark of token merging: rows are whole, tables and pictures can be made."""

from pathlib import Path

from small_encoders import images, markers, needs_text_encoders, sentences, texts

from bench import record, table, token_merging
from bench.token_merging_chart import draw

ROOT = Path(__file__).parents[2]
MARKERS = markers("token_merging", "token_merging_quality")


@needs_text_encoders
def test_rows_tables_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(token_merging, "batches", sentences)
    path = tmp_path / "result.json"
    recorder = record.Recorder("token_merging", path, {})
    token_merging.measure_images(recorder, 1, 0.1, images())
    token_merging.measure_texts(recorder, 1, 0.1, texts(), None)
    token_merging.measure_bias(recorder, 1, 0.1)
    found = record.load(path)
    assert [row["tokens_last"] for row in found["rows"]] == [65, 53, 41, 26]
    assert found["quality"][0]["cosine_min"] > 0.9999
    assert found["quality"][-1]["kept_share"] < 0.7
    made = table.update(MARKERS, [found])
    assert "| `r=13` | 26 |" in made
    assert "| `keep=0.6` |" in made
    draw(found, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


def test_merging_is_within_a_tenth_of_ideal():
    """The committed result holds what the page says it does."""
    found = record.load(ROOT / "bench/results/2026-11-21-cascadelake-token-merging.json")
    assert len(found["rows"]) == 4
    assert all(row["of_ideal"] >= 0.9 for row in found["rows"])
    for row in found["bias"]:
        times = {name: timing["us"] for name, timing in row["variants"].items()}
        assert times["a number per key"] < 1.1 * times["no mask"]
