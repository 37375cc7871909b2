"""Exits that ask the head themselves decide as those that have the model write its logits."""

import pytest
import torch
from early_exit_cases import TOKENS, exited, model_of, never
from models import greedy, make, padded, token_ids

import adaptive
from adaptive.layers import exit_head
from adaptive.layers.exit_head import ExitHead, Outlook, Watch, measure

THRESHOLDS = {
    "confidence": (0.06, 0.0142),
    "margin": (0.013, 0.0009),
    "entropy": (4.44, 4.8285),
    "cosine": (0.6, 0.72),
    "agreement": (None, None),
}
"""Of llama and of the others: near the middle of what their exits say."""


def judged(criterion, case, rows):
    """A policy under which some tokens leave and some stay."""
    threshold = THRESHOLDS[criterion][case != "llama"]
    fields = {"layers": (1, 2, 3), "criterion": criterion, "threshold": threshold}
    return {**fields, "rows": rows, "audit": 3}


@pytest.fixture
def asked(monkeypatch):
    """What is asked of heads at exits: the kernel, or logits."""
    found = []
    kernel, logits = exit_head.exit_confidence, ExitHead.logits

    def note(*args):
        found.append("kernel")
        return kernel(*args)

    def note_logits(self, hidden):
        found.append("logits")
        return logits(self, hidden)

    monkeypatch.setattr(exit_head, "exit_confidence", note)
    monkeypatch.setattr(ExitHead, "logits", note_logits)
    return found


@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("criterion", THRESHOLDS)
@pytest.mark.parametrize("rows", ["together", "alone"])
def test_the_same_exits_and_tokens(case, criterion, rows, monkeypatch, asked):
    model, inputs = model_of(case), padded(batch=3)
    policy = judged(criterion, case, rows)
    made, log = exited(model, inputs, policy=policy)
    assert asked
    assert set(asked) == {"kernel"}
    assert rows == "together" or len(log.exits) > 1  # some left and some stayed
    monkeypatch.setattr(Watch, "exit_head", lambda *_: None)
    asked.clear()
    want, plain = exited(model, inputs, policy=policy)
    assert not asked
    assert torch.equal(made, want)
    assert log.row_exits == plain.row_exits
    assert log.agreed == plain.agreed


@pytest.mark.parametrize("rows", ["together", "alone"])
def test_a_cosine_asks_no_head_where_nothing_leaves(rows, asked):
    exited(model_of("llama"), token_ids(2), policy=never(criterion="cosine", rows=rows))
    assert asked == []


def test_who_looks_at_logits_gets_them(asked):
    policy = {"layers": (2,), "threshold": 0.0, "audit": None}
    made, _ = exited(model_of("llama"), token_ids(1), policy=policy)
    assert asked == ["kernel"] * (TOKENS - 1)
    asked.clear()
    options = {"repetition_penalty": 1.0000001}
    same, _ = exited(model_of("llama"), token_ids(1), policy=policy, **options)
    assert asked == ["logits"] * (TOKENS - 1)
    assert torch.equal(same, made)


def test_more_rows_than_the_kernel_takes_are_asked_for_logits(asked):
    policy = {"layers": (2,), "threshold": 0.0, "audit": None}
    many, _ = exited(model_of("llama"), token_ids(17), 4, policy=policy)
    assert asked == ["logits"] * 3
    one, _ = exited(model_of("llama"), token_ids(17)[:16], 4, policy=policy)
    assert torch.equal(many[:16], one)


def test_a_model_that_does_more_with_its_logits_runs_its_own_forward(asked, monkeypatch):
    model = make("llama", num_hidden_layers=4)
    forward = type(model).forward

    def shifted(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits[..., 7] += 40.0
        return out

    monkeypatch.setattr(type(model), "forward", shifted)
    made, _ = exited(model, token_ids(1), policy={"layers": (2,), "threshold": 0.0})
    assert (made[0, 20:] == 7).all()
    assert asked == []


def test_a_head_that_someone_watches_is_left_to_the_model(asked):
    model, seen = make("llama", num_hidden_layers=4), []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    exited(model, token_ids(1), policy={"layers": (2,), "threshold": 0.0, "audit": None})
    assert len(seen) == TOKENS
    assert asked == []


@pytest.mark.parametrize("raises", [False, True])
def test_no_hook_stays(raises, monkeypatch):
    model = make("llama", num_hidden_layers=4)
    modules = (model.model, model.lm_head)
    with adaptive.patch(model, adaptive.EarlyExit(layers=(2,), threshold=0.0)):
        before = [len(module._forward_hooks) for module in modules]
        if raises:
            monkeypatch.setattr(model.model.norm, "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                greedy(model, token_ids(1), 4)
        else:
            greedy(model, token_ids(1), 4)
        assert [len(module._forward_hooks) for module in modules] == before


@pytest.mark.parametrize("criterion", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_the_kernel_says_what_logits_do(criterion, softcap):
    rng = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(64, 300).requires_grad_(False)
    hidden = torch.randn(3, 64, generator=rng) * 4
    asking = ExitHead(
        head, ((lambda x: torch.tanh(x / 5) * 5) if softcap else (lambda x: x), 1, softcap)
    )
    asking.summarises = True
    said, written = Outlook(hidden, asking), Outlook(asking.logits(hidden))
    assert said.summary is not None
    torch.testing.assert_close(said.sure(criterion), written.sure(criterion))
    assert torch.equal(said.best, written.best)
    assert torch.equal(written.sure(criterion), measure(criterion, written.logits))


@pytest.mark.parametrize("rows", ["together", "alone"])
def test_prompts_that_take_the_place_of_others_ask_it_too(rows, asked):
    model, prompts = model_of("llama"), [token_ids(1)[0], token_ids(1)[0, :5], token_ids(1)[0, :3]]
    given = {"batch_size": 2, "max_new_tokens": 6}
    policy = judged("confidence", "llama", rows)
    with adaptive.patch(model, adaptive.EarlyExit(**policy)) as patched:
        made = patched.generate_many(prompts, **given)
        assert set(asked) == {"kernel"}
        asked.clear()
        same = patched.generate_many(prompts, repetition_penalty=1.0000001, **given)
        assert "kernel" not in asked
        assert all(torch.equal(*each) for each in zip(made, same, strict=True))
    asked.clear()
    with adaptive.patch(
        model, adaptive.EarlyExit(**never(criterion="cosine", rows=rows))
    ) as patched:
        patched.generate_many(prompts, **given)
    assert asked == []
