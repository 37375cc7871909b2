"""GlobalLocalAttention: the pattern of Longformer and BigBird on stock encoders."""

import pytest
import torch
from encoder_models import IMAGES, SUPPORTED, TEXTS, inputs, make, run
from hypothesis import given as examples
from hypothesis import strategies as st
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import adaptive
from adaptive import GlobalLocalAttention
from adaptive.policy.global_local import pairs_seen

TEXT = next((case for case in ("bert",) if case in TEXTS), None)
NEEDS_5 = pytest.mark.skipif(TEXT is None, reason="text encoders need transformers 5")


def pattern(tokens, window, count, starts, ends):
    """Which keys each token sees, ``[batch, 1, tokens, tokens]``, by the words of the policy."""
    places = torch.arange(tokens)
    near = (places[:, None] - places[None]).abs() < window
    real = (places >= starts[:, None]) & (places < ends[:, None])
    first = real & (places < starts[:, None] + count)
    seen = near | first[:, :, None] | first[:, None, :]
    return (seen & real[:, None, :])[:, None]


class DenseAttention:
    """Stock SDPA on a dense mask of the pattern."""

    def __init__(self, window, count, mask, layers):
        self.window, self.count, self.mask, self.layers = window, count, mask, layers
        self.calls = 0

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        layer = self.calls
        self.calls += 1
        tokens = query.shape[2]
        if layer in self.layers and getattr(module, "sliding_window", None) is None:
            real = torch.ones(len(query), tokens) if self.mask is None else self.mask
            starts = real.argmax(1)
            ends = starts + real.sum(1)
            attention_mask = pattern(tokens, self.window, self.count, starts, ends)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


def reference(case, given, window, count, layers=range(99)):
    """Outputs of the stock model with a dense mask of the pattern in the layers."""
    model = make(case)
    attention = DenseAttention(window, count, given.get("attention_mask"), layers)
    AttentionInterface.register("dense_pattern", attention)
    AttentionMaskInterface.register("dense_pattern", sdpa_mask)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "dense_pattern"
    out = run(model, given)
    assert attention.calls == 2
    return out


def policy_run(case, given, **fields):
    model = make(case)
    with adaptive.patch(model, GlobalLocalAttention(**fields)) as patched:
        out = run(model, given)
        return out, patched.report()


