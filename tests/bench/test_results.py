"""Result files, tables and chart: no speed without its error, and nothing written elsewhere."""

import copy

import pytest
import torch

from adaptive.ops import OPS
from bench import ops, record, stock, table
from bench.timing import Timing

MACHINE = {
    "cpu": "A Processor",
    "cores": 2,
    "huge_pages": "madvise",
    "commit": "0123456789ab",
    "date": "2026-01-02T03:04:05+00:00",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
}


def models_document():
    def variant(ms):
        return {
            "ms": ms,
            "ms_min": ms,
            "clean": 5,
            "dropped": 1,
            "error": 0.0042,
            "argmax_agreement": 1.0,
        }

    row = {
        "model": "llama-3.2-1b",
        "context": 32768,
        "dtype": "bfloat16",
        "threads": 2,
        "kv_bytes": 1 << 30,
        "error_against": "float32",
        "variants": {
            "stock default": variant(6000.0),
            "stock StaticCache": variant(900.0),
            "patched": variant(500.0),
        },
        "speedup_over": {"stock default": 12.0, "stock StaticCache": 1.8},
    }
    return {
        "schema": record.SCHEMA,
        "benchmark": "models",
        "machine": MACHINE,
        "settings": {},
        "bandwidth_gb_s": {"1": 10.5, "2": 20.0},
        "rows": [row, {**copy.deepcopy(row), "context": 256}],
        "failures": [],
    }


def test_a_row_measured_on_a_gpu_is_a_valid_row(monkeypatch):
    from bench import cuda

    op = OPS["decode_attention"]
    sizes = {"batch": 2, "heads": 8, "kv_heads": 2, "capacity": 128, "head_dim": 64}
    arguments = op.make_inputs(**sizes, dtype=torch.bfloat16, device="cpu")
    monkeypatch.setattr(op, "make_inputs", lambda **_: arguments)
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda _: None)
    one = Timing({0: 10.0}, clean=1, dropped=0)
    monkeypatch.setattr(cuda, "time_cuda", lambda variants: dict.fromkeys(variants, one))
    row = cuda.measure(ops.Cell(op, stock.suite_for(op), sizes, "bfloat16"), ceiling=100.0)
    document = {**models_document(), "benchmark": "ops", "rows": [row]}
    record.validate(document)
    assert row["variants"]["adaptive"]["kind"] == "native"
    moved = 2 * (2 * 8 * 64 + 2 * 2 * 2 * 128 * 64) + 4 * 2 * 8 * 64
    assert row["moved_bytes"] == moved
    assert row["variants"]["adaptive"]["gb_s"] == round(moved / 10e3, 1)


def test_recorder_writes_after_every_row_and_what_it_writes_is_valid(tmp_path):
    path = tmp_path / "new" / "run.json"
    recorder = record.Recorder("models", path, {"budget_s": 1})
    recorder.add(models_document()["rows"][0])
    assert len(record.load(path)["rows"]) == 1
    recorder.fail("context 4096", ValueError("no"))
    document = record.load(path)
    assert document["failures"] == [{"what": "context 4096", "error": "ValueError: no"}]
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_a_result_without_the_error_is_refused():
    document = models_document()
    del document["rows"][0]["variants"]["patched"]["error"]
    with pytest.raises(ValueError, match=r"rows\[0\].variants\['patched'\] must have error"):
        record.validate(document)
    with pytest.raises(ValueError, match="schema must be 1"):
        record.validate({"schema": 0})
    with pytest.raises(ValueError, match="benchmark must be one of"):
        record.validate({"schema": 1, "benchmark": "other"})


def test_table_shows_speed_and_error_sorted_by_context():
    text = table.models_table(models_document())
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[0] for row in rows] == ["| 256", "| 32k"]
    assert "500 ms (error 4.2e-03) | 12.00x | 1.80x | 100% / 100%" in rows[0]
    assert "A Processor" in text
    assert "huge pages: madvise" in text


def test_tables_go_between_their_markers_and_nothing_else_changes():
    text = "before\n<!-- table:begin decode -->\nold\n<!-- table:end decode -->\nafter\n"
    updated = table.update(text, [models_document()])
    assert updated.startswith("before\n<!-- table:begin decode -->\n| context |")
    assert updated.endswith("<!-- table:end decode -->\nafter\n")
    assert "old" not in updated
    assert table.update(updated, [models_document()]) == updated


def test_missing_or_broken_markers_are_a_clear_error():
    with pytest.raises(LookupError, match="markers for one of these tables: decode, memory"):
        table.update("no markers here", [models_document()])
    with pytest.raises(LookupError, match=r"table:end decode.*got 1 and 0"):
        table.update("<!-- table:begin decode -->", [models_document()])
    with pytest.raises(ValueError, match="memory must be in the result document"):
        table.update("<!-- table:begin memory --><!-- table:end memory -->", [models_document()])


def test_chart_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from bench.chart import draw, subtitle

    draw(models_document(), tmp_path / "img" / "decode.png")
    assert (tmp_path / "img" / "decode.png").read_bytes()[:4] == b"\x89PNG"
    assert "4.2e-03 patched" in subtitle(models_document()["rows"])
