"""The trained lab model says the same 512 tokens, stock and patched, in float32."""

import argparse
import inspect
from pathlib import Path

import pytest
import torch

import adaptive

transformers = pytest.importorskip("transformers")

MODEL = Path(__file__).resolve().parents[2] / "bench" / "lab" / "model"
NEW_TOKENS = 512

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="the lab model is not here"),
]


def test_greedy_tokens_are_identical_for_512_tokens():
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    prompt = tokenizer(inspect.getsource(argparse), return_tensors="pt").input_ids[:, :700]

    def say():
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )

    stock = say()
    with adaptive.patch(model) as patched:
        said = say()
        calls = sum(patched.report().native_calls.values())
    assert stock.shape[1] == prompt.shape[1] + NEW_TOKENS
    assert said.tolist() == stock.tolist()
    assert len(set(stock[0, -NEW_TOKENS:].tolist())) > 20  # text, not one token repeated
    assert calls == NEW_TOKENS * model.config.num_hidden_layers  # the prompt is one of them
