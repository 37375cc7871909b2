"""What calibration measured travels beside a plan, and is read only as what the plan says."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from adaptive.errors import PlanMismatch
from adaptive.policy import Exact, ModelShape, Plan

SHAPE = ModelShape(model_type="llama", heads=(4,), kv_heads=(2,), head_dim=(64,))


@pytest.fixture
def saved(tmp_path):
    plan = Plan.make(SHAPE, [Exact()])
    scores = {"echo": torch.rand(1, 2), "importance": torch.rand(4)[::2]}
    object.__setattr__(plan, "scores", scores)
    plan.save(tmp_path / "plan.json")
    return plan, tmp_path / "plan.json"


def test_scores_come_back_bit_for_bit(saved):
    plan, path = saved
    loaded = Plan.load(path)
    assert loaded == plan
    assert loaded.scores.keys() == plan.scores.keys()
    for name, score in plan.scores.items():
        assert torch.equal(loaded.scores[name], score)
    assert json.loads(path.read_text())["scores"]["file"] == "plan.json.safetensors"


def test_a_plan_without_scores_has_one_file(tmp_path):
    Plan.make(SHAPE, [Exact()]).save(tmp_path / "plan.json")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert Plan.load(tmp_path / "plan.json").scores is None


def test_scores_are_no_part_of_equality(saved):
    plan, _ = saved
    assert plan == Plan.make(SHAPE, [Exact()])
    assert hash(plan) == hash(Plan.make(SHAPE, [Exact()]))


def test_missing_scores_are_an_ordinary_error(saved):
    _, path = saved
    path.with_name("plan.json.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        Plan.load(path)


def rewrite(path, **changes):
    values = json.loads(path.read_text())
    values["scores"].update(changes)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "../plan.json.safetensors"}, "scores.file must be a .safetensors file beside"),
        ({"file": "plan.json"}, "scores.file must be"),
        ({"file": 3}, "scores.file must be"),
        ({"bytes": 3}, "scores.bytes must be the size of plan.json.safetensors, [0-9]+, got 3"),
        ({"bytes": True}, "scores.bytes must be"),
        ({"tensors": {}}, "scores.tensors must be .*importance.*, got {}"),
        ({"tensors": {"echo": ["float32", 2, 1], "importance": ["float32", 2]}}, "scores.tensors"),
        ({"extra": 1}, "scores must not have the field 'extra'"),
    ],
)
def test_files_that_disagree_are_refused(saved, changes, message):
    rewrite(saved[1], **changes)
    with pytest.raises(PlanMismatch, match=message):
        Plan.load(saved[1])


def test_what_is_no_safetensors_is_refused(saved):
    _, path = saved
    beside = path.with_name("plan.json.safetensors")
    beside.write_bytes(b"\xff" * 100)
    rewrite(path, bytes=100)
    with pytest.raises(PlanMismatch, match=r"plan\.json\.safetensors must be safetensors"):
        Plan.load(path)


def test_too_many_bytes_are_not_read(saved, monkeypatch):
    monkeypatch.setattr("adaptive.policy._plan_file.MAX_SCORES_BYTES", 10)
    with pytest.raises(PlanMismatch, match=r"scores\.bytes must be"):
        Plan.load(saved[1])


def test_without_safetensors_the_error_names_it(saved, tmp_path, monkeypatch):
    plan, path = saved
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for use in (lambda: plan.save(tmp_path / "other.json"), lambda: Plan.load(path)):
        with pytest.raises(ImportError, match=r"adaptive: .* need the package safetensors: pip"):
            use()
    assert not (tmp_path / "other.json").exists()
    replace(plan, scores=None).save(tmp_path / "other.json")
    assert Plan.load(tmp_path / "other.json") == plan
