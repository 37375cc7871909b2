"""Early exit of encoders: who leaves where, that no others are computed, no other effect."""

import copy
import json

import pytest
import torch
import transformers
from encoder_exits import (
    DEPTH,
    cosines,
    cut,
    deep,
    given_for,
    histogram,
    layers_of,
    one_row,
    real,
    splitting,
)
from encoder_models import OLD, SUPPORTED, inputs, run

import adaptive
from adaptive.adapters import family_for

NEEDS_5 = pytest.mark.skipif(OLD, reason="text encoders do not use the interface before 5")


@pytest.mark.parametrize("case", SUPPORTED)
def test_families_know_their_layers(case):
    """Each is called once per pass, in order, and holds the attention of the same number."""
    model, family = deep(case), family_for(deep(case))
    names, called = family.layer_names(model), []
    for index, name in enumerate(names):
        model.get_submodule(name).register_forward_hook(lambda *_, i=index: called.append(i))
    run(model, given_for(case))
    assert called == list(range(DEPTH))
    for name, attention in zip(names, family.attention_names(model), strict=True):
        assert attention.startswith(f"{name}.")


@pytest.mark.parametrize("case", SUPPORTED)
def test_a_threshold_above_one_is_the_model_bit_for_bit(case):
    model, given = deep(case), given_for(case)
    stock = run(model, given)
    with adaptive.patch(model):
        exact = run(model, given)
    with adaptive.patch(model, adaptive.EncoderExit(threshold=1.01)) as patched:
        assert torch.equal(run(model, given), exact)
        log = patched.report().encoder_exit
        assert (log.depths, log.skipped_share) == ({DEPTH: 4}, 0.0)
    assert torch.equal(run(model, given), stock)


@pytest.mark.parametrize("depth", [1, 3, DEPTH])
@pytest.mark.parametrize("case", SUPPORTED)
def test_a_fixed_exit_is_the_model_with_fewer_layers(case, depth):
    model, given = deep(case), given_for(case)
    wanted = run(cut(model, depth), given)
    with adaptive.patch(model, adaptive.EncoderExit(layer=depth)) as patched:
        ours = run(model, given)
        assert patched.report().encoder_exit.depths == {depth: 4}
    error = (real(ours, given) - real(wanted, given)).abs().max()
    assert error <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("case", SUPPORTED)
def test_each_sequence_leaves_where_it_would_alone(case):
    model, given = deep(case), given_for(case)
    threshold, depths = splitting(cosines(model, given))
    with adaptive.patch(model, adaptive.EncoderExit(threshold=threshold)) as patched:
        together = run(model, given)
        assert patched.report().encoder_exit.depths == histogram(depths)
        patched.reset_stats()
        for row, depth in enumerate(depths):
            alone = run(model, one_row(given, row))
            assert patched.report().encoder_exit.depths == {depth: 1}
            patched.reset_stats()
            mask = given.get("attention_mask")
            ours = together[row : row + 1]
            if mask is not None and ours.dim() == 3:
                ours = ours[:, mask[row].bool()]
            assert (ours - alone).abs().max() <= 2e-5 * alone.abs().max()
            short = run(cut(model, depth), one_row(given, row))
            assert (short - alone).abs().max() <= 2e-5 * alone.abs().max()


@pytest.mark.parametrize("layers", [(1, 3), (3,)])
def test_exits_need_not_follow_each_other(layers):
    model, given = deep("vit"), given_for("vit", batch=8)
    found = cosines(model, given)
    for depth in {1, 2, 3} - set(layers):
        found[depth - 1] = [-1.0] * 8
    threshold = sorted(found[2])[4]
    depths = [
        next((d for d in layers if found[d - 1][row] >= threshold - 1e-6), DEPTH)
        for row in range(8)
    ]
    assert len(set(depths)) > 1
    policy = adaptive.EncoderExit(threshold=threshold - 1e-6, layers=layers)
    with adaptive.patch(model, policy) as patched:
        run(model, given)
        assert patched.report().encoder_exit.depths == histogram(depths)


