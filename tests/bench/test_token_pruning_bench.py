"""The benchmark of token pruning: rows are whole, tables and pictures can be made."""

from pathlib import Path

from small_encoders import images, markers, needs_text_encoders, sentences, texts

from bench import record, table, token_pruning
from bench.token_pruning_chart import draw

RESULT = Path(__file__).parents[2] / "bench/results/2026-11-21-cascadelake-token-pruning.json"
MARKERS = markers("token_pruning", "token_pruning_quality")


@needs_text_encoders
def test_rows_tables_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(token_pruning, "batches", sentences)
    path = tmp_path / "result.json"
    recorder = record.Recorder("token_pruning", path, {})
    token_pruning.measure_images(recorder, 1, 0.1, images())
    token_pruning.measure_texts(recorder, 1, 0.1, texts(), None)
    found = record.load(path)
    assert [row["tokens_last"] for row in found["rows"]] == [65, 56, 35, 19]
    assert found["quality"][0]["cosine_min"] > 0.9999
    shares = {(row["method"], row["setting"]): row["kept_share"] for row in found["quality"]}
    assert abs(shares["pruned", 0.5] - shares["merged, same layers", 0.5]) < 0.1
    assert shares["pruned", 0.5] < 0.8
    made = table.update(MARKERS, [found])
    assert "| `keep=0.5` | 19 |" in made
    assert "| by information | `keep=0.9` |" in made
    draw(found, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


def test_what_the_page_says_is_in_the_committed_result():
    found = record.load(RESULT)
    assert len(found["rows"]) == 4
    assert all(row["of_ideal"] >= 0.9 for row in found["rows"])
    mean = {(row["method"], row["setting"]): row["cosine_mean"] for row in found["quality"]}
    for keep in token_pruning.KEEP:
        assert mean["pruned", keep] > mean["merged, same layers", keep]
        assert mean["pruned", keep] > mean["into a sum", keep] > mean["cached", keep]
