"""The benchmark of routed layers' quality: its rows are whole, and its picture is drawn."""

import numpy as np
import torch
from models import make

from bench import depths_quality, record
from bench.lab import depths


def measured(part, tmp_path, monkeypatch):
    """The document of a part, measured on a tiny model and few tokens."""
    tokens = np.random.default_rng(0).integers(3, 100, 2000).astype(np.uint16)
    monkeypatch.setattr(depths, "corpus", lambda split, work: (tokens, 5000))
    for name, value in (("WINDOW", 16), ("WINDOWS", 8), ("STEPS", 2), ("TUNED", (2, 3))):
        monkeypatch.setattr(depths_quality, name, value)
    for name, value in (("TARGETS", (0.5,)), ("CAPACITIES", (0.5,)), ("CALIBRATION", 16)):
        monkeypatch.setattr(depths_quality, name, value)
    model = make("llama", num_hidden_layers=4)
    monkeypatch.setattr(depths_quality, "load_lab", lambda _: (model, None))
    path = tmp_path / "result.json"
    found = record.Recorder("depths_quality", path, {})
    depths_quality.compared(found, tmp_path, part)
    return record.load(path)


def test_rows_and_picture(tmp_path, monkeypatch):
    document = measured("tuned", tmp_path, monkeypatch)
    rows = document["rows"]
    assert {row["policy"] for row in rows} == {"dense", "tuned", "least changing", "last", "random"}
    assert rows[0]["shares"] == {}
    assert {row["share"] for row in rows if row["policy"] == "last"} == {0.0}
    depths_quality.draw(document, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_rows_of_fitted_routers(tmp_path, monkeypatch):
    rows = measured("fitted", tmp_path, monkeypatch)["rows"]
    seeds = {f"random per layer, seed {seed}" for seed in range(depths_quality.SEEDS)}
    wanted = {"dense", "least changing", "fitted", "fitted per layer", *seeds}
    assert {row["policy"] for row in rows} == wanted
    for row in rows:
        if row["policy"] not in ("dense", "least changing"):
            assert (row["setting"], set(row["shares"])) == (0.5, {"2", "3"})


def test_nats_in_two_passes_are_those_of_one():
    model = make("llama")
    ids = torch.randint(3, 100, (2, 13), generator=torch.Generator().manual_seed(0))
    one, two = (depths_quality.nats(model, [ids], first) for first in (0, 5))
    assert abs(one - two) < 1e-5
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert abs(one - float(loss)) < 1e-5
