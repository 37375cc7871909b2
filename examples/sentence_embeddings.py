"""Embed sentences of mixed length, and let each leave the encoder as soon as a gate says so.

Run it: python examples/sentence_embeddings.py [FOLDER of a BERT-like model and its tokenizer]
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import adaptive
from adaptive.train import encoder_gate

torch.manual_seed(0)
sentences = [
    "A cat sat on the roof.",
    "The owl in the old tree saw the cat, the dog and both of the hens in the barn.",
    "Rain.",
    "On Sundays the fox goes to the river, and nobody has ever asked it why it does.",
] * 8

# 1. An encoder and its tokenizer: yours, or a tiny random one whose tokens are bytes.
if len(sys.argv) > 1:
    model = AutoModel.from_pretrained(sys.argv[1]).eval()
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    batch = dict(tokenizer(sentences, padding=True, return_tensors="pt"))
else:
    model = BertModel(
        BertConfig(
            vocab_size=256,
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=128,
        )
    ).eval()
    rows = [torch.tensor(list(text.encode())) for text in sentences]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}

# 2. A gate learns from examples after which layer the cosine with all of them is 1 - tolerance.
tolerance = 0.4 if len(sys.argv) > 1 else 0.003  # layers of random weights change little
depths = list(range(1, model.config.num_hidden_layers))
gate = encoder_gate(model, [batch], layers=depths, tolerance=tolerance)
with tempfile.TemporaryDirectory() as folder:
    gate.save(Path(folder) / "gate.json")
    gate = adaptive.EncoderGate.load(Path(folder) / "gate.json")

# 3. Each sentence leaves where the gate says; the others go on without it.
with adaptive.patch(model, adaptive.EncoderExit(gate=gate)) as patched, torch.no_grad():
    states = model(**batch).last_hidden_state
    log = patched.report().encoder_exit
mask = batch["attention_mask"][..., None]
embeddings = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

print(log)
print(f"{len(embeddings)} embeddings of {embeddings.shape[1]} numbers")