def close(ours, wanted, given):
    mask = given.get("attention_mask")
    if mask is not None and ours.dim() == 3:
        ours, wanted = ours[mask.bool()], wanted[mask.bool()]
    return (ours - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("case", SUPPORTED)
def test_it_is_the_stock_model_with_a_dense_mask_of_the_pattern(case):
    sides = ("", "left", "right") if case in TEXTS else ("",)
    if case == "bert_classifier":  # its first token, which it reads, must not be padding
        sides = ("", "right")
    for side in sides:
        given = inputs(case, batch=3, side=side)
        ours, report = policy_run(case, given, window=5)
        assert close(ours, reference(case, given, 5, 1), given)
        stock = run(make(case), given)
        assert not close(ours, stock, given)
        skipping = [layer for layer in report.layers if layer.mode == "global_local"]
        assert skipping
        assert all(layer.paths["global_local"] == 1 for layer in skipping)
        assert all(0 < layer.scores < layer.dense_scores for layer in skipping)
        assert not report.exact


@pytest.mark.parametrize("count", [0, 2, 17, 40])
@pytest.mark.parametrize("window", [1, 3, 30])
@pytest.mark.parametrize("side", ["", "left", "right"])
@NEEDS_5
def test_windows_and_numbers_of_global_tokens(window, count, side):
    given = inputs("bert", batch=3, side=side)
    fields = {"window": window, "globals": count}
    assert close(
        policy_run("bert", given, **fields)[0], reference("bert", given, window, count), given
    )


@pytest.mark.parametrize("case", SUPPORTED)
def test_a_window_of_all_tokens_is_exact(case):
    given = inputs(case)
    model = make(case)
    with adaptive.patch(model):
        exact = run(model, given)
    tokens = 66 if case in IMAGES else 40
    ours, report = policy_run(case, given, window=tokens + 10)
    assert torch.equal(ours, exact)
    assert all(layer.mass_measured == 0 for layer in report.layers)


@NEEDS_5
def test_chosen_layers_and_windows_of_the_model():
    given = inputs("bert")
    ours, report = policy_run("bert", given, window=3, layers=(1,))
    assert close(ours, reference("bert", given, 3, 1, layers=(1,)), given)
    assert [layer.mode for layer in report.layers] == ["dense", "global_local"]
    assert report.layers[0].stock_calls == {"no mask": 1}
    with adaptive.patch(make("modernbert"), GlobalLocalAttention(window=3)) as patched:
        assert patched.plan.rows == (("global_local",) * 4, ("dense",) * 4)


@NEEDS_5
def test_off_is_off_and_undone_is_undone():
    model, given = make("bert"), inputs("bert", side="right")
    stock = run(model, given)
    with adaptive.patch(model, GlobalLocalAttention(window=3)) as patched:
        ours = run(model, given)
        with patched.disabled():
            assert torch.equal(run(model, given), stock)
        assert torch.equal(run(model, given), ours)
    assert torch.equal(run(model, given), stock)


@NEEDS_5
def test_no_output_depends_on_padding():
    model, given = make("bert"), inputs("bert", batch=3, side="left")
    other = {**given, "input_ids": given["input_ids"].masked_fill(given["attention_mask"] == 0, 9)}
    with adaptive.patch(model, GlobalLocalAttention(window=3)):
        mask = given["attention_mask"].bool()
        assert torch.equal(run(model, given)[mask], run(model, other)[mask])


@NEEDS_5
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["", "left", "right"])
def test_training_sees_what_the_kernel_reads(side, implementation):
    given = inputs("bert", batch=3, side=side)
    model = make("bert", implementation=implementation)
    with adaptive.patch(model, GlobalLocalAttention(window=3)) as patched:
        trained = model(**given).logits
        trained.sum().backward()
        assert patched.report().layers[0].stock_calls == {"gradient": 1}
        assert close(trained.detach(), run(model, given), given)
    assert bool(model.bert.embeddings.word_embeddings.weight.grad.isfinite().all())


