"""LocalAttention with rebased positions on whole models: the plain rule, however text is fed."""

import copy

import pytest
import torch
from fed_models import fed, given
from models import CONFIGS, greedy, make, padded, token_ids
from rebased_reference import Reference, powers

import adaptive
from adaptive.adapters import FAMILIES
from adaptive.layers.head_split import HeadSplit
from adaptive.layers.state import STATE

PROMPT = 120
CUTS = [(PROMPT,), (50, 40, 1, 1, 2, 16, 1, 9), (3, 2, 1, 1, 100, 1, 12), (50,) + (1,) * 70]
TWO = [powers(10000.0, 32)] * 2
FAMILY_CASES = {
    "llama": ("llama", TWO, {}),
    "qwen2": ("qwen2", TWO, {}),
    "qwen3": ("qwen3", TWO, {}),
    "gemma2": ("gemma2", TWO, {"implementation": "eager", "layer_types": ["full_attention"] * 2}),
    "gemma3": (
        "gemma3",
        [powers(10000.0, 32), powers(1000000.0, 32)],
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4096},
    ),
    "phi3": ("phi3", [powers(10000.0, 16)] * 2, {"partial_rotary_factor": 0.5}),
    "phi": ("phi", [powers(10000.0, 16)] * 2, {"partial_rotary_factor": 0.5}),
    "gpt_neox": ("gpt_neox", [powers(10000.0, 8)] * 2, {}),
    "glm": ("glm", [powers(10000.0, 16)] * 2, {"partial_rotary_factor": 0.5}),
}


@pytest.fixture(autouse=True)
def more_families(monkeypatch):
    """Two more: features in neighbouring pairs, and a rotation of half of them."""
    for name, norm in (("glm", "norm"), ("phi", "final_layernorm")):
        monkeypatch.setitem(CONFIGS, name, (name, CONFIGS["llama"][1]))
        family = adaptive.Family(name=name, model_types=(name,), norm=norm)
        monkeypatch.setitem(FAMILIES, name, family)


def rebased(window=8, sinks=3, **fields):
    return adaptive.LocalAttention(window=window, sinks=sinks, positions="rebased", **fields)


def close(ours, wanted):
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("kind", ["plain", "padded"])
@pytest.mark.parametrize("case", FAMILY_CASES)
@torch.no_grad()
def test_every_family_is_the_plain_rule(case, kind):
    case, tables, fields = FAMILY_CASES[case]
    ids, mask, places = given(kind, 60)
    real = mask.bool()
    layers = tuple(i for i, t in enumerate(fields.get("layer_types", "ff")) if t[0] == "f")
    heads = [(layer, head) for layer in layers for head in range(4)]
    reference = Reference(case, tables, interleaved=case == "glm", **fields)
    wanted = reference.logits(ids, real, 8, 3, heads)
    model = make(case, **fields)
    with adaptive.patch(model, rebased(layers=layers)) as patched:
        for cuts in ((60,), (20, 3, 1, 1, 30, 1, 1, 1, 1, 1)):
            close(fed(model, ids, mask, places, cuts)[0][real], wanted[real])
        assert "positions='rebased'" in str(patched.report())
        assert patched.report().layers[-1].stock_calls == {}


@pytest.mark.parametrize("kind", ["plain", "padded"])
@pytest.mark.parametrize(("window", "sinks"), [(1, 1), (8, 1), (8, 3), (20, 20), (70, 4)])
@torch.no_grad()
def test_every_way_of_feeding(kind, window, sinks):
    ids, mask, places = given(kind, PROMPT)
    real = mask.bool()
    wanted = Reference("llama", TWO).logits(ids, real, window, sinks)
    model = make("llama")
    with adaptive.patch(model, rebased(window, sinks)):
        for cuts in CUTS:
            ours, cache = fed(model, ids, mask, places, cuts)
            close(ours[real], wanted[real])
            assert window > PROMPT - 40 or isinstance(cache.layers[0].store, HeadSplit)


@pytest.mark.parametrize("kind", ["plain", "padded"])
@torch.no_grad()
def test_some_heads_of_some_layers(kind):
    ids, mask, places = given(kind, PROMPT)
    real, heads = mask.bool(), ((0, 1),)
    wanted = Reference("llama", TWO).logits(ids, real, 9, 2, heads)
    model = make("llama")
    with adaptive.patch(model, rebased(9, 2, heads=heads)):
        for cuts in CUTS:
            close(fed(model, ids, mask, places, cuts)[0][real], wanted[real])


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
@torch.no_grad()
def test_scaled_frequencies_and_scaled_attention(kind):
    scaling = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 64}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = make("llama").config
    field = "rope_parameters" if hasattr(config, "rope_parameters") else "rope_scaling"
    if field == "rope_parameters":
        scaling["rope_theta"] = 10000.0
    model = make("llama", **{field: scaling})
    table = model.model.rotary_emb.inv_freq.double()
    assert not torch.allclose(table, TWO[0])
    ids, mask, places = given("plain", 60)
    reference = Reference("llama", [table] * 2, **{field: scaling})
    wanted = reference.logits(ids, mask.bool(), 8, 3)
    with adaptive.patch(model, rebased()):
        close(fed(model, ids, mask, places, (30,) + (1,) * 30)[0], wanted)


