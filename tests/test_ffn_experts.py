"""FeedForwardExperts in models: the best experts of each token, as if the others were 0."""

import copy
import pickle

import pytest
import torch
from models import greedy, make, token_ids

import adaptive
from adaptive import ExpertRouterWeights, FeedForwardExperts
from adaptive.layers.expert_log import ExpertLog
from adaptive.layers.hf_ffn_experts import ExpertsForward
from adaptive.layers.hf_linear import most_rows

FAMILIES = ["qwen2", "gemma2", "granite", "olmo2"]
BIAS = {"mlp_bias": True}
LARGE = {"hidden_size": 1024, "intermediate_size": 1536, "num_hidden_layers": 1}
"""Large enough for the linear kernels."""


def policy(top_k=2, **fields):
    return FeedForwardExperts(**{"experts": 6, "top_k": top_k, "audit_every": None, **fields})


def random_router(seed=0, order=False):
    router = ExpertRouterWeights.random((0, 1), 6, 128, seed=seed)
    if not order:
        return router
    rng = torch.Generator().manual_seed(seed)
    orders = {layer: torch.randperm(96, generator=rng) for layer in router.layers}
    weights = {layer: router.of(layer, torch.device("cpu"))[0] for layer in router.layers}
    biases = {layer: torch.randn(6, generator=rng) for layer in router.layers}
    return ExpertRouterWeights.from_tensors(weights, biases, orders)


class Masked:
    """The FFN in full, with the neurons of all experts but the chosen at 0, in float32."""

    def __init__(self, ffn, forward):
        """Take the order and the router of a patched FFN, and nothing else."""
        self.ffn, self.policy = ffn, forward.policy
        neurons, experts = ffn.gate_proj.out_features, self.policy.experts
        order = forward.weights.order
        order = torch.arange(neurons) if order is None else order
        self.of = torch.empty(neurons, dtype=torch.long)
        self.of[order] = torch.arange(neurons) // (neurons // experts)
        self.router = forward.weights.router
        self.runs = [0] * experts

    def __call__(self, x):
        ffn, experts = self.ffn, self.policy.experts
        gate = ffn.gate_proj(x)
        if self.router is None:
            scores = [gate[..., self.of == e].float().mean(-1) for e in range(experts)]
            scores = torch.stack(scores, -1).detach()
        else:
            scores = x.float() @ self.router[0].T + self.router[1]
        best = scores.topk(self.policy.top_k, -1).indices
        runs = torch.zeros_like(scores).scatter(-1, best, 1.0)
        self.runs = [a + int(b) for a, b in zip(self.runs, runs.flatten(0, -2).sum(0), strict=True)]
        hidden = ffn.act_fn(gate) * ffn.up_proj(x) * runs[..., self.of].to(x.dtype)
        bias = ffn.down_proj.bias
        made = torch.nn.functional.linear(hidden, ffn.down_proj.weight)
        made = made * (experts / self.policy.top_k if self.policy.scaled else 1.0)
        return made if bias is None else made + bias


def masked(model):
    """A stock copy of a patched model whose FFNs are masked as its experts would choose."""
    other = copy.deepcopy(model)
    forwards = [layer.mlp.__dict__.get("forward") for layer in other.model.layers]
    adaptive.patched(other).unpatch()
    for layer, forward in zip(other.model.layers, forwards, strict=True):
        if forward is not None:
            layer.mlp.forward = Masked(layer.mlp, forward)
    return other


def split_ffns(model):
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    return [name for name, forward in forwards.items() if isinstance(forward, ExpertsForward)]


VARIANTS = {
    "clusters": {},
    "cut": {"split": "cut"},
    "one": {"top_k": 1},
    "five": {"top_k": 5, "scaled": True},
    "router": {"router": random_router(), "split": "cut", "scaled": True},
    "ordered": {"router": random_router(order=True)},
}
CASES = [
    *(("llama", variant) for variant in VARIANTS),
    *((case, variant) for case in FAMILIES for variant in ("clusters", "cut")),
]


