"""The command line: what a user types, reads, and gets wrong."""

import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console

import adaptive
from adaptive import cli
from adaptive.cli import _bench, _check
from adaptive.demo import _memory, _run
from adaptive.demo._generate import Clock, answer, kv_bytes
from adaptive.demo._result import Point, Result, Variant

transformers = pytest.importorskip("transformers")


def run(capsys, *argv):
    """Exit code, stdout and stderr of one command in this process."""
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def tiny(**more):
    sizes = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
    }
    return transformers.LlamaConfig(**{**sizes, **more})


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "adaptive", "--help"], capture_output=True, text=True, check=True
    )
    assert "python -m adaptive demo" in done.stdout


@pytest.mark.parametrize("command", ["demo", "check", "bench"])
def test_help_teaches_by_example(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert "examples:" in out
    assert f"python -m adaptive {command}" in out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "required: command"),
        (["fly"], "invalid choice: 'fly'"),
        (["demo", "--depth", "2"], "must be a number from 0 to 1, got '2'"),
        (["demo", "--tokens", "0"], "must be a whole number of at least 1, got '0'"),
        (["demo", "--new-tokens", "1"], "--new-tokens must be at least 2"),
        (["demo", "--model", "no/such/folder"], "no/such/folder holds no model"),
        (["demo", "--new-tokens", "99999"], "--new-tokens must be at most 16184"),
        (["demo", "--out", __file__], "--out must be a folder to write the chart to, got"),
        (["check", "lama"], "did you mean llama"),
        (
            ["check", "/nowhere/model"],
            "/nowhere/model is not a folder; give one with a config.json",
        ),
        (["check", "t5"], "transformers has no causal language model of type 't5'"),
        (["check", "[/etc]"], "[/etc] is not a folder"),
        (["check", "org/model"], "is not a folder. Models are not downloaded here"),
        (["check", "bert", "--dtype", "float8"], "invalid choice: 'float8'"),
    ],
)
def test_mistakes_end_with_2_and_a_hint(capsys, argv, says):
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert says in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""


def test_check_finds_a_supported_type(capsys):
    code, out, _ = run(capsys, "check", "llama")
    assert code == 0
    assert "can be patched" in out


def test_check_as_json_is_json_alone(capsys):
    code, out, _ = run(capsys, "check", "llama", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["ok"] is True
    assert answer["problems"] == []


def test_check_says_why_not_with_1(capsys):
    code, out, _ = run(capsys, "check", "bloom", "--json")
    answer = json.loads(out)
    assert code == 1
    assert answer["ok"] is False
    assert "AttentionInterface" in " ".join(answer["problems"])


def test_check_reads_a_folder_without_weights(capsys, tmp_path):
    tiny(head_dim=20).save_pretrained(tmp_path)
    code, out, _ = run(capsys, "check", str(tmp_path), "--json")
    assert code == 1
    assert "head size 20" in " ".join(json.loads(out)["problems"])


def test_check_of_a_large_model_costs_no_memory():
    """Llama's default configuration has 27 GB of weights."""
    outcome = _check.run("llama", "float32")
    resident = next(
        int(line.split()[1])
        for line in open("/proc/self/status")  # noqa: SIM115
        if line.startswith("VmRSS")
    )
    assert outcome.ok
    assert resident < 4 << 20  # KiB


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("not json", "config.json"),
        ("3", "config.json"),
        ('{"model_type": "no_such_type"}', "config.json"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
        ('{"model_type": "llama", "hidden_act": "no_such_one"}', "KeyError"),
    ],
)
def test_check_of_a_broken_folder_says_what_is_wrong(capsys, tmp_path, content, says):
    (tmp_path / "config.json").write_text(content)
    code, _, err = run(capsys, "check", str(tmp_path))
    assert code == 2
    assert says in "".join(err.split())


def test_check_of_an_empty_folder_says_what_is_missing(capsys, tmp_path):
    code, _, err = run(capsys, "check", str(tmp_path))
    assert code == 2
    assert "holds no config.json" in " ".join(err.split())


def test_bench_measures_and_reports_errors_beside_speed(capsys, monkeypatch):
    monkeypatch.setattr(_bench, "KV_TOKENS", (64,))
    monkeypatch.setattr(_bench, "CONTEXTS", (32,))
    monkeypatch.setattr(_bench, "NEW_TOKENS", 4)
    monkeypatch.setattr(_bench, "SECONDS", 0.0)
    code, out, _ = run(capsys, "bench", "--json")
    result = json.loads(out)
    assert code == 0
    (op,), (model,) = result["ops"], result["models"]
    assert 0 < op["native_us"] < op["gqa_stock_us"] * 1e3
    assert op["native_error"] <= 2 * op["stock_error"] + 1e-6
    assert model["token_agreement"] > 0.5
    code, out, _ = run(capsys, "bench")
    assert "best stock" in out


