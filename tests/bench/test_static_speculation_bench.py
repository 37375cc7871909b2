"""The benchmark of static steps: what the coin gives, what bytes promise, and a whole row."""

import pytest
import torch
from models import make

from bench import record, static_speculation
from bench.static_speculation import Coin, by_bytes, chance_for, measure, parse

TINY = ["--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--context", "40"]


@pytest.mark.parametrize("drafts", [1, 2, 6])
def test_the_coin_accepts_the_share_that_it_is_to(drafts):
    coin = Coin(chance_for(0.7, drafts), 4, drafts, torch.device("cpu"))
    drafted = torch.arange(4 * drafts).view(4, drafts)
    choices = torch.full((4, drafts + 1), 99)
    total = 0
    for _ in range(static_speculation.TOSSES):
        accepted, _, tokens = coin(drafted, choices)
        total += int(accepted.sum())
        for row, n in enumerate(accepted.tolist()):
            assert tokens[row, : n + 1].tolist() == [*drafted[row, :n].tolist(), 99]
    assert total / (static_speculation.TOSSES * 4 * drafts) == pytest.approx(0.7, abs=0.02)


def test_bytes_of_a_draft_are_those_of_its_layers_and_the_head():
    model = make("llama", num_hidden_layers=4)
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    head = model.lm_head.weight.nbytes
    assert by_bytes(model, 0, 1.0) == 1.0
    want = 2.5 * (4 * layer + head) / ((3 + 3) * layer + 3 * head)
    assert by_bytes(model, 2, 2.5) == pytest.approx(want)


def test_a_row_is_whole_and_the_tokens_are_those_of_the_coin(tmp_path, monkeypatch):
    out = tmp_path / "static.json"
    options = [*TINY, "--drafts", "1", "3", "--steps", "6", "--repetitions", "3"]
    monkeypatch.setattr("sys.argv", ["bench", *options, "--json", str(out)])
    assert static_speculation.main() == 0
    (row,) = record.load(out)["rows"]
    assert set(row["variants"]) == {
        "plain",
        *(f"{n} drafts, {reading}" for n in (1, 3) for reading in ("chance", "share")),
    }
    assert row["variants"]["plain"]["tokens_per_step"] == 1
    assert row["variants"]["plain"]["speedup"] == 1
    assert not row["captured"]


def test_drafts_that_are_all_accepted_bring_one_token_more():
    options = parse(
        [*TINY, "--drafts", "3", "--steps", "4", "--accepted", "1", "--repetitions", "1"]
    )
    row = measure(options)
    assert row["variants"]["3 drafts, chance"]["tokens_per_step"] == 4
    assert row["variants"]["3 drafts, share"]["tokens_per_step"] == 4