@torch.no_grad()
@pytest.mark.parametrize(("case", "variant"), CASES)
def test_experts_equal_the_masked_dense_model_and_are_counted(case, variant):
    fields = BIAS if case == "llama" else {}
    model, ids = make(case, implementation="eager", **fields), token_ids(tokens=20)
    stock = model(ids).logits
    ran = []
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda *call: ran.append(call[-1].numel()))
    with adaptive.patch(model, policy(**VARIANTS[variant])) as patched:
        reference = masked(model)
        wanted = reference(ids).logits
        ran.clear()
        made = model(ids).logits
        log = patched.report().experts
        counted = [log.layers[layer].runs for layer in (0, 1)]
        assert counted == [layer.mlp.forward.runs for layer in reference.model.layers]
        assert sum(map(sum, counted)) * 96 // 6 == sum(ran)
        assert log.share == VARIANTS[variant].get("top_k", 2) / 6
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(made, stock, rtol=1e-2, atol=1e-2)
        assert not patched.report().exact
        with patched.disabled():
            assert torch.equal(model(ids).logits, stock)
    assert split_ffns(model) == []
    assert torch.equal(model(ids).logits, stock)


@torch.no_grad()
def test_all_experts_are_the_dense_model():
    model, ids = make("llama", **BIAS), token_ids(tokens=40)
    stock = model(ids).logits
    with adaptive.patch(model, policy(top_k=6)):
        assert len(split_ffns(model)) == 2
        torch.testing.assert_close(model(ids).logits, stock, rtol=1e-5, atol=1e-5)
    with adaptive.patch(model, policy(top_k=6, split="cut")) as patched:
        assert split_ffns(model) == []
        assert torch.equal(model(ids).logits, stock)
        assert patched.report().experts is None


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("split", ["clusters", "cut"])
def test_native_products_and_rows_that_depend_on_nothing_else(split, dtype):
    model = make("llama", dtype, **LARGE)
    with adaptive.patch(model, policy(split=split)) as patched:
        ffn = model.model.layers[0].mlp
        x = torch.randn(60, 1024, dtype=dtype)
        wanted = masked(model).model.layers[0].mlp.float()(x.float())
        patched.reset_stats()
        few = min(12, most_rows(dtype))  # beyond, PyTorch's products are faster, and not by row
        alone = torch.cat([ffn(row[None]) for row in x[:few]])
        calls = patched.report().native_calls["skinny_linear:cpu"]
        products = 2 if split == "clusters" else 3  # a copy holds gate and up as one
        assert calls == few * (1 + 2 * products)  # the scores, and two experts
        assert torch.equal(ffn(x[:few]), alone)
        for rows in (1, 12, 25, 60):
            error = (ffn(x[:rows]).float() - wanted[:rows]).norm() / wanted[:rows].norm()
            assert error < (1e-5 if dtype == torch.float32 else 1e-2)


def test_gradients_are_those_of_the_masked_model():
    for fields in ({}, {"split": "cut"}):
        model, ids = make("llama", **BIAS), token_ids(tokens=9)
        with adaptive.patch(model, policy(**fields)):
            other = masked(model)
            model(ids).logits.square().mean().backward()
        other(ids).logits.square().mean().backward()
        for (name, ours), right in zip(model.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, right.grad, rtol=1e-3, atol=1e-6, msg=name)
    model.requires_grad_(False)
    x = torch.randn(3, 128, requires_grad=True)
    with adaptive.patch(model, policy()):
        with torch.inference_mode():
            model(ids)  # makes the copies
        model.model.layers[0].mlp(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_generation_copies_pickles_and_other_policies():
    model, ids = make("llama"), token_ids(tokens=12)
    with adaptive.patch(model, policy()):
        wanted = greedy(masked(model), ids)
        assert torch.equal(greedy(model, ids), wanted)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(greedy(twin, ids), wanted)
            assert adaptive.patched(twin).report().experts.copied_bytes > 0
            adaptive.patched(twin).unpatch()
            assert split_ffns(twin) == []
    never = adaptive.EarlyExit(layers=(1,), threshold=2.0)
    window = adaptive.LocalAttention(window=64, layers=(0, 1))  # which sees it all
    for other in (window, never, adaptive.Exact()):
        for policies in ((policy(), other), (other, policy())):
            with adaptive.patch(model, *policies):
                assert torch.equal(greedy(model, ids), wanted)


@torch.no_grad()
def test_copies_follow_their_weights_and_are_given_back():
    model, ids = make("llama"), token_ids(tokens=12)
    with adaptive.patch(model, policy()) as patched:
        assert patched.report().experts.copied_bytes == 0  # before the first call
        model(ids)
        weights = [p for n, p in model.named_parameters() if "mlp" in n]
        assert patched.report().experts.copied_bytes == sum(p.nbytes for p in weights)
        mlp = model.model.layers[0].mlp
        for change in (
            lambda: mlp.up_proj.weight.mul_(2),  # counted by PyTorch
            lambda: mlp.gate_proj.weight.data.neg_(),  # not counted
        ):
            change()
            torch.testing.assert_close(model(ids).logits, masked(model)(ids).logits)
        mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight.clone() * 3)
        torch.testing.assert_close(model(ids).logits, masked(model)(ids).logits)
        held = mlp.forward.weights
        kept = [held.of(mlp.forward.ffn)[0][0].gate]
    assert patched.report().experts.copied_bytes > 0  # the last report before the end
    assert "forward" not in mlp.__dict__
    assert kept[0].data_ptr() != mlp.gate_proj.weight.data_ptr()
    with adaptive.patch(model, policy(split="cut")) as patched:
        model(ids)
        part = mlp.forward.weights.of(mlp.forward.ffn)[0][1]
        assert part.gate.data_ptr() == mlp.gate_proj.weight[16:].data_ptr()
        assert patched.report().experts.copied_bytes == 0