@pytest.mark.parametrize("case", SUPPORTED)
def test_reported_rows_are_those_that_were_computed(case):
    model, given = deep(case), given_for(case)
    threshold, depths = splitting(cosines(model, given))
    rows = []
    for name in family_for(model).attention_names(model):
        model.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, out: rows.append(
                len(args[0] if args else kwargs["hidden_states"])
            ),
            with_kwargs=True,
        )
    policy = adaptive.EncoderExit(threshold=threshold, audit_every=None)
    with adaptive.patch(model, policy) as patched:
        run(model, given)
        log = patched.report().encoder_exit
    assert sum(rows) == log.layer_rows == sum(depths)
    assert rows == [sum(d > layer for d in depths) for layer in range(max(depths))]
    assert log.skipped_share == pytest.approx(1 - sum(depths) / (DEPTH * len(depths)))
    assert log.audits == 0


@NEEDS_5
@pytest.mark.parametrize("pool", ["mean", "first"])
@pytest.mark.parametrize("case", ["bert", "modernbert"])
def test_padding_does_not_matter(case, pool):
    model = deep(case)
    right, left = given_for(case, side="right"), given_for(case, side="left")
    for row in range(4):  # the same tokens, padded on the other side
        for name in left:
            left[name][row] = right[name][row].roll(7 * row)
    threshold, depths = splitting(cosines(model, right, pool))
    outputs = []
    policy = adaptive.EncoderExit(threshold=threshold, pool=pool, layers=(1, 2, 3))
    for side in (right, left):
        if side is left and case == "bert":  # its positions count from the first column
            side["position_ids"] = (side["attention_mask"].cumsum(1) - 1).clamp(min=0)
        for padding in (0, 77):
            other = {**side, "input_ids": side["input_ids"].clone()}
            other["input_ids"][side["attention_mask"] == 0] = padding
            with adaptive.patch(model, policy) as patched:
                outputs.append(real(run(model, other), side))
                assert patched.report().encoder_exit.depths == histogram(depths)
        assert torch.equal(outputs[-1], outputs[-2])
    assert (outputs[0] - outputs[-1]).abs().max() <= 2e-5 * outputs[0].abs().max()


