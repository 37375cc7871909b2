"""The benchmark of token merging: rows are whole, tables and pictures can be made."""

from pathlib import Path

import pytest
import torch
import transformers

from bench import record, table, token_merging
from bench.token_merging_chart import draw

ROOT = Path(__file__).parents[2]
NAMES = ("token_merging", "token_merging_quality")
MARKERS = "\n".join(f"<!-- table:begin {n} -->\n<!-- table:end {n} -->" for n in NAMES)
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def sentences(*_):
    rng = torch.Generator().manual_seed(0)
    mask = (torch.arange(20) < torch.tensor([[20], [13], [9]])).long()
    return [{"input_ids": torch.randint(1, 64, (3, 20), generator=rng), "attention_mask": mask}]


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="needs text encoders of 5"
)
def test_rows_tables_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(token_merging, "batches", sentences)
    path = tmp_path / "result.json"
    recorder = record.Recorder("token_merging", path, {})
    image = token_merging.vit(**SMALL, image_size=32, patch_size=4)
    token_merging.measure_images(recorder, 1, 0.1, image)
    text = transformers.BertModel(transformers.BertConfig(vocab_size=64, **SMALL)).eval()
    token_merging.measure_texts(recorder, 1, 0.1, text, None)
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
