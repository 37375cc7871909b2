"""Early exit emits what the first layers make, where they are sure, and skips the others' work."""

import copy
import threading

import pytest
import torch
from early_exit_cases import FILLS, SOME, TOKENS, exited, model_of, never, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGS, PAD, greedy, padded, token_ids
from speculation_cases import LAYERS, drafting
from transformers import LogitsProcessor, TextIteratorStreamer

import adaptive


class Seen(LogitsProcessor):
    """Keeps the logits that tokens are chosen from."""

    def __init__(self):
        self.logits = []

    def __call__(self, input_ids, scores):
        self.logits.append(scores.clone())
        return scores


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("criterion", ["confidence", "margin", "cosine"])
def test_above_one_nothing_leaves_and_the_bits_are_the_models(case, criterion):
    model = model_of(case)
    for inputs in (token_ids(batch=1), padded(batch=3)):
        want, got = Seen(), Seen()
        made = plain(model, inputs, 6, logits_processor=[want])
        policy = never(criterion=criterion)
        ours, log = exited(model, inputs, 6, policy=policy, logits_processor=[got])
        assert torch.equal(ours, made)
        assert all(torch.equal(a, b) for a, b in zip(want.logits, got.logits, strict=True))
        assert log.exits == {LAYERS: 5 * len(made)}
        assert log.skipped == 0


def reference(model, ids, exit_layer, tokens):
    """Greedy decoding from the first layers, each token with all of the sequence, no cache."""
    body = model.model
    first = model(ids).logits[:, -1].argmax(-1, keepdim=True)  # the prompt runs in full
    ids = torch.cat([ids, first], 1)
    while ids.shape[1] < tokens:
        hidden = body.embed_tokens(ids)
        places = torch.arange(ids.shape[1])[None]
        angles = body.rotary_emb(hidden, places)
        causal = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        for layer in body.layers[:exit_layer]:
            hidden = layer(hidden, attention_mask=causal, position_embeddings=angles)
        best = model.lm_head(body.norm(hidden[:, -1:])).argmax(-1)
        ids = torch.cat([ids, best], 1)
    return ids


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
@pytest.mark.parametrize("kv", FILLS)
@torch.no_grad()
def test_threshold_zero_is_the_first_layers_alone(exit_layer, kv):
    """Beyond the prompt deeper layers have no say, whatever their cache gets."""
    model = model_of("llama")
    want = reference(model, token_ids(2), exit_layer, 20 + TOKENS)
    policy = {"layers": (exit_layer,), "threshold": 0.0, "kv": kv, "audit": None}
    made, log = exited(model, token_ids(2), policy=policy)
    assert torch.equal(made, want)
    assert log.exits == {exit_layer: 2 * (TOKENS - 1)}
    assert not torch.equal(made, plain(model, token_ids(2))) or exit_layer > 2


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("kv", FILLS)
def test_every_family_leaves_early(case, kv):
    model = model_of(case)
    for inputs in (token_ids(batch=1), padded(batch=3)):
        for policy in ({**SOME, "layers": (2, 3)}, {"layers": (2,), "threshold": 0.0}):
            made, log = exited(model, inputs, policy={**policy, "kv": kv})
            assert made.shape == (len(made), 20 + TOKENS)
            assert log.tokens == TOKENS * len(made)
            assert sum(log.exits.values()) == log.tokens - len(made)
        assert set(log.exits) == {2}


