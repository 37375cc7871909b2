"""Rows that have ended make place for the next prompt; each prompt gets what it gets alone."""

import copy
import functools

import pytest
import torch
from early_exit_cases import FILLS, SOME, model_of
from hypothesis import given, settings
from hypothesis import strategies as st
from models import greedy
from refill_cases import LENGTHS, prompt_of, same, together
from transformers import StoppingCriteria

import adaptive
from adaptive.layers import hf_refill, hf_sliding
from adaptive.policy import BlockSparsePrefill

NEW = (4, 12, 9, 1, 2)
ALONE = {**SOME, "rows": "alone", "audit": None}
CASES = ["llama", "gpt2", "mistral_window", "gemma3", "mixtral"]


def policies_of(kv):
    return [] if kv is None else [adaptive.EarlyExit(**ALONE, kv=kv)]


@functools.cache
def alone(case, length, new, kv=None):
    """What a prompt gets by itself, and where it leaves the model."""
    with adaptive.patch(model_of(case), *policies_of(kv)) as patched:
        made = greedy(model_of(case), prompt_of(length)[None], new)[0]
        exits = patched.report().exits
    return made, None if exits is None else exits.row_exits[0]


def many(case, lengths=LENGTHS, new=NEW, kv=None, **options):
    """What they get together, and the report."""
    return together(model_of(case), policies_of(kv), lengths, new, **options)


@pytest.mark.parametrize(
    ("case", "kv", "batch_size"),
    [
        *((case, None, 2) for case in CASES),
        *(("llama", kv, 3) for kv in FILLS),
        *(("mistral_window", kv, 3) for kv in FILLS),
        ("llama", None, 1),
        ("llama", None, 50),
    ],
)
def test_each_prompt_gets_what_it_gets_alone(case, kv, batch_size):
    wanted = [alone(case, length, new, kv) for length, new in zip(LENGTHS, NEW, strict=True)]
    made, report = many(case, kv=kv, batch_size=batch_size)
    same(made, [each for each, _ in wanted])
    if kv is not None:
        assert report.exits.row_exits == [exits for _, exits in wanted]


@settings(max_examples=5)
@given(
    st.lists(st.tuples(st.sampled_from(LENGTHS), st.sampled_from(NEW)), max_size=7),
    st.integers(1, 4),
    st.sampled_from(["llama", "mistral_window"]),
    st.sampled_from([None, "copy"]),
)
def test_any_order_of_any_prompts(prompts, batch_size, case, kv):
    lengths, new = [each[0] for each in prompts], [each[1] for each in prompts]
    made, _ = many(case, lengths, new, kv, batch_size=batch_size)
    same(made, [alone(case, *each, kv)[0] for each in prompts])


@pytest.mark.parametrize("kv", [None, "deferred"])
def test_stop_tokens_end_a_prompt_wherever_they_come(kv):
    free = [alone("llama", length, 12, kv)[0] for length in LENGTHS]
    stops = [int(free[0][LENGTHS[0]]), int(free[1][LENGTHS[1] + 5])]
    wanted = []
    for length, tokens in zip(LENGTHS, free, strict=True):
        ends = torch.isin(tokens[length:], torch.tensor(stops)).nonzero()
        wanted.append(tokens[: length + int(ends[0]) + 1] if len(ends) else tokens)
    assert len(wanted[0]) == LENGTHS[0] + 1  # at its first token, when there is no row of it yet
    assert {len(each) - n for each, n in zip(wanted, LENGTHS, strict=True)} > {1, 12}
    made, _ = many("llama", new=12, kv=kv, batch_size=2, eos_token_id=stops)
    same(made, wanted)


def test_stop_tokens_and_length_come_from_the_generation_config():
    model = copy.deepcopy(model_of("llama"))
    free, _ = alone("llama", 17, 12)
    model.generation_config.eos_token_id = int(free[17 + 4])
    model.generation_config.max_new_tokens = 7
    with adaptive.patch(model) as patched:
        made = patched.generate_many([prompt_of(17), prompt_of(3).tolist()])
        wanted = [model.generate(prompt_of(n)[None])[0] for n in (17, 3)]
    same(made, wanted)
    assert len(made[0]) <= 17 + 5
    assert len(made[1]) <= 3 + 7


def test_processors_and_criteria_see_their_own_prompt():
    class Even(StoppingCriteria):
        """Ends after a fourth even token, wherever the prompt ends."""

        def __call__(self, input_ids, scores, **_):
            return (input_ids % 2 == 0).sum(1) >= 4 + (prompt_of(17) % 2 == 0).sum()

    options = {
        "repetition_penalty": 3.0,
        "min_new_tokens": 4,
        "eos_token_id": list(range(2, 60)),
        "stopping_criteria": [Even()],
    }
    made, _ = many("llama", new=20, batch_size=3, **options)
    with adaptive.patch(model_of("llama")):
        wanted = [greedy(model_of("llama"), prompt_of(n)[None], 20, **options)[0] for n in LENGTHS]
    same(made, wanted)
    assert len({len(each) - n for each, n in zip(made, LENGTHS, strict=True)}) > 2


