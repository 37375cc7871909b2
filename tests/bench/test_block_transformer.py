"""The zoo's benchmark, training and tables: what they write is whole, and a stop loses nothing."""

import json

import numpy as np
import pytest
import torch

from bench import block_transformer, record, table

pytest.importorskip("tokenizers")
from bench.zoo import compare, train


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """A run of the smallest cells."""
    path = tmp_path_factory.mktemp("bench") / "result.json"
    threads = torch.get_num_threads()
    options = ["--shapes", "tiny", "--prompts", "64", "--kv-limit-gib", "0.0005", "--threads", "1"]
    assert block_transformer.main([*options, "--json", str(path)]) == 0
    torch.set_num_threads(threads)
    return record.load(path)


def test_every_variant_shows_speed_error_and_kv(document):
    fixed, limit = document["rows"]
    assert fixed["variants"].keys() == {
        f"{kind}, {form}" for kind in ("vanilla", "block") for form in ("float32", "bf16 KV")
    }
    for row in (fixed, limit):
        for name, found in row["variants"].items():
            assert found["error"] < (1e-4 if "float32" in name else 6e-2)
            assert len(found["rounds_s"]) == block_transformer.ROUNDS
            seconds = found["prefill_s"] + sum(found["rounds_s"])
            assert found["tokens_per_s"] == pytest.approx(found["batch"] * 32 / seconds, rel=0.05)
    kv = {name: found["kv_bytes"] for name, found in fixed["variants"].items()}
    assert kv["vanilla, float32"] == 2 * kv["vanilla, bf16 KV"]
    assert kv["vanilla, float32"] == 8 * kv["block, float32"]
    assert all(f["kv_bytes"] <= 0.0005 * 2**30 for f in limit["variants"].values())
    assert (
        limit["variants"]["block, float32"]["batch"]
        > 5 * limit["variants"]["vanilla, float32"]["batch"]
    )


def test_the_table_shows_both_models_and_the_ratio(document):
    text = table.update(
        "<!-- table:begin block_transformer -->\n<!-- table:end block_transformer -->", [document]
    )
    ratio = document["rows"][0]["speedup"]["tokens_per_s"]["ratio"]
    assert f"| {ratio:.1f}x |" in text
    assert "64 + 32 tokens, batch 2 |" in text
    assert "batch limit |" in text
    assert "CPU time" in text


def test_a_stopped_training_goes_on_as_if_it_had_not_been(tmp_path):
    rng = np.random.default_rng(0)
    ids = (rng.integers(0, 8, 40_000) * 3 + 7).astype(np.uint16)
    np.savez(tmp_path / "corpus.npz", train=ids[:30_000], heldout=ids[30_000:])
    tokens = 4 * train.BATCH * train.CONTEXT
    whole = train.Training("block", tmp_path, tokens)
    losses = [whole.update() for _ in range(3)]
    first = train.Training("block", tmp_path, tokens)
    assert first.update() == losses[0]
    first.save()
    second = train.Training("block", tmp_path, tokens)
    assert second.step == 1
    assert [second.update() for _ in range(2)] == pytest.approx(losses[1:], rel=1e-6)
    assert losses[2] < losses[0]


def test_the_comparison_takes_what_ran_last(tmp_path):
    rows = [
        {"step": 1, "loss": 6.0, "tokens": 2048, "seconds": 1.0},
        {"step": 2, "loss": 9.0, "tokens": 4096, "seconds": 2.0},
        {"step": 2, "loss": 5.0, "tokens": 4096, "seconds": 2.0, "bits_per_byte": 2.5},
    ]
    (tmp_path / "block.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    rows = compare.read(tmp_path / "block.jsonl")
    with pytest.raises(ValueError, match="evaluated after the same tokens"):
        compare.common([rows, rows[:1]])
    longer = [*rows, {"step": 3, "loss": 4.0, "tokens": 6144, "seconds": 3.0}]
    longer[-1]["bits_per_byte"] = 2.0
    assert compare.common([rows, longer]) == 4096
    found = compare.summary("block", longer, 4096)
    assert found["training"] == [[2048, 6.0], [4096, 5.0]]
    assert found["bits_per_byte"] == 2.5
    assert found["tokens_per_cpu_second"] == 2048.0
    assert "| Block Transformer | 3 + 3 | 1.53 M | 768 | 0.00 M | 2.500 | 2048 |" in compare.table(
        [found]
    )
    pytest.importorskip("matplotlib")
    compare.draw([found], tmp_path / "img" / "loss.png")
    assert (tmp_path / "img" / "loss.png").read_bytes()[:4] == b"\x89PNG"
