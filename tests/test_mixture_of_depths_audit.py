"""Audits of routed decoders, and what is left of a pass that an exception ended in a layer."""

import contextlib
import dataclasses

import pytest
import torch
from models import greedy, padded, token_ids
from routed_models import ROUTED, deep, forward, in_pieces, parts, router, with_positions
from transformers import DynamicCache

import adaptive
from adaptive import MixtureOfDepths

SEQUENCE = {"unit": "attention", "decide": "sequence"}
FORMS = [SEQUENCE, {"unit": "mlp", "decide": "sequence"}, {"unit": "mlp"}, {}, {"kv": "kept"}]


def policy_of(model, fields, every=1):
    given = {"threshold": 0.5, "audit_every": every, **fields}
    return MixtureOfDepths(router=router(model, seed=1), **given)


def cosines(model, given, last, policy):
    """Cosines of the last hidden states of the last tokens, routed and not, without padding."""
    with torch.no_grad():
        full = model.model(**given).last_hidden_state[:, -last:]
        plain = dataclasses.replace(policy, audit_every=None)
        with adaptive.patch(model, plain):
            ours = model.model(**given).last_hidden_state[:, -last:]
    real = given["attention_mask"][:, -last:].bool()
    return torch.cosine_similarity(ours[real], full[real], dim=-1)


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_the_report_has_the_cosines_of_the_prompt(fields):
    model, given = deep("llama"), with_positions(padded(3))
    policy = policy_of(model, fields)
    wanted = cosines(model, given, 1000, policy)
    with adaptive.patch(model, policy) as patched:
        forward(model, given)
        log = patched.report().routing
    assert (log.audits, log.audited) == (1, int(given["attention_mask"].sum()))
    mean, least = log.agreement
    assert mean == pytest.approx(float(wanted.mean()), abs=1e-5)
    assert least == pytest.approx(float(wanted.min()), abs=1e-5)
    assert 0.0 < least < mean < 1.0
    assert f"{log.audited} tokens audited: cosine {mean:.4f}, at least {least:.4f}" in str(log)
    assert log.to_dict()["cosine_min"] == least


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_audits_change_nothing_and_count_nothing_else(fields):
    model, given = deep("llama"), padded(3)
    said, logs = [], []
    for every in (None, 1):
        with adaptive.patch(model, policy_of(model, fields, every)) as patched:
            said.append((forward(model, given), greedy(model, given, 12)))
            logs.append(patched.report())
    assert torch.equal(said[0][0], said[1][0])
    assert torch.equal(said[0][1], said[1][1])
    off, on = logs
    assert (off.routing.audits, off.routing.agreement) == (0, None)
    assert "none audited" in str(off.routing)
    assert on.routing.audits > 1
    assert on.routing.layers == off.routing.layers
    assert [x.query_tokens for x in on.layers] == [x.query_tokens for x in off.layers]
    assert [x.stock_calls for x in on.layers] == [x.stock_calls for x in off.layers]


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_a_step_is_compared_with_the_whole_sequence(fields):
    """By threshold a step is as its token in one pass; sequences follow an earlier decision."""
    model, given = deep("llama"), with_positions(padded(3, 24))
    policy = policy_of(model, fields)
    with adaptive.patch(model, policy) as patched:
        _, cache = in_pieces(model, given, [4, 12])
        # 12 tokens at once; then 8 of each row bring 24, and an audit of the whole takes 36.
        assert patched.report().routing.audits == 1
        patched.reset_stats()
        mask, ids, places = (
            given[name] for name in ("attention_mask", "input_ids", "position_ids")
        )
        with torch.no_grad():
            model(
                input_ids=ids[:, 12:13],
                attention_mask=mask[:, :13],
                position_ids=places[:, 12:13],
                past_key_values=cache,
            )
        log = patched.report().routing
    assert (log.audits, log.audited) == (1, int(mask[:, 12].sum()))
    if policy.decide == "token":
        first = {name: value[:, :13] for name, value in given.items()}
        assert log.agreement[0] == pytest.approx(
            float(cosines(model, first, 1, policy).mean()), abs=1e-5
        )


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_rows_of_padding_alone_are_neither_offered_nor_audited(fields):
    model, ids = deep("llama"), token_ids(3)
    mask = torch.ones_like(ids)
    mask[1] = 0
    policy = dataclasses.replace(policy_of(model, fields), threshold=0.0)
    with adaptive.patch(model, policy) as patched:
        forward(model, {"input_ids": ids, "attention_mask": mask})
        log = patched.report().routing
    many = 2 if policy.decide == "sequence" else 2 * ids.shape[1]
    assert {(layer.offered, layer.ran) for layer in log.layers.values()} == {(many, many)}
    assert log.audited == 2 * ids.shape[1]