def test_an_answer_has_every_token_its_logits_and_its_time():
    model = transformers.LlamaForCausalLM(tiny()).eval()
    found = answer(model, list(range(3, 40)), 6)
    assert len(found.tokens) == 6
    assert found.logits.shape == (6, 300)
    assert len(found.step_s) == 5
    assert found.logits.argmax(-1).tolist() == found.tokens
    # keys and values of 2 layers, 1 head of 32 floats; the last token has none yet
    assert found.kv_tokens == 42
    assert found.kv_used_bytes == 2 * 2 * 42 * 32 * 4


def test_kv_bytes_of_a_layer_with_storage_of_its_own():
    class Layer:
        keys = values = torch.zeros(1, 1, 7, 8)

        def held_bytes(self):
            return 999

    class Cache:
        layers = (Layer(),)

        def get_seq_length(self):
            return 7

    assert kv_bytes(Cache()) == (2 * 7 * 8 * 4, 999, 7)


@pytest.mark.skipif(not _memory.available(), reason="needs /proc/self/clear_refs")
def test_memory_is_measured_in_a_process_of_its_own(tmp_path):
    """A cache of known size must show up in the peak, and little else."""
    config = tiny(num_key_value_heads=2, max_position_embeddings=4096)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    prompt = [5] * 3000
    cache_bytes = 2 * 2 * len(prompt) * 64 * 4
    peak = _memory.measure(tmp_path, "float32", 1, prompt, 4, patch=False)
    assert cache_bytes < peak < cache_bytes + (64 << 20)


def test_a_failing_measurement_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="the memory measurement failed"):
        _memory.measure(tmp_path, "float32", 1, [1, 2, 3], 4, patch=False)


def result(tmp_path):
    stock = Variant(4.0, 40.0, 4096.0, 2**25, 2**26, 3e-6, "12345.", True)
    patched = Variant(4.0, 10.0, 4096.0, 2**25, None, 1e-6, "[/b]! not markup", False)

    class Report:
        def to_dict(self):
            return {"layers": []}

        def __str__(self):
            return "layer 0 native"

    return Result(
        model="m",
        parameters=9_000_000,
        dtype="float32",
        threads=2,
        prompt_tokens=8000,
        new_tokens=64,
        key="12345",
        excerpt="The pass key is 12345.",
        variants={"stock": stock, "patched": patched},
        token_agreement=1.0,
        max_logit_difference=2e-6,
        points=[Point(1000, 9.0, 8.0), Point(8000, 40.0, 10.0)],
        report=Report(),
        out=tmp_path,
    )


@pytest.mark.parametrize(
    ("positions", "tokens", "lengths"),
    [(8192, None, [512, 1024, 2048, 4096]), (2048, None, [512, 1024]), (8192, 512, [])],
)
def test_the_demo_stays_within_the_reach_of_the_model(positions, tokens, lengths):
    options = _run.Options(tokens=tokens)
    document = _run._document_length(tiny(max_position_embeddings=positions), options)
    assert document == tokens or document == min(8000, positions - 64)
    assert _run._sweep(document) == lengths


def test_a_model_that_is_refused_ends_without_a_traceback(capsys, monkeypatch):
    def refuse(*args):
        raise adaptive.UnsupportedModel("adaptive: no; pip install 'adaptive[hf]'")

    monkeypatch.setattr(cli, "_run", refuse)
    code, _, err = run(capsys, "demo")
    assert code == 2
    assert "adaptive[hf]" in err


def test_the_demo_table_shows_speed_and_error(tmp_path):
    console = Console(width=110, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    result(tmp_path).show(console)
    text = console.export_text()
    assert "4.00x" in text  # 40 ms against 10 ms
    assert "64 of 64" in text
    assert "1.0e-06" in text
    assert "not measurable here" in text
    assert "[/b]! MISSED" in text
    assert "layer 0 native" in text


def test_the_demo_writes_a_chart_and_json(tmp_path):
    values = result(tmp_path).to_dict()
    json.dumps(values)
    assert values["variants"]["stock"]["token_ms"] == 40.0
    chart = tmp_path / "stock_against_patched.png"
    assert values["chart"] == str(chart)
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_interrupting_ends_without_a_traceback(capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(_check, "run", interrupt)
    code, _, err = run(capsys, "check", "llama")
    assert code == 130
    assert "interrupted" in err


def test_the_clock_takes_prompt_and_tokens():
    clock = Clock()
    for _ in range(3):
        clock.put(None)
    clock.end()
    assert len(clock.times) == 3
    assert clock.times == sorted(clock.times)
