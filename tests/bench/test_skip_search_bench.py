"""The benchmark of the search for skip sets: what it measures, and the table made of it."""

import argparse
from pathlib import Path

import pytest
import torch
from models import make, token_ids

from bench import skip_search, table
from bench.record import load, validate
from bench.table_skip_search import skip_search_table

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "bench" / "results").glob("*skip-search.json"))
OPTIONS = argparse.Namespace(tokens=14, repetitions=2, threads=1, budget_s=5.0, prompt=20)


def test_a_row_has_every_variant_and_each_search_begins_anew():
    model = make("llama", num_hidden_layers=8)
    row = skip_search.measure(model, token_ids(1), OPTIONS)
    document = {
        "schema": 1,
        "benchmark": "skip_search",
        "machine": load(RESULTS[-1])["machine"],
        "settings": vars(OPTIONS),
        "rows": [{"what": "lab", "text": "random", "batch": 1, **row}],
        "failures": [],
    }
    validate(document)
    assert row["variants"]["search"]["candidates"] >= 1
    assert len(row["candidates_by_call"]) == skip_search.CALLS
    assert "| random |" in skip_search_table(document)


def test_other_tokens_are_refused(monkeypatch):
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    with pytest.raises(RuntimeError, match="must make the tokens of the exact path"):
        skip_search.measure(make("llama", num_hidden_layers=8), token_ids(1), OPTIONS)


def test_the_table_of_the_docs_is_that_of_the_results():
    text = (ROOT / "docs" / "self_speculation.md").read_text()
    assert table.replace(text, "skip_search", skip_search_table(load(RESULTS[-1]))) == text
