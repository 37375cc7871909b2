"""The lab model's tokenizer: byte-level BPE with single-digit tokens, lossless on any bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCAB_SIZE = 1024


def _byte_alphabet() -> list[str]:
    """Return the character that stands for each byte in a byte-level vocabulary."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in plain}
    spare = 0
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + spare)
            spare += 1
    return [table[byte] for byte in range(256)]


BYTE_TO_CHAR = _byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Train the tokenizer; all 256 bytes are in the vocabulary, so nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
    )
    return tokenizer


def encode_bytes(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Encode any bytes: valid UTF-8 by the tokenizer, every other byte as its own token."""
    ids: list[int] = []
    while data:
        try:
            ids += tokenizer.encode(data.decode("utf-8"), add_special_tokens=False).ids
            break
        except UnicodeDecodeError as error:
            good, bad = data[: error.start], data[error.start : error.end]
            ids += tokenizer.encode(good.decode("utf-8"), add_special_tokens=False).ids
            ids += [tokenizer.token_to_id(BYTE_TO_CHAR[byte]) for byte in bad]
            data = data[error.end :]
    return ids


def decode_bytes(tokenizer: Tokenizer, ids: Iterable[int]) -> bytes:
    """Return the exact bytes that ``ids`` stand for; special tokens stand for none."""
    special = {BOS, EOS, PAD}
    tokens = (tokenizer.id_to_token(int(i)) for i in ids)
    return bytes(CHAR_TO_BYTE[char] for tok in tokens if tok not in special for char in tok)


def save_for_transformers(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write the files that ``AutoTokenizer.from_pretrained(folder)`` reads."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(str(folder))
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text(encoding="utf-8"))
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