def test_of_n_tokens_at_most_one_is_run_again():
    model = deep("llama")
    with adaptive.patch(model, policy_of(model, {}, 4)) as patched:
        for call, audits in enumerate([1, 1, 1, 1, 2, 2, 2, 2, 3]):
            forward(model, {"input_ids": token_ids(2, seed=call)})
            assert patched.report().routing.audits == audits
        patched.reset_stats()
        forward(model, {"input_ids": token_ids(2)})
        assert patched.report().routing.audits == 1


def test_beams_and_crops_reach_what_is_audited():
    """A step after them is audited as that of the cache that never was another."""
    model, found = deep("llama"), []
    policy = policy_of(model, {})
    ids = token_ids(3, 12)
    rows = torch.tensor([2, 0, 0])
    with adaptive.patch(model, policy) as patched, torch.no_grad():
        for moved in (True, False):
            if moved:
                cache = model(ids, use_cache=True).past_key_values
                cache.crop(-4)
                cache.reorder_cache(rows)
            else:
                cache = model(ids[rows, :8], use_cache=True).past_key_values
            patched.reset_stats()
            model(ids[:, 8:9], past_key_values=cache)
            found.append(patched.report().routing.agreement)
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_steps_whose_sequence_is_not_known_are_noted():
    model = deep("llama")
    policy = policy_of(model, {})
    embedded = model.get_input_embeddings()(token_ids(2))
    with adaptive.patch(model, policy) as patched, torch.no_grad():
        cache = model(inputs_embeds=embedded, use_cache=True).past_key_values
        assert patched.report().routing.audits == 1
        patched.reset_stats()
        model(token_ids(2, 1), past_key_values=cache)
        report = patched.report()
    assert report.routing.audits == 0
    assert report.notes == {"step not audited: what its sequence was made of is not known": 1}


@contextlib.contextmanager
def broken(module):
    """The module raises after it ran."""

    def fail(*_):
        raise ZeroDivisionError

    hook = module.register_forward_hook(fail)
    try:
        yield
    finally:
        hook.remove()


INSIDE = {"attention": ["self_attn.o_proj"], "mlp": ["mlp.down_proj"]}
INSIDE["block"] = [*INSIDE["attention"], *INSIDE["mlp"]]


@pytest.mark.parametrize("fields", [SEQUENCE, FORMS[1], {**SEQUENCE, "unit": "block"}, *FORMS[3:]])
def test_an_exception_in_a_routed_layer_leaves_nothing(fields):
    model, ids = deep("llama"), token_ids(4, 24)
    policy = policy_of(model, fields, None)
    layer = parts(model, "block")[0][ROUTED[0]]
    with adaptive.patch(model, policy), torch.no_grad():
        for past in (16, 0):
            for inside in INSIDE[policy.unit]:
                _fails_once(model, ids, past, layer.get_submodule(inside))


def _fails_once(model, ids, past, culprit):
    def begun():
        cache = DynamicCache(config=model.config)
        if past:
            model(ids[:, :past], past_key_values=cache)
        return cache

    def go_on(cache):
        return [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((past, 20), (20, 21))]

    wanted = go_on(begun())
    cache = begun()
    held = [layer.used_bytes() for layer in cache.layers if past]
    with broken(culprit), pytest.raises(ZeroDivisionError):
        model(ids[:, past:20], past_key_values=cache)
    with pytest.raises(ValueError, match=f"got {past} in layer 2 and 20 before it: an exception"):
        model(ids[:, past:20], past_key_values=cache)
    for layer in cache.layers:
        if layer.get_seq_length() > past:
            layer.crop(past - layer.get_seq_length())
    assert [layer.used_bytes() for layer in cache.layers if past] == held
    assert all(torch.equal(*pair) for pair in zip(go_on(cache), wanted, strict=True))
