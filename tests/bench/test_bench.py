"""The benchmarks themselves: they refuse what is wrong and count right."""

import itertools
import json
import time
from types import SimpleNamespace

import pytest
import torch

import adaptive
from adaptive import _native
from adaptive.ops import OPS
from bench import ops, record, stock
from bench.machine import facts, read_bandwidth
from bench.overhead import call_overhead
from bench.timing import (
    Timing,
    WrongResultError,
    cache_flusher,
    interleave,
    prove,
    relative_error,
    speedup,
)


def test_a_wrong_variant_is_refused_by_name_and_never_timed():
    truth = torch.ones(4)
    with pytest.raises(WrongResultError, match=r"'off' must be at most 0.01 .* got 0.5"):
        prove({"right": lambda: truth, "off": lambda: truth * 1.5}, truth, 0.01)


def test_nan_is_wrong_and_so_is_another_shape():
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
    with pytest.raises(WrongResultError, match="shape"):
        relative_error(torch.ones(3), torch.ones(2))


def test_error_is_relative_to_the_largest_true_value():
    assert relative_error(torch.tensor([1.0, 4.4]), torch.tensor([1.0, 4.0])) == pytest.approx(0.1)


@pytest.mark.skipif(_native.best_cpu_level() != "avx512_bf16", reason="this CPU has no such level")
@pytest.mark.parametrize("name", sorted(set(OPS) - set(ops.OWN_LEVELS["avx512_bf16"])))
def test_ops_without_kernels_of_a_level_are_those_of_the_one_below(name):
    def made(level, sizes):
        adaptive.set_cpu_level(level)
        arguments = OPS[name].make_inputs(**sizes, dtype=torch.bfloat16, device="cpu", seed=3)
        outs = OPS[name](*arguments)
        return outs if isinstance(outs, tuple) else (outs,)

    try:
        for sizes in OPS[name].edges:
            for own, below in zip(made("avx512_bf16", sizes), made("avx512", sizes), strict=True):
                torch.testing.assert_close(own, below, rtol=0, atol=0, equal_nan=True)
    finally:
        adaptive.set_cpu_level(None)


def test_a_wrong_op_is_noted_as_a_failure_and_the_others_are_measured(tmp_path, monkeypatch):
    sizes = {"batch": 1, "heads": 4, "kv_heads": 2, "capacity": 64, "head_dim": 32}
    wrong = stock.Suite(forms={"folded": stock.decode_folded}, truth=lambda q, *_: q.double() + 9)
    right = stock.Suite(forms={"folded": stock.decode_folded}, truth=stock.decode_truth)
    op = OPS["decode_attention"]
    todo = [ops.Cell(op, suite, sizes, "float32") for suite in (wrong, right)]
    monkeypatch.setattr(ops, "cells", lambda _: todo)
    monkeypatch.setattr(ops, "read_bandwidth", lambda _: 10.0)
    monkeypatch.setattr(ops, "call_overhead", dict)
    out = tmp_path / "ops.json"
    monkeypatch.setattr(
        "sys.argv", ["ops", "--threads", "1", "--budget-s", "0", "--json", str(out)]
    )
    assert ops.main() == 1
    document = record.load(out)
    assert len(document["rows"]) == 1
    assert "must be at most" in document["failures"][0]["error"]
    row = document["rows"][0]
    assert row["best_stock"] == "folded"
    assert row["ratio_to_best_stock"]["folded"] == 1.0
    assert all(v["error"] < 1e-4 for v in row["variants"].values())
    native = {name for name, v in row["variants"].items() if v["kind"] == "native"}
    assert "adaptive baseline" in native


def test_speedup_pairs_rounds_and_ignores_those_without_a_partner():
    slow = Timing({0: 10.0, 1: 40.0, 2: 30.0, 3: 1000.0}, clean=4, dropped=0)
    fast = Timing({0: 5.0, 1: 10.0, 2: 10.0, 7: 1.0}, clean=4, dropped=0)
    assert speedup(slow, fast) == 3.0  # of 2, 4 and 3
    assert speedup(slow, Timing({9: 20.0}, clean=1, dropped=0)) == 35.0 / 20.0


