"""Lists of retrieval heads from other projects: read, and every flaw named with its place."""

import json

import pytest

from adaptive.policy import RazorAttention

GATES = "0.9\t0.1\n0.2\t0.8\n0.7\t0.3\n"
CONFIG = '{"sink_size": 64, "recent_size": 256}'


@pytest.fixture
def duo(tmp_path):
    (tmp_path / "full_attention_heads.tsv").write_text(GATES)
    (tmp_path / "config.json").write_text(CONFIG)
    return tmp_path


def test_duo_patterns(duo):
    policy = RazorAttention.from_duo(duo)
    assert policy.heads == ((0, 0), (1, 1), (2, 0))
    assert (policy.sinks, policy.window, policy.dense_layers) == (64, 256, ())
    assert (policy.of_layers, policy.of_heads) == (3, 2)
    assert RazorAttention.from_duo(str(duo)) == policy


@pytest.mark.parametrize(
    ("sparsity", "kept"),
    [(0, 6), (0.25, 4), (0.5, 3), (0.75, 2), (1, 0), (1.0, 0)],
)
def test_sparsity_is_the_share_of_heads_that_keep_a_window(duo, sparsity, kept):
    assert len(RazorAttention.from_duo(duo, sparsity).heads) == kept


def test_equal_gates_keep_earlier_heads(duo):
    (duo / "full_attention_heads.tsv").write_text("1\t1\n1\t1\n")
    assert RazorAttention.from_duo(duo).heads == ((0, 0), (0, 1))


def test_fields_can_be_set(duo):
    policy = RazorAttention.from_duo(duo, sinks=8, dense_layers=(0,))
    assert (policy.sinks, policy.window, policy.dense_layers) == (8, 256, (0,))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("full_attention_heads.tsv", "", "full_attention_heads.tsv: must have a line for each"),
        ("full_attention_heads.tsv", "1\t2\n1\n", "tsv, line 2: must have 2 numbers .* got 1"),
        ("full_attention_heads.tsv", "1\t2\n1\tx\n", "tsv, line 2: must hold numbers, got 'x'"),
        ("full_attention_heads.tsv", "1\t2\n\nnan\t1\n", "tsv, line 3: .* got 'nan'"),
        ("config.json", "{", "config.json: must be JSON"),
        ("config.json", "[]", "config.json: must be an object, got list"),
        ("config.json", '{"sink_size": 4}', "recent_size must be a whole .* from 1 on, got None"),
        ("config.json", '{"sink_size": true, "recent_size": 1}', "sink_size must .* got True"),
    ],
)
def test_flaws_of_duo_patterns_are_named(duo, name, text, message):
    (duo / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        RazorAttention.from_duo(duo)


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, True, "half", float("nan")])
def test_sparsity_is_checked(duo, sparsity):
    with pytest.raises(ValueError, match="sparsity must be a number from 0 to 1"):
        RazorAttention.from_duo(duo, sparsity)


def test_missing_files_are_ordinary_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="full_attention_heads"):
        RazorAttention.from_duo(tmp_path)
    with pytest.raises(FileNotFoundError):
        RazorAttention.from_json(tmp_path / "none.json")


def test_json_head_lists(tmp_path):
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"0": [], "2": [3, 1], "1": [0]}))
    policy = RazorAttention.from_json(path, window=64)
    assert policy.heads == ((1, 0), (2, 1), (2, 3))
    assert (policy.of_layers, policy.of_heads, policy.window) == (3, None, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be JSON"),
        ("[[0, 1]]", "must be an object, got list"),
        ('{"0": [1], "2": [0]}', "layer 1 is missing; a layer without .* is an empty list"),
        ("{}", "layer 0 is missing"),
        ('{"0": [0], "0": [1]}', "'0' is named twice"),
        ('{"a": []}', "keys must be layer numbers, got 'a'"),
        ('{"-1": []}', "got '-1'"),
        ('{"00": []}', "got '00'"),
        ('{"0": 3}', "layer 0 must be a list, got 3"),
        ('{"0": [], "1": [-1]}', "layer 1 must hold KV heads from 0 on, each once, got -1"),
        ('{"0": [1, 1]}', "layer 0 must hold .* each once, got 1"),
        ('{"0": [true]}', "layer 0 must hold .* got True"),
        ("[" * 100_000, "must be JSON"),
    ],
)
def test_flaws_of_head_lists_are_named(tmp_path, text, message):
    path = tmp_path / "heads.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        RazorAttention.from_json(path)
    assert "heads.json" in str(caught.value)


def test_a_file_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("adaptive.policy._head_files.MAX_FILE_BYTES", 10)
    path = tmp_path / "heads.json"
    path.write_text(" " * 11)
    with pytest.raises(ValueError, match="must be at most 10 bytes"):
        RazorAttention.from_json(path)