@torch.no_grad()
def test_it_is_the_original_until_something_is_dropped_and_not_after():
    model, ids = make("llama"), token_ids(tokens=60)
    found = []
    for positions in ("original", "rebased"):
        policy = adaptive.LocalAttention(window=8, sinks=3, positions=positions)
        with adaptive.patch(model, policy):
            found.append(model(ids).logits)
    close(found[0][:, :11], found[1][:, :11])
    assert ((found[0] - found[1]).abs().amax((0, 2))[11:] > 0.01).all()


@pytest.mark.parametrize("case", ["llama", "gpt2"])
@torch.no_grad()
def test_without_sinks_it_is_the_original_bit_for_bit(case):
    model, ids = make(case), token_ids(tokens=60)
    found = []
    for positions in ("original", "rebased"):
        policy = adaptive.LocalAttention(window=8, positions=positions)
        with adaptive.patch(model, policy):
            found.append((model(ids).logits, greedy(model, ids, 8)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@torch.no_grad()
def test_packed_sequences_are_counted_each_for_itself():
    model, lengths = make("llama"), (30, 2, 41, 9)
    ids = token_ids(batch=1, tokens=sum(lengths))
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    with adaptive.patch(model, rebased()) as patched:
        ours = model(ids, position_ids=places, use_cache=False).logits
        at = 0
        for length in lengths:
            alone = model(ids[:, at : at + length], use_cache=False).logits
            close(ours[:, at : at + length], alone)
            at += length
        assert patched.report().layers[0].stock_calls == {}


@torch.no_grad()
def test_layers_without_positions_have_nothing_to_turn():
    model = make("smollm3", no_rope_layers=[0, 1])
    ids, mask, places = given("plain", 60)
    with adaptive.patch(model, rebased()):
        states = [layer.self_attn.__dict__[STATE] for layer in model.model.layers]
        assert states[0].rotation is None
        assert states[1].rotation is not None
        one, _ = fed(model, ids, mask, places, (60,))
        close(fed(model, ids, mask, places, (30,) + (1,) * 30)[0], one)


@torch.no_grad()
def test_copies_beams_and_rollbacks():
    model = make("llama")
    ids, mask, places = given("plain", PROMPT)
    with adaptive.patch(model, rebased(16, 2)):
        wanted, _ = fed(model, ids, mask, places, (PROMPT,))
        close(fed(copy.deepcopy(model), ids, mask, places, (PROMPT,))[0], wanted)
        _, cache = fed(model, ids[:, :100], mask, places, (99, 1))
        cache.crop(-20)
        out = model(ids[:, 80:], past_key_values=cache, position_ids=places[:, 80:])
        close(out.logits, wanted[:, 80:])
        tokens = greedy(model, padded(tokens=60), 12)
        lookup = greedy(model, ids[:1], 12, prompt_lookup_num_tokens=4, eos_token_id=1)
        assert torch.equal(lookup, greedy(model, ids[:1], 12, eos_token_id=1))
        assert greedy(model, padded(tokens=60), 12, num_beams=3).shape == tokens.shape


@torch.no_grad()
def test_a_cache_that_others_filled_is_read_by_the_same_rule_and_keeps_everything():
    model, ids = make("llama", num_hidden_layers=1), token_ids(tokens=60)
    with adaptive.patch(model, rebased(heads=((0, 1),))) as patched:
        wanted = model(ids).logits
        with patched.disabled():  # its only layer's keys are those of the patched model
            held = model(ids[:, :50], use_cache=True).past_key_values
        found = [model(ids[:, at : at + 1], past_key_values=held).logits for at in range(50, 60)]
        close(torch.cat(found, 1), wanted[:, 50:])
        assert held.layers[0].keys.shape[2] == 60


@torch.no_grad()
def test_sixteen_bits_are_as_close_as_the_original():
    ids, mask, places = given("plain", PROMPT)
    exact = Reference("llama", TWO).logits(ids, mask.bool(), 8, 3)
    errors = []
    model = make("llama", dtype=torch.bfloat16)
    original = make("llama")
    with adaptive.patch(original, adaptive.LocalAttention(window=8, sinks=3)):
        wanted = fed(original, ids, mask, places, (PROMPT,))[0]
    for positions, truth in (("original", wanted), ("rebased", exact)):
        policy = adaptive.LocalAttention(window=8, sinks=3, positions=positions)
        with adaptive.patch(model, policy):
            ours = fed(model, ids, mask, places, CUTS[1])[0]
            errors.append((ours.float() - truth).pow(2).mean().sqrt())
    assert errors[1] < 1.5 * errors[0]


@torch.no_grad()
def test_a_plan_from_a_file_rebases_too(tmp_path):
    model, ids = make("llama"), token_ids(tokens=60)
    with adaptive.patch(model, rebased()) as patched:
        wanted = model(ids).logits
        patched.plan.save(tmp_path / "plan.json")
    with adaptive.patch(model, adaptive.Plan.load(tmp_path / "plan.json")):
        assert torch.equal(model(ids).logits, wanted)