@torch.no_grad()
def test_audits_measure_the_distance_from_the_whole():
    model = make("llama", num_hidden_layers=1)
    mlp, x = model.model.layers[0].mlp, torch.randn(2, 8, 128)
    with adaptive.patch(model, policy(audit_every=2)) as patched:
        with patched.disabled():
            full = mlp(x).flatten(0, 1)
        made = mlp(x).flatten(0, 1)
        assert torch.equal(mlp(x).flatten(0, 1), made)
        log = patched.report().experts
        assert (log.layers[0].calls, log.layers[0].audits, log.layers[0].audited) == (2, 1, 16)
        errors = (made - full).norm(dim=1) / full.norm(dim=1)
        cosines = torch.cosine_similarity(made, full)
        assert log.error == pytest.approx((float(errors.mean()), float(errors.max())), rel=1e-5)
        assert log.cosine == pytest.approx((float(cosines.mean()), float(cosines.min())), rel=1e-5)
        values = patched.report().to_dict()["experts"]
        assert values["error_mean"] == log.error[0]
        assert f"relative error {log.error[0]:.3f}" in str(patched.report())
        patched.verify(token_ids(tokens=8), new_tokens=2)
        assert patched.report().experts.layers[0].calls == 2
        patched.reset_stats()
        assert patched.report().experts.error is None


@torch.no_grad()
@pytest.mark.parametrize("top_k", [2, 6])
def test_padding_is_neither_counted_nor_audited(top_k):
    model, ids = make("llama", num_hidden_layers=1), token_ids(1, 40)
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    with adaptive.patch(model, policy(top_k, audit_every=1)) as patched:
        model(ids[:, :5])
        alone = patched.report().experts
        patched.reset_stats()
        model(ids, attention_mask=mask)
        padded = patched.report().experts
        assert padded.layers[0].rows == padded.layers[0].audited == 5
        assert padded.layers[0].runs == alone.layers[0].runs
        assert padded.share == top_k / 6
        assert padded.read_share >= alone.read_share
        assert padded.error == pytest.approx(alone.error, rel=1e-4, abs=1e-5)
        patched.reset_stats()
        model(ids, attention_mask=mask * 0)
        assert (patched.report().experts.share, patched.report().experts.error) == (None, None)


@pytest.mark.parametrize("broken", ["made", "full"])
def test_audits_do_not_lose_what_is_no_number(broken):
    log, good = ExpertLog(experts=2), torch.ones(3, 4)
    bad = good.clone()
    bad[1, 2] = torch.nan
    log.layer(0).audit(good, good)
    assert (log.error, log.cosine) == ((0, 0), (1, 1))
    log.layer(0).audit(*((bad, good) if broken == "made" else (good, bad)))
    log.layer(1).audit(good, good)
    assert log.layers[0].audited == 6
    for number in (*log.error, *log.cosine):
        assert str(number) == "nan"


@torch.no_grad()
def test_an_interrupted_call_leaves_nothing_behind():
    model, ids = make("llama"), token_ids(tokens=12)
    with adaptive.patch(model, policy()) as patched:
        wanted = model(ids).logits

        def stop(*_):
            raise KeyboardInterrupt

        handle = model.model.layers[1].mlp.act_fn.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(ids)
        handle.remove()
        assert torch.equal(model(ids).logits, wanted)
        assert patched.report().experts.layers[1].calls == 2
