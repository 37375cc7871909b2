"""The benchmark of depth-wise batching: what it writes is whole, and all ways give equal tokens."""

import pytest
import torch

from bench import depth_batching, record, table


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """A run of the smallest model."""
    path = tmp_path_factory.mktemp("bench") / "result.json"
    threads = torch.get_num_threads()
    options = ["--shapes", "tiny", "--routers", "token", "--batches", "3", "--prompts", "6"]
    assert depth_batching.main([*options, "--rounds", "2", "--json", str(path)]) == 0
    torch.set_num_threads(threads)
    return record.load(path)


def test_a_row_says_how_fast_and_how_full_each_way_was(document):
    (row,) = document["rows"]
    assert row["variants"].keys() == {"depth", "token", "static"}
    assert sum(row["depths"]) == row["new_tokens"] - row["prompts"]
    ours, theirs = row["variants"]["depth"], row["variants"]["token"]
    assert ours["passes"] < theirs["passes"]
    assert ours["occupancy"] > theirs["occupancy"]
    for found in row["variants"].values():
        seconds = sorted(found["rounds_s"])
        assert found["tokens_per_s"] == pytest.approx(row["new_tokens"] * 2 / sum(seconds), rel=0.1)


def test_the_table_shows_all_ways(document):
    text = table.update(
        "<!-- table:begin depth_batching -->\n<!-- table:end depth_batching -->", [document]
    )
    assert f"{document['rows'][0]['speedup']['token']:.2f}x" in text
    assert "batch 3, mean depth" in text
    assert "CPU time of one thread" in text


def test_a_way_that_gives_other_tokens_is_not_timed(monkeypatch):
    def wrong(model, prompts, limits, *, batch_size, schedule):
        del batch_size
        return [torch.full((n,), int(schedule == "token")) for n in limits]

    monkeypatch.setattr(depth_batching, "generate_many", wrong)
    with pytest.raises(depth_batching.WrongResultError, match="must give the tokens of 'depth'"):
        depth_batching.measure("tiny", "token", 2, 4, 1)