def test_drawn_tokens_have_the_distribution_of_the_model():
    model, prompt, rows = model_of("llama"), prompt_of(8), 150
    options = {"do_sample": True, "temperature": 2.0, "top_k": 3, "eos_token_id": None}
    torch.manual_seed(1)
    with adaptive.patch(model) as patched:
        made = patched.generate_many([prompt] * rows, batch_size=75, max_new_tokens=2, **options)
    made = torch.stack(made)[:, -1]
    torch.manual_seed(2)
    stock = model.generate(
        prompt[None].repeat(rows, 1), max_new_tokens=2, pad_token_id=0, **options
    )
    counts = [torch.bincount(each, minlength=128).double() for each in (made, stock[:, -1])]
    often = counts[0] + counts[1] >= 10
    statistic = ((counts[0] - counts[1]) ** 2 / (counts[0] + counts[1]))[often].sum()
    degrees = int(often.sum()) - 1
    assert degrees > 3
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations


def test_block_sparse_prompts_go_along():
    policy = BlockSparsePrefill(block=16, budget=2, min_context=64, recent=0, dense_tail=16)
    model = model_of("llama")
    prompts = [prompt_of(length) for length in (100, 5, 80)]
    with adaptive.patch(model, policy) as patched:
        wanted = [greedy(model, prompt[None], 6)[0] for prompt in prompts]
        same(patched.generate_many(prompts, batch_size=2, max_new_tokens=6), wanted)


def test_the_log_counts_rows_and_refills():
    _, report = many("llama", (8, 3, 17), (4, 2, 2), batch_size=2)
    log = report.refill
    assert (log.calls, log.prompts, log.prompt_tokens, log.tokens) == (1, 3, 28, 8)
    # Passes of rows 0 and 1, of 0 and 2 in the place of 1, and of 0 alone.
    assert (log.steps, log.rows, log.places, log.refills) == (3, 5, 6, 1)
    assert log.busy_share == pytest.approx(5 / 6)
    assert str(report).count("1 refills") == 1
    assert report.to_dict()["refill"]["mean_rows"] == pytest.approx(5 / 3)


def test_passes_have_unfinished_rows_alone():
    seen = []
    model = model_of("llama")
    hook = model.model.layers[0].mlp.register_forward_hook(
        lambda _, args, __: seen.append(tuple(args[0].shape[:2]))
    )
    many("llama", (8, 3, 17), (4, 2, 2), batch_size=2)
    hook.remove()
    assert seen == [(3, 17), (2, 1), (2, 1), (1, 1)]


def test_long_prompts_are_read_alone_and_short_ones_together(monkeypatch):
    monkeypatch.setattr(hf_refill, "READ_AT_ONCE", 40)
    seen, lengths = [], (8, 17, 40, 1, 8, 3)
    model = model_of("llama")
    hook = model.model.layers[0].mlp.register_forward_hook(
        lambda _, args, __: seen.append(tuple(args[0].shape[:2]))
    )
    made, _ = many("llama", lengths, 4, batch_size=2)
    hook.remove()
    assert [shape for shape in seen if shape[1] > 1] == [(2, 17), (1, 40), (3, 8)]
    same(made, [alone("llama", length, 4)[0] for length in lengths])


@pytest.mark.parametrize("case", ["llama", "mistral_window"])
def test_slots_that_no_row_uses_are_given_back(case, monkeypatch):
    slots, step = [], hf_refill.Refill._step

    def watched(self):
        assert len({layer.get_seq_length() for layer in self._layers()}) == 1
        slots.append((self.passes.slots, max(self.rows.held())))
        step(self)

    monkeypatch.setattr(hf_refill.Refill, "_step", watched)
    lengths = (60, 3, 3, 8, 3, 40, 8, 3, 3, 17, 3)
    many(case, lengths, 6, batch_size=2)
    assert slots[0][0] == 60
    assert slots[-1][0] < 30
    for held, needed in slots:
        assert needed <= held < needed + 16 + held / 8


@pytest.mark.parametrize("kv", [None, "copy"])
def test_windows_hold_no_more_than_they_need(kv, monkeypatch):
    held, step = [], hf_refill.Refill._step

    def watched(self):
        held.append(max(layer.store.length for layer in self._layers()))
        step(self)

    monkeypatch.setattr(hf_refill.Refill, "_step", watched)
    monkeypatch.setattr(hf_sliding, "slack", lambda _: 4)
    many("mistral_window", (40, 3, 17), 24, kv, batch_size=2)
    assert max(held) <= 7 + 4 + 1


def test_nothing_runs_for_no_prompt():
    made, report = many("llama", (), None)
    assert made == []
    assert report.refill is None
    assert report.forward_calls == 0


def test_results_are_handed_over_as_they_end():
    order, made = [], {}
    many(
        "llama", (8, 3, 17), (9, 2, 3), batch_size=2, on_result=lambda i, ids: made.update({i: ids})
    )
    many("llama", (8, 3, 17), (9, 2, 3), batch_size=2, on_result=lambda i, _: order.append(i))
    assert order == [1, 2, 0]
    same(
        [made[i] for i in range(3)],
        [alone("llama", *each)[0] for each in zip((8, 3, 17), (9, 2, 3), strict=True)],
    )


@pytest.mark.parametrize("kv", [None, "deferred"])
def test_who_gets_a_result_may_generate(kv):
    model, lengths, inner = model_of("llama"), (8, 3, 17, 40), []

    def again(index, _):
        inner.append(greedy(model, prompt_of(lengths[index])[None], 9)[0])

    made, _ = many("llama", lengths, 9, kv, batch_size=2, on_result=again)
    wanted = [alone("llama", length, 9, kv)[0] for length in lengths]
    same(made, wanted)
    same(sorted(inner, key=len), sorted(wanted, key=len))
