"""Plans: a table that prints as a map, and files of which every flaw is named."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive.errors import PlanMismatch
from adaptive.policy import (
    Exact,
    GlobalLocalAttention,
    LocalAttention,
    ModelShape,
    Plan,
    Quest,
    RazorAttention,
    StreamingLLM,
    TidalDecode,
)
from adaptive.policy.plan import MODES

SHAPE = ModelShape(model_type="llama", heads=(4, 4, 8), kv_heads=(2, 2, 4), head_dim=(64,) * 3)
EVERY_MODE = (
    TidalDecode(),
    Quest(),
    StreamingLLM(),
    RazorAttention(),
    GlobalLocalAttention(window=8),
    LocalAttention(window=8),
)
"""Policies that have no meaning together, but each mode has one."""


@pytest.fixture
def plan():
    return Plan.make(SHAPE, [Exact(stock_layers=(2,))])


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from(list(MODES))), max_size=12))
def test_round_trip(layers):
    heads = tuple(count for count, _ in layers)
    shape = ModelShape(model_type="x", heads=heads, kv_heads=heads, head_dim=heads)
    rows = [(mode,) * count for count, mode in layers]
    if any(row[0] == "reuse" for row in rows):
        shape = ModelShape(
            model_type="x", heads=(1, *heads), kv_heads=(1, *heads), head_dim=(1, *heads)
        )
        rows = [("select",), *rows]
    plan = Plan(shape=shape, rows=tuple(rows), policies=EVERY_MODE, fingerprint=(("rest", "a"),))
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_file_round_trips(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == Plan.load(str(tmp_path / "plan.json")) == plan


def test_prints_a_map(plan):
    assert str(plan).splitlines() == [
        "plan for llama: 3 layers x KV heads",
        "      0-1  ##",
        "        2  ....",
        "        #  dense: reads every key, native kernel",
        "        .  stock: the model's own attention",
    ]


def test_a_plan_for_another_model_names_what_differs(plan):
    plan.check_shape(SHAPE)
    for field, value in (("model_type", "qwen3"), ("head_dim", (128,) * 3), ("heads", (4, 4, 4))):
        other = ModelShape(**{**vars(SHAPE), field: value})
        with pytest.raises(PlanMismatch, match=f"for a model with {field} .*this model has"):
            plan.check_shape(other)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((("dense",) * 2,) * 2, "rows must be 3 layers, got 2"),
        ((("dense",) * 2,) * 3, r"rows\[2\] must have 4 KV heads, got 2"),
        (
            (("dense",) * 2, ("x",) * 2, ("dense",) * 4),
            r"rows\[1\] must hold dense, stock, select, .*, got 'x'",
        ),
        ((("dense",) * 2, ("dense", "stock"), ("dense",) * 4), r"rows\[1\] must have one mode"),
        (
            (("reuse",) * 2, ("window", "razor"), ("dense",) * 4),
            r"rows\[1\] must have one mode for all its heads that keep a window, got razor, wind",
        ),
        (
            (("select", "razor"), ("reuse",) * 2, ("dense",) * 4),
            r"rows\[0\] must have select on all its heads or none, got razor, select",
        ),
        (
            (("dense",) * 2, ("stock", "window"), ("dense",) * 4),
            r"rows\[1\] must have stock on all its heads or none, got stock, window",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        Plan(shape=SHAPE, rows=rows)


def broken(change):
    values = copy.deepcopy(Plan.make(SHAPE, [Exact()]).to_dict())
    change(values)
    return json.dumps(values)


FLAWS = {
    "empty": ("", "Expecting value"),
    "truncated": (json.dumps(Plan.make(SHAPE, []).to_dict())[:-30], "is not a plan"),
    "not an object": ("[]", r"plan must be an object, got \[\]"),
    "another format": (
        broken(lambda v: v.update(adaptive_plan=1)),
        "adaptive_plan must be 2, got 1",
    ),
    "missing key": (broken(lambda v: v.pop("rows")), "plan must have the field 'rows'"),
    "unknown key": (broken(lambda v: v.update(extra=1)), "must not have the field 'extra'"),
    "model no object": (broken(lambda v: v.update(model=3)), "model must be an object, got 3"),
    "model lacks": (broken(lambda v: v["model"].pop("heads")), "model must have the field 'heads'"),
    "model extra": (broken(lambda v: v["model"].update(a=1)), "model must not have the field 'a'"),
    "model type": (
        broken(lambda v: v["model"].update(model_type=1)),
        "model_type must be a string",
    ),
    "heads": (broken(lambda v: v["model"].update(heads=4)), "model.heads must be a list, got 4"),
    "bool": (
        broken(lambda v: v["model"].update(heads=[True] * 3)),
        "whole numbers from 1, got True",
    ),
    "negative": (broken(lambda v: v["model"].update(heads=[-4] * 3)), "from 1, got -4"),
    "fewer": (broken(lambda v: v["model"].update(heads=[4])), "one entry per layer"),
    "windows": (broken(lambda v: v["model"].update(windows=8)), "windows must be a list, got 8"),
    "window": (broken(lambda v: v["model"].update(windows=[0] * 3)), "numbers from 1, got 0"),
    "windows fewer": (broken(lambda v: v["model"].update(windows=[])), "one entry per layer"),
    "fingerprint": (broken(lambda v: v.update(fingerprint="ab")), "an object of strings, got ab"),
    "no policy for a mode": (
        broken(lambda v: v["rows"].__setitem__(1, ["window"] * 2)),
        r"policies must have one that says how to run 'window' of rows\[1\], got Exact\(\)",
    ),
    "nothing to reuse": (
        broken(
            lambda v: (
                v["rows"].__setitem__(1, ["reuse"] * 2),
                v["policies"].append(TidalDecode().to_dict()),
            )
        ),
        r"rows\[1\] must follow a row that selects",
    ),
    "skips in a window": (
        broken(
            lambda v: (
                v["model"].update(windows=[None, 8, None]),
                v["rows"].__setitem__(1, ["window"] * 2),
                v["policies"].append(StreamingLLM().to_dict()),
            )
        ),
        r"rows\[1\] must be dense or stock: .* window of 8 tokens, got 'window'",
    ),
    "huge": (broken(lambda v: v["model"].update(kv_heads=[10**30] * 3)), "KV heads, got 2"),
    "rows": (broken(lambda v: v.update(rows="dense")), "rows must be a list"),
    "row": (
        broken(lambda v: v["rows"].__setitem__(1, [1, 2])),
        r"rows\[1\] must be a list of modes",
    ),
    "mode": (broken(lambda v: v["rows"].__setitem__(1, ["a", "a"])), r"rows\[1\] must hold"),
    "policies": (broken(lambda v: v.update(policies={})), "policies must be a list"),
    "policy": (broken(lambda v: v["policies"].append({"kind": "Evil"})), "got 'Evil'"),
    "policy type": (broken(lambda v: v["policies"].append("Exact")), "policy must be an object"),
    "deep": ("[" * 100_000, "is not a plan"),
    "not text": ("\udce4", "is not a plan"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_file_that_is_no_plan_is_refused_by_name_and_field(flaw, tmp_path):
    text, message = FLAWS[flaw]
    path = tmp_path / "bad plan.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(PlanMismatch, match=message) as caught:
        Plan.load(path)
    assert "bad plan.json" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_file_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("adaptive.policy._plan_file.MAX_FILE_BYTES", 10)
    (tmp_path / "plan.json").write_text(" " * 11)
    with pytest.raises(PlanMismatch, match="at most 10 bytes"):
        Plan.load(tmp_path / "plan.json")


def test_a_missing_file_is_an_ordinary_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "none.json")
