"""GlobalLocalAttention: its map and file, its numbers, and where it has no place."""

import json

import pytest
import torch
from encoder_models import OLD, inputs, make, run
from models import make as make_decoder
from torch import nn

import adaptive
from adaptive import GlobalLocalAttention, Plan

NEEDS_5 = pytest.mark.skipif(OLD, reason="text encoders do not use the interface before 5")


class TestPlan:
    def test_the_map_and_the_file(self, tmp_path):
        model = make("vit")
        policy = GlobalLocalAttention(window=9, globals=2, layers=(1,), audit_every=None)
        with adaptive.patch(model, policy) as patched:
            plan = patched.plan
            ours = run(model, inputs("vit"))
        assert "0  ####" in str(plan)
        assert "1  gggg" in str(plan)
        plan.save(tmp_path / "plan.json")
        loaded = Plan.load(tmp_path / "plan.json")
        assert loaded == plan
        assert json.loads((tmp_path / "plan.json").read_text())["policies"][0]["window"] == 9
        with adaptive.patch(model, loaded):
            assert torch.equal(run(model, inputs("vit")), ours)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"window": 0}, "window must be a whole number from 1 on, got 0"),
            ({"window": 2.5}, "window must be a whole number from 1 on, got 2.5"),
            ({"window": 3, "globals": -1}, "globals must be a whole number from 0 on, got -1"),
            ({"window": 3, "layers": ()}, r"layers must name a layer, or be None, got \(\)"),
            ({"window": 3, "layers": (1, 0)}, "layers must be ascending layer numbers"),
            ({"window": 3, "audit_every": 0}, "audit_every must be a whole number from 1 on"),
        ],
    )
    def test_bad_numbers(self, fields, message):
        with pytest.raises(ValueError, match=f"GlobalLocalAttention.{message}"):
            GlobalLocalAttention(**fields)

    def test_a_window_must_be_given(self):
        with pytest.raises(TypeError, match="window"):
            GlobalLocalAttention()

    def test_layers_out_of_range(self):
        with pytest.raises(ValueError, match="layers must be below the model's 2 layers, got 2"):
            adaptive.patch(make("vit"), GlobalLocalAttention(window=3, layers=(2,)))

    @NEEDS_5
    def test_layers_with_windows_of_their_own(self):
        with pytest.raises(ValueError, match="gives that layer a window of 17 tokens, got 1"):
            adaptive.patch(make("modernbert"), GlobalLocalAttention(window=3, layers=(1,)))

    def test_layers_that_exact_leaves_to_stock(self):
        exact = adaptive.Exact(stock_layers=(0, 1))
        with pytest.raises(ValueError, match="layers must find one that may skip keys"):
            adaptive.patch(make("vit"), exact, GlobalLocalAttention(window=3))
        model = make("vit")
        some = adaptive.Exact(stock_layers=(0,))
        with adaptive.patch(model, some, GlobalLocalAttention(window=3)) as patched:
            run(model, inputs("vit"))
            first, second = patched.report().layers
        assert first.stock_calls == {"plan": 1}
        assert second.native_calls == 1

    def test_a_second_one(self):
        with pytest.raises(ValueError, match="a second GlobalLocalAttention cannot be combined"):
            adaptive.patch(
                make("vit"), GlobalLocalAttention(window=3), GlobalLocalAttention(window=5)
            )


class TestWhere:
    def test_not_on_decoders(self):
        policy = GlobalLocalAttention(window=3)
        with pytest.raises(adaptive.UnsupportedModel, match="LocalAttention is for decoders"):
            adaptive.patch(make_decoder("llama"), policy)
        assert "both ways" in str(adaptive.check(make_decoder("llama"), policy))

    def test_not_on_plain_modules(self):
        layer = nn.TransformerEncoderLayer(64, 2, 64, batch_first=True)
        assert not adaptive.check(nn.Sequential(layer), GlobalLocalAttention(window=3)).ok

    @pytest.mark.parametrize(
        "policy", [adaptive.TidalDecode(), adaptive.Quest(), adaptive.StreamingLLM()]
    )
    def test_decoding_policies_are_not_for_encoders(self, policy):
        with pytest.raises(adaptive.UnsupportedModel, match="an encoder has no decoding"):
            adaptive.patch(make("vit"), policy)
        with pytest.raises(adaptive.UnsupportedModel, match="an encoder has no decoding"):
            adaptive.patch(make("vit"), GlobalLocalAttention(window=3), policy)
