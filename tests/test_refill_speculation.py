"""Rows that draft, accept as many as are right each, and make place for the next prompt."""

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import greedy
from refill_cases import LENGTHS, prompt_of, same, together
from speculation_cases import FORMS, check_drawn_pairs, drafting, model_of
from transformers import StoppingCriteria

import adaptive
from adaptive.layers import hf_refill
from adaptive.layers.hf_cache import AdaptiveCacheLayer

NEW = (4, 12, 9, 1, 20)
EACH = [*FORMS, {"exit_layer": 2}]


@functools.cache
def alone(case, length, new):
    """What a prompt gets by itself, without drafts."""
    with adaptive.patch(model_of(case)):
        return greedy(model_of(case), prompt_of(length)[None], new)[0]


def many(model, lengths, new, policy, **options):
    """What they get together, with drafts, and the report."""
    return together(model, [adaptive.SelfSpeculative(**policy)], lengths, new, **options)


@pytest.mark.parametrize(
    ("case", "policy", "batch_size"),
    [
        *(("llama", policy, 3) for policy in EACH),
        ("llama", FORMS[0], 1),
        ("llama", FORMS[0], 50),
        ("gpt2", FORMS[2], 2),
        ("mistral_window", FORMS[0], 3),
        ("gemma3", {"exit_layer": 2}, 3),
        ("mistral_window", FORMS[2], 3),
        ("gemma3", FORMS[3], 2),
    ],
    ids=str,
)
def test_each_prompt_gets_what_plain_decoding_gives_it(case, policy, batch_size):
    made, report = many(model_of(case), LENGTHS, NEW, policy, batch_size=batch_size)
    same(made, [alone(case, *each) for each in zip(LENGTHS, NEW, strict=True)])
    speculation, refill = report.speculation, report.refill
    assert speculation.calls == refill.calls == 1
    assert speculation.tokens == refill.tokens == sum(NEW)
    assert speculation.steps + speculation.plain_steps == refill.steps
    assert speculation.drafted > 0
    assert refill.refills == max(len(LENGTHS) - 1 - batch_size, 0)  # one ends at its first token


@settings(max_examples=5)
@given(
    prompts=st.lists(st.tuples(st.sampled_from(LENGTHS), st.sampled_from(NEW)), max_size=7),
    batch_size=st.integers(1, 4),
    case=st.sampled_from(["llama", "mistral_window"]),
    exit_layer=st.integers(1, 3),
    draft=st.none() | st.integers(1, 15),
)
def test_any_order_of_any_prompts(prompts, batch_size, case, exit_layer, draft):
    lengths, new = [each[0] for each in prompts], [each[1] for each in prompts]
    policy = {"exit_layer": exit_layer, "draft": draft}
    made, _ = many(model_of(case), lengths, new, policy, batch_size=batch_size)
    same(made, [alone(case, *each) for each in prompts])


@pytest.mark.parametrize("policy", [{"exit_layer": 2, "draft": 15}, {"tree": True}], ids=str)
def test_a_stop_token_inside_of_a_draft_ends_a_row(policy):
    free = [alone("llama", length, 16) for length in LENGTHS]
    stops = [int(free[0][LENGTHS[0]]), int(free[1][LENGTHS[1] + 5]), int(free[4][LENGTHS[4] + 3])]
    wanted = []
    for length, tokens in zip(LENGTHS, free, strict=True):
        ends = torch.isin(tokens[length:], torch.tensor(stops)).nonzero()
        wanted.append(tokens[: length + int(ends[0]) + 1] if len(ends) else tokens)
    assert len({len(each) - n for each, n in zip(wanted, LENGTHS, strict=True)}) > 2
    made, _ = many(model_of("llama"), LENGTHS, 16, policy, batch_size=2, eos_token_id=stops)
    same(made, wanted)


@pytest.mark.parametrize("policy", [FORMS[0], FORMS[1], FORMS[3]], ids=str)
def test_drafts_beyond_the_last_token_have_positions_that_the_model_has(policy):
    """A long prompt ends with the table of positions, while another one drafts further."""
    model = drafting("gpt2", n_positions=42)
    with adaptive.patch(model):
        wanted = [greedy(model, prompt_of(n)[None], new)[0] for n, new in ((40, 2), (3, 30))]
    made, _ = many(model, (40, 3), [2, 30], {**policy, "draft": 9}, batch_size=2)
    same(made, wanted)


@pytest.mark.parametrize("least", [1, 16])
def test_gaps_are_closed_when_they_are_many(least, monkeypatch):
    slots, packed, step = [], [], hf_refill.Refill._step
    pack = hf_refill.Refill._pack

    def watched(self):
        held = self.rows.held()
        assert self.passes.held(0).sum(1).tolist() == held
        assert {layer.get_seq_length() for layer in self._layers()} == {self.passes.slots}
        slots.append((self.passes.slots, max(held)))
        step(self)

    monkeypatch.setattr(hf_refill, "UNUSED_LEAST", least)
    monkeypatch.setattr(hf_refill.Refill, "_step", watched)
    monkeypatch.setattr(hf_refill.Refill, "_pack", lambda *given: (packed.append(1), pack(*given)))
    lengths = (60, 3, 8, 17, 3)
    policy = {"exit_layer": 2, "draft": 8}
    made, report = many(model_of("llama"), lengths, 40, policy, batch_size=3)
    same(made, [alone("llama", length, 40) for length in lengths])
    assert len(packed) > 1
    assert report.refill.shifts >= len(packed)
    for held, needed in slots:
        assert needed <= held < needed + least + held / 8


