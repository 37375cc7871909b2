"""The benchmarks of siblings and of forced acceptance: what is forced, and the table."""

import argparse
from pathlib import Path

import pytest
import torch
from models import make, token_ids

import adaptive
from adaptive.layers import hf_rows
from adaptive.layers.sibling_length import PRIOR
from bench import forced_drafts, siblings, table
from bench.forced_drafts_chart import curves, draw
from bench.record import load, validate
from bench.speculation import measure
from bench.table_speculation import siblings_table

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "bench" / "results").glob("*-siblings.json"))
MACHINE = {
    "cpu": "A Processor",
    "cores": 2,
    "huge_pages": "madvise",
    "commit": "0123456789ab",
    "date": "2026-01-02T03:04:05+00:00",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
}
POLICIES = {
    "exact": None,
    "exit 2": adaptive.SelfSpeculative(exit_layer=2),
    "exit 2, siblings": adaptive.SelfSpeculative(exit_layer=2, tree=True),
}


def document(kind, rows, **settings):
    return {
        "schema": 1,
        "benchmark": kind,
        "machine": MACHINE,
        "settings": settings,
        "rows": rows,
        "failures": [],
    }


def test_a_row_has_a_chain_and_a_tree_of_each_way_to_draft():
    model = make("llama", num_hidden_layers=4)
    options = argparse.Namespace(tokens=8, repetitions=1, threads=1, budget_s=1.0)
    variants = measure(model, token_ids(1), options, POLICIES)
    shares = siblings.rank_shares(model, token_ids(1), 2, 8)
    row = {"what": "lab", "text": "random", "batch": 1, "rank_shares": {"2": shares}}
    found = document("siblings", [{**row, "variants": variants}], tokens=8, threads=1)
    validate(found)
    assert "| random | exit 2 |" in siblings_table(found)
    assert len(shares) == len(PRIOR)
    for name in siblings.variant_policies():
        if name.endswith(", siblings"):
            assert name.removesuffix(", siblings") in siblings.variant_policies()


@pytest.mark.parametrize("share", forced_drafts.SHARES)
def test_what_is_forced_has_the_share(share):
    drafted, choices = torch.arange(1, 5)[None], torch.arange(10, 15)[None]
    made = []
    with forced_drafts.forced(share):
        for _ in range(200):
            right, tokens = hf_rows.accept_greedy(drafted, choices)
            assert tokens == [[*range(1, int(right) + 1), 10 + int(right)]]
            made.append(int(right))
    expected = sum(share**depth for depth in range(1, 5))
    assert sum(made) / 200 == pytest.approx(expected, abs=0.05)


def test_forced_siblings_are_right_at_their_rank_s_share():
    """A chain of two, and two siblings of each of its tokens."""
    drafted, choices = torch.arange(1, 7)[None], torch.arange(10, 17)[None]
    parents = torch.tensor([[-1, 0, -1, -1, 0, 0]])
    ends = {}
    with forced_drafts.forced(0.5):
        for _ in range(400):
            [path], [tokens] = hf_rows.accept_tree(drafted, choices, parents, torch.tensor([6]))
            assert tokens[:-1] == [node + 1 for node in path]
            end = path[-1] if path else -1
            ends[end] = ends.get(end, 0) + 1
    # the first draft is wrong in half of the checks: then the second rank is right at its share
    assert ends[2] / 400 == pytest.approx(0.5 * PRIOR[0], abs=0.03)
    assert ends[3] / 400 == pytest.approx(0.5 * PRIOR[1], abs=0.03)
    assert ends[1] / 400 == pytest.approx(0.25, abs=0.03)
    assert ends[4] / 400 == pytest.approx(0.25 * PRIOR[0], abs=0.03)


def test_the_chart_has_a_curve_for_each_number_of_drafts(tmp_path):
    rows = [
        {"accepted": a, "draft": d, "siblings": s, "measured": 1.0 + a, "promised": 1.1 + a}
        for a in (0.5, 0.25)
        for d in (1, 2)
        for s in (False, True)
    ]
    found = document("forced_drafts", rows)
    validate(found)
    assert curves(found, True) == {d: [(0.25, 1.35, 1.25), (0.5, 1.6, 1.5)] for d in (1, 2)}
    draw(found, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_the_table_of_the_docs_is_that_of_the_results():
    text = (ROOT / "docs" / "self_speculation.md").read_text()
    assert table.replace(text, "siblings", siblings_table(load(RESULTS[-1]))) == text