@NEEDS_5
@pytest.mark.parametrize("case", ["bert", "modernbert", "vit", "dinov3_vit"])
def test_a_batch_of_as_many_rows_as_tokens(case):
    """No table of positions, and no mask for all, is taken for something of each row."""
    model = deep(case)
    tokens = 64 if case.startswith(("vit", "dino")) else 17
    given = inputs(case, batch=tokens, tokens=tokens)
    threshold, depths = splitting(cosines(model, given))
    with adaptive.patch(model, adaptive.EncoderExit(threshold=threshold)) as patched:
        ours = run(model, given)
        assert patched.report().encoder_exit.depths == histogram(depths)
    for depth in set(depths):
        rows = torch.tensor([d == depth for d in depths])
        wanted = run(cut(model, depth), given)[rows]
        assert (ours[rows] - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("case", ["vit"] if OLD else ["bert", "modernbert", "vit"])
def test_together_with_global_local_attention(case, order):
    model, given = deep(case), given_for(case)
    near = adaptive.GlobalLocalAttention(window=4)
    with adaptive.patch(model, near):
        threshold, depths = splitting(cosines(model, given))
        full = run(model, given)
        alone = [run(model, one_row(given, row)) for row in range(4)]
    both = (near, adaptive.EncoderExit(threshold=threshold))[::order]
    with adaptive.patch(model, *both) as patched:
        ours = run(model, given)
        report = patched.report()
    assert report.encoder_exit.depths == histogram(depths)
    assert sum(layer.native_calls for layer in report.layers) > 0
    for row, depth in enumerate(depths):
        if depth == DEPTH and ours.dim() == 2:
            assert (ours[row] - full[row]).abs().max() <= 2e-5 * full.abs().max()
            assert (ours[row] - alone[row][0]).abs().max() <= 2e-5 * full.abs().max()
    with adaptive.patch(model, near, adaptive.EncoderExit(threshold=2.0)):
        assert torch.equal(run(model, given), full)


def test_a_gate_sends_each_sequence_where_it_says():
    model, given = deep("vit"), inputs("vit", batch=5)
    seen = []
    hook = layers_of(model)[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(model, given)
    hook.remove()
    embedded = seen[0].mean(1)
    direction = embedded[2] - embedded.mean(0)  # of which the third sequence has most
    middle = float((embedded @ direction).topk(2).values.mean())
    gate = adaptive.EncoderGate(
        layers=(2,), weight=((-100 * direction).tolist(), [0.0] * 128), bias=(100 * middle, 0.0)
    )
    with adaptive.patch(model, adaptive.EncoderExit(gate=gate)) as patched:
        ours = run(model, given)
        assert patched.report().encoder_exit.depths == {2: 4, DEPTH: 1}
    short, full = run(cut(model, 2), given), run(model, given)
    others = [0, 1, 3, 4]
    assert (ours[2] - full[2]).abs().max() <= 1e-5 * full.abs().max()
    assert (ours[others] - short[others]).abs().max() <= 1e-5 * short.abs().max()
    with adaptive.patch(model, adaptive.EncoderExit(gate=gate, threshold=1.1)):
        assert torch.equal(run(model, given), full)


def test_audits_are_the_cosine_with_the_whole_model():
    model = transformers.AutoModel.from_config(deep("vit").config).eval()
    given = inputs("vit", batch=3)
    full = run(model, given)
    policy = adaptive.EncoderExit(layer=1, audit_every=2)
    with adaptive.patch(model, policy) as patched:
        ours, *_ = (run(model, given) for _ in range(3))
        log = patched.report().encoder_exit
        text = str(patched.report())
    wanted = torch.cosine_similarity(ours.mean(1), full.mean(1), dim=-1)
    assert (log.calls, log.audits, log.audited, log.rows) == (3, 2, 6, 9)
    assert log.agreement == pytest.approx((float(wanted.mean()), float(wanted.min())), abs=1e-6)
    assert log.agreement[1] < 0.999999
    assert "75.0% of layers skipped" in text
    assert f"at least {float(wanted.min()):.4f}" in text


def test_disabled_copies_plans_and_failures(tmp_path):
    model, given = deep("vit"), inputs("vit", batch=4)
    threshold, depths = splitting(cosines(model, given))
    stock = run(model, given)
    patched = adaptive.patch(model, adaptive.EncoderExit(threshold=threshold))
    ours = run(model, given)
    with patched.disabled():
        assert torch.equal(run(model, given), stock)
    assert patched.verify(given).max_logit_error > 0
    assert patched.report().encoder_exit.calls == 1
    other = copy.deepcopy(model)
    patched.plan.save(tmp_path / "plan.json")
    json.dumps(patched.report().to_dict())

    failing = layers_of(model)[DEPTH - 1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, given)
    failing.remove()
    with patched.disabled():
        assert torch.equal(run(model, given), stock)
    assert torch.equal(run(model, given), ours)
    patched.unpatch()
    assert torch.equal(run(model, given), stock)
    assert not any("forward" in layer.__dict__ for layer in layers_of(model))
    assert torch.equal(run(other, given), ours)
    assert adaptive.patched(other).report().encoder_exit.depths[min(depths)] > 0
    with adaptive.patch(model, adaptive.Plan.load(tmp_path / "plan.json")):
        assert torch.equal(run(model, given), ours)
    with torch.no_grad():
        layers_of(model)[0].layernorm_before.weight.mul_(2)  # the copy has weights of its own
    assert torch.equal(run(other, given), ours)