def test_one_thread_is_measured_in_cpu_time_so_waiting_costs_nothing():
    timing = interleave({"sleep": lambda: time.sleep(0.02)}, threads=1, repetitions=3)["sleep"]
    assert timing.median_us < 5_000
    assert (timing.clean, timing.dropped) == (3, 0)


def test_several_threads_are_measured_in_wall_time():
    timing = interleave({"sleep": lambda: time.sleep(0.02)}, threads=2, repetitions=3)["sleep"]
    assert timing.minimum_us > 19_000


def preempted_every_second_time():
    """Readings before and after each repetition, for getrusage."""
    for repetition in itertools.count():
        yield repetition // 2
        yield repetition // 2 + repetition % 2


@pytest.mark.parametrize(("repetitions", "clean", "dropped", "used"), [(4, 4, 3, 4), (2, 2, 0, 3)])
def test_preempted_repetitions_are_dropped_where_enough_are_clean(
    monkeypatch, repetitions, clean, dropped, used
):
    readings = preempted_every_second_time()
    usage = lambda _: SimpleNamespace(ru_nivcsw=next(readings))  # noqa: E731
    monkeypatch.setattr("bench.timing.resource.getrusage", usage)
    timing = interleave({"a": lambda: None}, threads=2, repetitions=repetitions)["a"]
    assert (timing.clean, timing.dropped, len(timing.rounds)) == (clean, dropped, used)


def test_a_slow_variant_leaves_early_and_a_fast_one_gets_its_repetitions():
    timings = interleave(
        {"slow": lambda: time.sleep(0.05), "fast": lambda: None},
        threads=2,
        repetitions=50,
        at_least=2,
        budget_s=0.1,
    )
    assert len(timings["slow"].rounds) == 2
    assert timings["fast"].clean + timings["fast"].dropped > 2


def test_repetitions_are_limited_even_when_none_is_clean(monkeypatch):
    readings = itertools.count()
    usage = lambda _: SimpleNamespace(ru_nivcsw=next(readings))  # noqa: E731
    monkeypatch.setattr("bench.timing.resource.getrusage", usage)
    timing = interleave({"a": lambda: None}, threads=2, repetitions=3, at_most=5)["a"]
    assert (timing.clean, timing.dropped, len(timing.rounds)) == (0, 0, 5)


def test_before_runs_before_every_repetition_and_outside_the_clock():
    flushed = []

    def flush():
        flushed.append(1)
        time.sleep(0.01)

    timing = interleave({"a": lambda: None}, threads=2, repetitions=3, before=flush)["a"]
    assert len(flushed) >= 3
    assert timing.minimum_us < 5_000
    cache_flusher(1 << 16)()


def test_facts_name_no_host_user_or_path():
    import getpass
    import platform

    text = json.dumps(facts())
    assert platform.node() not in text.split('"')
    assert "/root" not in text
    assert "/home" not in text
    assert getpass.getuser() not in text.split('"')
    assert facts()["versions"]["torch"] == torch.__version__


def test_read_bandwidth_is_of_this_world_and_leaves_the_threads_alone():
    before = torch.get_num_threads()
    assert 0.5 < read_bandwidth(1, size_bytes=1 << 22, repetitions=3) < 1000
    assert torch.get_num_threads() == before


def test_call_overhead_covers_every_op_and_grows_with_the_layers_called_through():
    found = call_overhead(calls=50, rounds=3)
    assert found.keys() == OPS.keys()
    for costs in found.values():
        assert {"empty", "smallest"} <= costs.keys()
        for cost in costs.values():
            assert 0 < cost["empty function"] < cost["op"]