class TestCertificate:
    @NEEDS_5
    @pytest.mark.parametrize("side", ["", "left", "right"])
    def test_mass_is_that_of_the_dense_softmax(self, side):
        """One layer, so that its queries and keys are those of the stock model."""
        model, given = make("bert", num_hidden_layers=1), inputs("bert", batch=3, side=side)
        shown = {}

        def show(module, query, key, value, attention_mask, **kwargs):
            shown.update(query=query, key=key)
            return ALL_ATTENTION_FUNCTIONS["sdpa"](
                module, query, key, value, attention_mask, **kwargs
            )

        AttentionInterface.register("shown", show)
        AttentionMaskInterface.register("shown", sdpa_mask)
        other = make("bert", num_hidden_layers=1)
        for module in other.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = "shown"
        run(other, given)
        real = given["attention_mask"]
        starts = real.argmax(1)
        ends = starts + real.sum(1)
        weights = shown["query"] @ shown["key"].transpose(2, 3) / 32**0.5
        weights = weights.masked_fill(~real[:, None, None].bool(), -torch.inf).softmax(-1)
        seen = pattern(40, 5, 1, starts, ends)
        mass = (weights * seen).sum(-1)  # [batch, heads, tokens]
        wanted = {
            (row, token): mass[row, :, token]
            for row in range(3)
            for token in range(int(starts[row]) + 1, int(ends[row]))
        }
        policy = GlobalLocalAttention(window=5, audit_every=1)
        with adaptive.patch(model, policy) as patched:
            for _ in range(12):
                run(model, given)
            layer = patched.report().layers[0]
            state = model.bert.encoder.layer[0].attention.self.__dict__["_adaptive"]
            measured = state.mass.values()
        assert layer.mass_measured == 12 * 3 * 16
        assert layer.paths == {"global_local": 12, "audit": 12}
        every = torch.stack(list(wanted.values()))
        nearest = (measured[:, None] - every[None]).abs().amax(-1)
        assert nearest.amin(1).max() < 1e-4  # whatever was measured is the mass of some token
        assert (nearest.amin(0) < 1e-4).float().mean() > 0.9  # and in time nearly all are
        assert layer.mass_min >= float(every.min()) - 1e-4
        assert 0.2 < layer.mass_mean < 0.99
        assert len(layer.mass_of_heads) == 4
        assert "mass" in str(patched.report())  # a narrow column may break the heading

    @NEEDS_5
    def test_audits_are_rare_or_never(self):
        given = inputs("bert")
        model = make("bert")
        with adaptive.patch(model, GlobalLocalAttention(window=3, audit_every=3)) as patched:
            for _ in range(7):
                run(model, given)
            assert patched.report().layers[0].paths == {"global_local": 7, "audit": 3}
        _, report = policy_run("bert", given, window=3, audit_every=None)
        assert report.layers[0].mass_mean is None
        assert report.layers[0].mass_measured == 0

    @NEEDS_5
    def test_where_all_tokens_are_global_nothing_is_measured(self):
        _, report = policy_run("bert", inputs("bert"), window=3, globals=50)
        assert report.layers[0].mass_measured == 0
        assert report.layers[0].scores == report.layers[0].dense_scores
        given = inputs("bert")
        given["attention_mask"][:, 2:] = 0
        _, report = policy_run("bert", given, window=1, globals=3)
        assert report.layers[0].mass_mean is None

    @NEEDS_5
    def test_verify_tells_how_far_it_is(self):
        with adaptive.patch(make("bert"), GlobalLocalAttention(window=2)) as patched:
            found = patched.verify(inputs("bert", side="right"))
        assert 0 < found.token_agreement < 1
        assert found.max_logit_error > 0.01 * found.max_logit


@examples(st.integers(0, 40), st.integers(1, 50), st.integers(0, 45))
def test_pairs_are_counted(tokens, window, count):
    ends = torch.tensor([tokens])
    seen = pattern(tokens, window, count, torch.tensor([0]), ends)
    assert pairs_seen(tokens, window, count) == int(seen.sum())
    assert GlobalLocalAttention(window=window, globals=count).pairs(tokens) == int(seen.sum())
    assert pairs_seen(tokens, None) == tokens**2


@NEEDS_5
def test_the_counts_are_those_of_the_pattern():
    given = inputs("bert", batch=3, side="right")
    _, report = policy_run("bert", given, window=5)
    layer = report.layers[0]
    assert layer.scores == sum(pairs_seen(tokens, 5, 1) for tokens in (40, 33, 26))
    assert layer.dense_scores == 3 * 40 * 40


class TestCompile:
    def test_without_a_mask_it_compiles(self):
        model, given = make("vit"), inputs("vit")
        with adaptive.patch(model, GlobalLocalAttention(window=3)), torch.no_grad():
            eager = model(**given)[0]
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(**given)[0]
        assert (compiled - eager).abs().max() <= 1e-5 * eager.abs().max()

    @NEEDS_5
    @pytest.mark.parametrize("whole", [True, False])
    def test_with_a_mask_it_refuses(self, whole):
        model, given = make("bert"), inputs("bert", side="right")
        refused = pytest.raises(Exception, match="with an attention mask cannot run under")
        with adaptive.patch(model, GlobalLocalAttention(window=3)), torch.no_grad(), refused:
            torch.compile(model, backend="aot_eager", fullgraph=whole)(**given)
