"""Laws of continuous depth-wise batching: every prompt gives what it gives alone."""

import pytest
import torch
from zoo_models import VOCAB, build, draw, prompts

from adaptive.zoo import depth_run, generate_many

LENGTHS = [3, 30, 8, 21, 14, 2, 1, 17]
LIMITS = [9, 1, 14, 5, 12, 2, 16, 7]
FORMS = [
    {"router": "expert", "kv": "recursion", "capacities": (0.7, 0.6, 0.3)},
    {"router": "expert", "kv": "shared"},
    {"router": "token", "kv": "recursion"},
    {"router": "token", "kv": "shared", "first_layers": 0, "last_layers": 0},
    {"router": None, "kv": "recursion"},
]


@pytest.fixture(scope="module", params=FORMS, ids=lambda f: f"{f['router']}-{f['kv']}")
def model(request):
    return build("recursive", **request.param)


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("schedule", ["depth", "token"])
@pytest.mark.parametrize("batch_size", [3, 20])
def test_every_prompt_gives_what_it_gives_alone(model, schedule, batch_size):
    rows = prompts(LENGTHS)
    alone = [model.generate([row], limit)[0] for row, limit in zip(rows, LIMITS, strict=True)]
    found = generate_many(model, rows, LIMITS, batch_size=batch_size, schedule=schedule)
    assert same(found, alone)
    report = model.report()
    assert report.rows == len(rows)
    assert report.new_tokens == sum(LIMITS)
    assert sum(report.depths) == sum(LIMITS) - len(rows)  # the last token of a row is not run
    turns = sum(depth * count for depth, count in enumerate(report.depths))
    slots = min(batch_size, len(rows))
    assert report.occupancy == pytest.approx(turns / report.passes / slots)
    assert report.passes >= turns / slots


def test_passes_are_fuller_when_rows_need_not_wait():
    model = build("recursive", router="token")
    rows = prompts(LENGTHS * 3)
    found = {}
    for schedule in ("depth", "token"):
        generate_many(model, rows, 12, batch_size=4, schedule=schedule)
        found[schedule] = model.report()
    assert found["depth"].depths == found["token"].depths
    assert found["depth"].passes < 0.9 * found["token"].passes
    assert found["depth"].occupancy > found["token"].occupancy / 0.9


def test_rows_are_at_different_recursions_in_one_pass(monkeypatch):
    model = build("recursive", router="token")
    seen = []
    block = depth_run.Slots._block

    def watched(self, rows, x, turn):
        seen.append(turn.tolist())
        return block(self, rows, x, turn)

    monkeypatch.setattr(depth_run.Slots, "_block", watched)
    generate_many(model, prompts(LENGTHS), 8, batch_size=4)
    mixed = sum(len(set(turns)) > 1 for turns in seen)
    assert mixed > len(seen) / 3
    seen.clear()
    generate_many(model, prompts(LENGTHS), 8, batch_size=4, schedule="token")
    assert all(len(set(turns)) == 1 for turns in seen)


def test_a_token_that_ends_a_row_makes_room(model):
    rows = prompts(LENGTHS)
    free = [model.generate([row], 16)[0] for row in rows]
    eos = int(torch.cat(free).bincount(minlength=VOCAB).argmax())
    found = generate_many(model, rows, 16, batch_size=2, eos_token_id=eos)
    ends = set()
    for tokens, whole in zip(found, free, strict=True):
        hits = (whole == eos).nonzero()
        end = int(hits[0]) + 1 if len(hits) else 16
        ends.add(end)
        assert torch.equal(tokens, whole[:end])
    assert len(ends) > 2


@pytest.mark.parametrize("schedule", ["depth", "token"])
def test_draws_are_those_of_generate(schedule):
    model = build("recursive", router="token")
    rows = prompts(LENGTHS)

    def options():
        generator = torch.Generator().manual_seed(5)
        return {"do_sample": True, "temperature": 0.7, "generator": generator}

    expected = model.generate(rows, 8, **options())
    assert not same(expected, model.generate(rows, 8))
    found = generate_many(model, rows, 8, batch_size=3, schedule=schedule, **options())
    assert same(found, expected)


def test_prompts_that_run_a_few_at_a_time_are_the_same(model, monkeypatch):
    rows = prompts(LENGTHS)
    expected = generate_many(model, rows, 4, batch_size=8)
    monkeypatch.setattr(depth_run, "PREFILL_POSITIONS", 60)
    assert same(generate_many(model, rows, 4, batch_size=8), expected)


def test_kv_bytes_are_those_of_the_slots_at_their_fullest():
    model = build("recursive", router=None)
    generate_many(model, draw(6, 10), 5, batch_size=2)
    report = model.report()
    assert report.kv_entries == 14
    assert report.kv_bytes == 2 * 14 * model.kv_bytes_per_token


def test_a_failure_in_the_middle_leaves_nothing_behind(monkeypatch):
    model = build("recursive")
    rows = prompts(LENGTHS)
    expected = generate_many(model, rows, 6, batch_size=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calls = iter(range(1000))
    advance = depth_run.Slots.advance

    def interrupted(self):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(depth_run.Slots, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_many(model, rows, 6, batch_size=3)
    monkeypatch.undo()
    assert same(generate_many(model, rows, 6, batch_size=3), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("ids", "changes", "error", "message"),
    [
        (
            [[1]],
            {"batch_size": 0},
            ValueError,
            "batch_size must be a whole number from 1 on, got 0",
        ),
        ([[1]], {"schedule": "rows"}, ValueError, "schedule must be one of .*, got 'rows'"),
        (
            [[1], [2]],
            {"max_new_tokens": [3]},
            ValueError,
            "one number for each of 2 prompts, got 1",
        ),
        ([[1], [2]], {"max_new_tokens": [3, 0]}, ValueError, "max_new_tokens must be a whole num"),
        ([], {}, ValueError, "ids must have at least one row, got none"),
        ([[1, VOCAB]], {}, IndexError, r"ids\[0\] must be in \[0, 61\), got 61"),
        ([[1]], {"temperature": 0.0}, ValueError, "temperature must be above 0"),
        ([[1]], {"kv_dtype": torch.float64}, TypeError, "kv_dtype must be one of"),
    ],
)
def test_bad_input_is_named(ids, changes, error, message):
    options = {"max_new_tokens": 4, "batch_size": 2, **changes}
    most = options.pop("max_new_tokens")
    with pytest.raises(error, match="adaptive::zoo: .*" + message):
        generate_many(build("recursive"), ids, most, **options)


def test_a_model_without_recursions_is_named():
    with pytest.raises(TypeError, match="model must be a RecursiveTransformer"):
        generate_many(build("vanilla"), [[1]], 4, batch_size=2)