def test_every_op_has_something_to_measure_and_a_truth_that_its_reference_meets():
    options = ops.arguments().parse_args([])
    assert {cell.op.name for cell in ops.cells(options)} == OPS.keys()
    for op in OPS.values():
        small = {"batch": 2, "heads": 8, "kv_heads": 2, "capacity": 70, "head_dim": 32}
        small |= {"chosen": 20, "budget": 20, "rows": 3, "in_features": 64, "out_features": 50}
        small |= {"tokens": 128, "window": 20, "block_size": 64, "width": 64}
        small |= {"nodes": 7, "tree": False, "vocab": 50, "group": 32, "neurons": 90}
        small |= {"norm": True, "function": "softmax", "weighted": True, "removed": 13}
        whole = stock.suite_for(op)
        for suite in (whole, *whole.others):
            assert_measurable(op, suite, small)


def assert_measurable(op, suite, small):
    sizes = {name: small[name] for name in (suite.sweep or op.models)[0]}
    arguments = op.make_inputs(**sizes, dtype=torch.float32, device="cpu")
    if suite.place is not None:
        arguments = suite.place(*arguments)
    truth = suite.truth(*arguments)
    assert suite.moved(arguments, truth) > 0
    assert truth.dtype == torch.float64
    forms = {"reference": lambda op=op, s=suite, a=arguments: s.pick(op.reference(*a))}
    forms |= {n: lambda f=f, a=arguments: f(*a) for n, f in suite.forms.items()}
    copies = op.name == "gather_tokens"  # values come out as they went in
    rounds = suite.pick(op.reference(*arguments)).is_floating_point() and not copies
    assert (max(prove(forms, truth, 1e-4).values()) > 0) is rounds


def test_an_op_without_a_suite_is_measured_against_its_reference():
    class Plain:
        name = "plain"

        @staticmethod
        def reference(x):
            return x * 2, x.dtype

    suite = stock.suite_for(Plain())
    assert suite.truth(torch.ones(2)).dtype == torch.float64
    assert suite.forms["reference"](torch.ones(2)).tolist() == [2.0, 2.0]


def test_the_model_benchmark_runs_end_to_end_on_a_tiny_model(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from bench import models

    monkeypatch.setattr(models, "read_bandwidth", lambda _: 10.0)
    out = tmp_path / "models.json"
    options = ["--shape", "tiny", "--contexts", "96", "--memory-context", "0", "--threads", "1"]
    monkeypatch.setattr("sys.argv", ["models", *options, "--budget-s", "2", "--json", str(out)])
    assert models.main() == 0
    document = record.load(out)
    assert document["failures"] == []
    variants = document["rows"][0]["variants"]
    assert variants.keys() == {"stock default", "stock StaticCache", "patched"}
    assert all(v["error"] < 0.05 and v["steps_compared"] >= 4 for v in variants.values())
    assert {name: v["native_calls_per_step"] for name, v in variants.items()} == {
        "stock default": 0,
        "stock StaticCache": 0,
        "patched": 2,  # layers
    }
    assert document["rows"][0]["error_against"] == "float32"


def test_a_patched_model_that_computes_something_else_is_not_timed(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from bench import models

    real = models.step

    def off(model, cache, token, position, batch):
        logits = real(model, cache, token, position, batch)
        return logits.flip(0) if type(cache).__name__ == "StaticCache" else logits

    monkeypatch.setattr(models, "step", off)
    monkeypatch.setattr(models, "read_bandwidth", lambda _: 10.0)
    out = tmp_path / "models.json"
    options = ["--shape", "tiny", "--contexts", "64", "--memory-context", "0", "--no-truth"]
    monkeypatch.setattr(
        "sys.argv",
        [
            "models",
            *options,
            "--variants",
            "stock default",
            "stock StaticCache",
            "--json",
            str(out),
        ],
    )
    assert models.main() == 1
    document = record.load(out)
    assert document["rows"] == []
    assert "'stock StaticCache' must be at most" in document["failures"][0]["error"]