@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("kv", FILLS)
@pytest.mark.parametrize("audit", [None, 4])
def test_the_report_says_what_ran(case, kv, audit):
    """Layers that ran are counted at their MLP, which a layer that is left out does not call."""
    model, calls = model_of(case), []
    layers = model.transformer.h if case == "gpt2" else model.model.layers
    hooks = [
        layer.mlp.register_forward_hook(lambda _, args, __, i=i: calls.append((i, args[0].shape)))
        for i, layer in enumerate(layers)
    ]
    _, log = exited(model, token_ids(1), 50, policy={**SOME, "kv": kv, "audit": audit})
    for hook in hooks:
        hook.remove()
    calls = calls[LAYERS:]  # the prompt's
    assert len(calls) == log.layer_passes
    assert log.skipped == 1 - len(calls) / (LAYERS * 49) > 0
    assert log.mean_depth == sum(n * ran for ran, n in log.exits.items()) / 49
    if kv != "deferred" and audit is None:
        for layer in range(LAYERS):
            passed = sum(n for ran, n in log.exits.items() if ran > layer)
            assert sum(index == layer for index, _ in calls) == passed
    assert max(shape[1] for _, shape in calls) <= 16
    assert (log.audited == log.exit_steps // 4 > 0) if audit else log.audited == 0


@pytest.mark.parametrize("kv", FILLS)
def test_audits_change_no_token(kv):
    model = model_of("llama")
    made = [
        exited(model, token_ids(1), 40, policy={**SOME, "kv": kv, "audit": audit})[0]
        for audit in (None, 1, 3)
    ]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize("kv", FILLS)
def test_audits_tell_right_from_wrong(kv):
    policy = {"layers": (2,), "threshold": 0.0, "kv": kv, "audit": 1}
    _, log = exited(drafting("llama", factor=0.0), token_ids(1), policy=policy)
    assert log.agreement == 1.0
    _, log = exited(drafting("llama", factor=30.0), token_ids(1), policy=policy)
    assert log.agreement < 0.9
    assert log.audited == TOKENS - 1


@settings(max_examples=30)
@given(
    layers=st.sets(st.integers(1, LAYERS - 1), min_size=1).map(sorted).map(tuple),
    threshold=st.sampled_from([0.0, 0.01, 0.03]),
    kv=st.sampled_from(FILLS),
    case=st.sampled_from(["llama", "gpt2", "mistral_window", "gemma3"]),
)
def test_like_rows_of_a_batch_make_what_one_makes(layers, threshold, kv, case):
    model = model_of(case)
    policy = {"layers": layers, "criterion": "margin", "threshold": threshold, "kv": kv}
    one, log = exited(model, token_ids(1), 14, policy=policy)
    three, logs = exited(model, token_ids(1).repeat(3, 1), 14, policy=policy)
    assert torch.equal(three, one.repeat(3, 1))
    assert logs.exits == {ran: 3 * n for ran, n in log.exits.items()}


def test_other_rows_can_only_make_a_row_leave_later():
    """All unfinished rows leave together; at threshold zero that changes nothing."""
    model, ids = model_of("llama"), token_ids(3)
    policy = {"layers": (2,), "threshold": 0.0}
    together, _ = exited(model, ids, policy=policy)
    for row in range(3):
        alone, _ = exited(model, ids[row : row + 1], policy=policy)
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("kv", FILLS)
def test_a_finished_row_does_not_keep_the_others(kv):
    model, inputs = model_of("llama"), padded(batch=3)
    policy = {"layers": (2,), "threshold": 0.0, "kv": kv}
    free = exited(model, inputs, policy=policy)[0]
    stop = int(free[1, 22])
    made, _ = exited(model, inputs, policy=policy, eos_token_id=stop)
    for row in range(3):
        end = (free[row, 20:] == stop).nonzero()
        length = 20 + TOKENS if not len(end) else 20 + int(end[0]) + 1
        assert torch.equal(made[row, :length], free[row, :length][: made.shape[1]])
        assert (made[row, length:] == PAD).all()


def test_agreement_needs_the_exits_to_agree():
    model = drafting("llama", quiet_from=1, factor=0.0)
    policy = {"layers": (1, 2, 3), "criterion": "agreement", "agree": 2}
    _, log = exited(model, token_ids(1), policy=policy)
    assert log.exits == {2: TOKENS - 1}
    _, log = exited(model, token_ids(1), policy={**policy, "agree": 3})
    assert log.exits == {3: TOKENS - 1}
    _, log = exited(drafting("llama", 1, 30.0), token_ids(1), policy=policy)
    assert LAYERS in log.exits


def test_cosine_is_of_the_last_layer_that_ran():
    model = drafting("llama", quiet_from=2, factor=0.0)
    policy = {"layers": (2, 3), "criterion": "cosine", "threshold": 0.9999}
    _, log = exited(model, token_ids(1), policy=policy)
    assert log.exits == {3: TOKENS - 1}


class Tokens:
    """Stands in for a tokenizer."""

    def decode(self, ids, **_):
        return "".join(f"{int(i)} " for i in ids)


def test_streaming_gives_every_token_once_and_in_order():
    model = model_of("llama")
    want = exited(model, token_ids(1), policy=SOME)[0][0, 20:].tolist()
    streamer = TextIteratorStreamer(Tokens(), skip_prompt=True, timeout=60)
    with adaptive.patch(model, adaptive.EarlyExit(**SOME)):
        options = {"streamer": streamer}
        run = threading.Thread(target=greedy, args=(model, token_ids(1), TOKENS), kwargs=options)
        run.start()
        text = "".join(streamer)
        run.join()
    assert [int(word) for word in text.split()] == want


def test_off_is_the_stock_model_and_unpatching_leaves_nothing():
    model = model_of("llama")
    stock, made = model(token_ids()).logits, greedy(model, token_ids())
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    patched = adaptive.patch(model, adaptive.EarlyExit(layers=(2,), threshold=0.0))
    with patched.disabled():
        assert torch.equal(model(token_ids()).logits, stock)
        assert torch.equal(greedy(model, token_ids()), made)
        assert patched.report().exits.calls == 0
    assert torch.allclose(model(token_ids()).logits, stock, atol=1e-4)  # forward runs in full
    greedy(model, token_ids())
    assert "100% after 2 of 4 layers" in str(patched.report())
    assert patched.report().to_dict()["exits"]["exits"] == {"2": 14}
    patched.reset_stats()
    assert patched.report().exits.steps == 0
    patched.unpatch()
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before


def test_a_copy_exits_with_its_own_weights():
    model = drafting("llama")
    adaptive.patch(model, adaptive.EarlyExit(**SOME))
    want = greedy(model, token_ids(1))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(greedy(copied, token_ids(1)), want)
    assert adaptive.patched(copied).report().exits.calls == 2
    assert adaptive.patched(model).report().exits.calls == 1
    adaptive.patched(copied).unpatch()


@pytest.mark.parametrize("kv", FILLS)
def test_sampling_draws_from_the_exits_distribution(kv):
    model, policy = model_of("llama"), {"layers": (2,), "threshold": 0.0, "kv": kv}
    want, _ = exited(model, token_ids(1), policy=policy)
    options = {"do_sample": True, "top_k": 1, "max_new_tokens": TOKENS, "pad_token_id": PAD}
    with adaptive.patch(model, adaptive.EarlyExit(**policy)):
        assert torch.equal(model.generate(token_ids(1), **options), want)
        torch.manual_seed(3)
        drawn = [model.generate(token_ids(1), **{**options, "top_k": 0}) for _ in range(2)]
        assert not torch.equal(*drawn)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "EarlyExit: num_beams=2"),
        ({"use_cache": False}, "EarlyExit: it needs use_cache=True"),
        ({"prompt_lookup_num_tokens": 3}, "EarlyExit: prompt_lookup_num_tokens"),
        ({"synced_gpus": True}, "EarlyExit: synced_gpus=True"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(options, words):
    model = model_of("llama")
    with (
        adaptive.patch(model, adaptive.EarlyExit(**SOME)),
        pytest.raises((NotImplementedError, ValueError), match=words),
    ):
        greedy(model, token_ids(1), **options)