def test_packing_keeps_the_tokens_of_each_row():
    layer = AdaptiveCacheLayer()
    keys, values = torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 8)
    index = torch.tensor([[0, 2, 5], [1, 3, 4]])
    with torch.no_grad():
        layer.update(keys, values)
        layer.pack(index)
    assert layer.get_seq_length() == 3
    for row, places in enumerate(index):
        assert torch.equal(layer.keys[row], keys[row][:, places])
        assert torch.equal(layer.values[row], values[row][:, places])


def test_rows_accept_different_numbers_of_drafts():
    """Each row goes at its own pace: as many checks as it would need alone."""
    policy, lengths = {"exit_layer": 2, "draft": 4}, (17, 8, 3)
    steps = [many(model_of("llama"), (n,), 24, policy)[1].refill.steps for n in lengths]
    assert len(set(steps)) > 1
    _, report = many(model_of("llama"), lengths, 24, policy, batch_size=3)
    assert report.refill.steps <= max(steps) + 1  # drafts stop where the longest row's end is near
    assert report.refill.rows <= sum(steps) + 3


def test_processors_and_criteria_see_their_own_prompt_and_drafts():
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
    with adaptive.patch(model_of("llama")):
        wanted = [greedy(model_of("llama"), prompt_of(n)[None], 20, **options)[0] for n in LENGTHS]
    assert len({len(each) - n for each, n in zip(wanted, LENGTHS, strict=True)}) > 2
    for policy in (FORMS[0], FORMS[3]):
        same(many(model_of("llama"), LENGTHS, 20, policy, batch_size=3, **options)[0], wanted)


def test_drawn_tokens_have_the_distribution_of_the_model():
    def generate(model, prompt, rows, **options):
        with adaptive.patch(model, adaptive.SelfSpeculative(**FORMS[0])) as patched:
            made = patched.generate_many([prompt] * rows, batch_size=rows // 2, **options)
            log = patched.report()
        assert log.refill.refills == rows - rows // 2
        assert 0.01 < log.speculation.acceptance < 0.999
        return torch.stack(made)

    check_drawn_pairs(generate, tokens=4, rows=800)


def test_what_was_learned_stays_with_the_patch():
    model = model_of("llama")
    prompts = [prompt_of(length) for length in LENGTHS]
    with adaptive.patch(model, adaptive.SelfSpeculative(exit_layer=2)) as patched:
        greedy(model, prompts[1][None].repeat(2, 1), 12)
        known = copy.deepcopy(patched._record.draft_sizes)
        assert known.keys() == {2}
        patched.generate_many(prompts, batch_size=2, max_new_tokens=12)
        learned = patched._record.draft_sizes
        assert learned.keys() == {2, 1}  # the last row alone goes on from what two rows taught
        assert learned[2].verify.weight > known[2].verify.weight
        assert learned[1].trials != [0.0] * 8
        assert learned[2].together == 1  # each row for itself
    with adaptive.patch(model, adaptive.SelfSpeculative(tree=True)) as patched:
        patched.generate_many(prompts[:1], max_new_tokens=1)
        table = patched._record.successors._table
        assert all(
            int(b) in table[int(a)] for a, b in zip(prompts[0], prompts[0][1:], strict=False)
        )


def test_a_draft_head_of_8_bits_goes_along():
    policy = {"exit_layer": 2, "draft": 4, "draft_head": "int8"}
    made, report = many(model_of("llama"), LENGTHS, NEW, policy, batch_size=2)
    same(made, [alone("llama", *each) for each in zip(LENGTHS, NEW, strict=True)])
    assert report.speculation.draft_head_bytes > 0
    assert "accepted" in str(report)
    assert "refills" in str(report)


@pytest.mark.parametrize("policy", [FORMS[0], FORMS[2]], ids=str)
def test_who_gets_a_result_may_generate(policy):
    model, lengths, inner = model_of("llama"), (8, 3, 17, 40), []

    def again(index, _):
        ids = prompt_of(lengths[index])[None].repeat(2, 1)
        inner.append(greedy(model, ids, 9)[0])

    made, _ = many(model, lengths, 9, policy, batch_size=2, on_result=again)
    wanted = [alone("llama", length, 9) for length in lengths]
    same(made, wanted)
    same(sorted(inner, key=len), sorted(wanted, key=len))


@pytest.mark.parametrize("policy", [FORMS[0], FORMS[2], FORMS[3]], ids=str)
@pytest.mark.parametrize("at", [3, 9])
def test_ctrl_c_inside_of_a_layer_leaves_nothing(policy, at):
    model = drafting("llama")
    calls, config = [], model.config.to_dict()
    prompts = [prompt_of(length) for length in LENGTHS]
    with adaptive.patch(model, adaptive.SelfSpeculative(**policy)) as patched:

        def interrupt(*_):
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt

        hook = model.model.layers[1].mlp.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            patched.generate_many(prompts, batch_size=2, max_new_tokens=12)
        hook.remove()
        assert not patched._record.depth.active
        assert patched._record.depth.owner is None
        made = patched.generate_many(prompts, batch_size=2, max_new_tokens=12)
    assert model.config.to_dict() == config
    same(made, [alone("llama", length, 12) for length in LENGTHS])
