"""Skip sets in files and fields: the round trip, and every flaw named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive.policy import ModelShape, Plan, Policy, SelfSpeculative

LAYERS = st.sets(st.integers(0, 30), min_size=1).map(sorted)


def shape(layers, windows=None):
    return ModelShape(
        model_type="llama",
        heads=(4,) * layers,
        kv_heads=(2,) * layers,
        head_dim=(32,) * layers,
        **({"windows": windows} if windows else {}),
    )


@given(LAYERS, LAYERS, st.none() | st.integers(1, 15))
def test_sets_make_the_round_trip(tmp_path_factory, attention, mlp, draft):
    path = tmp_path_factory.mktemp("sets") / "sets.json"
    policy = SelfSpeculative(skip=(attention, mlp), draft=draft)
    policy.to_json(path)
    assert SelfSpeculative.from_json(str(path), draft=draft) == policy
    assert json.loads(path.read_text()) == {"attention": attention, "mlp": mlp}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "sets.json: must be JSON"),
        ("[]", "sets.json: must be an object, got list"),
        ('{"attention": [1], "mlp": [], "tree": 1}', "fields 'attention' and 'mlp' alone, .*tree"),
        ('{"attention": [1]}', "mlp must be a list of layers, got None"),
        ('{"attention": 1, "mlp": []}', "attention must be a list of layers, got 1"),
        ('{"attention": [1], "attention": [2], "mlp": []}', "'attention' is named twice"),
        ('{"attention": [2, 1], "mlp": []}', "skip must be two lists of ascending"),
        ('{"attention": [true], "mlp": []}', "skip must be two lists of ascending"),
        ('{"attention": [], "mlp": []}', "skip must name a layer"),
    ],
)
def test_flaws_of_files_are_named(tmp_path, text, words):
    path = tmp_path / "sets.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        SelfSpeculative.from_json(path)


def test_a_missing_file_and_layers_that_the_model_has_not(tmp_path):
    with pytest.raises(FileNotFoundError):
        SelfSpeculative.from_json(tmp_path / "none.json")
    path = tmp_path / "sets.json"
    path.write_text('{"attention": [3], "mlp": [9]}')
    with pytest.raises(ValueError, match="skip must name layers below the model's 6, got 9"):
        Plan.make(shape(6), [SelfSpeculative.from_json(path)])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"skip": "find"}, "skip must be two lists .* or 'search', got 'find'"),
        ({"skip": "search", "skip_ratio": 0.0}, "skip_ratio must be above 0 and below 1"),
        ({"skip": "search", "skip_ratio": 1.0}, "skip_ratio must be above 0 and below 1"),
        ({"skip": "search", "skip_ratio": "half"}, "skip_ratio must be above 0 and below 1"),
        ({"skip": ((1,), ()), "skip_ratio": 0.4}, 'skip_ratio must be None without skip="search"'),
        ({"skip": "search", "tree": True}, "tree must be False .* drafts of a chain, got True"),
    ],
)
def test_wrong_fields_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        SelfSpeculative(**fields)


def test_a_search_is_a_policy_like_any():
    policy = SelfSpeculative(skip="search", skip_ratio=0.4, draft=3)
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    assert str(policy) == "SelfSpeculative(skip='search', draft=3, skip_ratio=0.4)"
    with pytest.raises(ValueError, match="skip must be two lists to be written, got 'search'"):
        policy.to_json("sets.json")


def test_first_and_last_layers_and_the_attention_of_masks_stay():
    search = SelfSpeculative(skip="search")
    assert search.candidates(Plan.make(shape(5), [search])) == ((1, 2, 3), (1, 2, 3))
    windowed = Plan.make(shape(5, (None, 8, 8, None, 8)), [search])
    assert search.candidates(windowed) == ((2, 3), (1, 2, 3))
    for attention in search.candidates(windowed)[0]:
        Plan.make(windowed.shape, [SelfSpeculative(skip=((attention,), ()))])
