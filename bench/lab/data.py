"""Training text for the lab model: the source and documentation of the running Python."""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from bench.lab.tokenizer import EOS, train_tokenizer

#: Folders that not every Python ships, or that hold tables rather than language.
EXCLUDED_PARTS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
)
#: Held out of training as a whole: it is one long, real document that every Python carries.
LONG_DOCUMENT = "pydoc_data/topics.py"
#: One file in this many is held out, chosen by the hash of its name.
HELD_OUT_ONE_IN = 20
#: Longer files are cut here so that no single table weighs too much.
MAX_FILE_CHARS = 200_000


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus: where it is in the standard library and what it held."""

    path: str
    sha256: str
    size: int
    split: str


def split_of(relative: str) -> str:
    """Return ``"train"`` or ``"heldout"`` for a path; stable across machines and versions."""
    if relative == LONG_DOCUMENT:
        return "heldout"
    digest = hashlib.sha256(relative.encode()).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0 else "train"


def stdlib_root() -> Path:
    """Return the folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def list_files(root: Path | None = None) -> list[tuple[SourceFile, str]]:
    """Return every usable source file with its text, sorted by path."""
    root = root or stdlib_root()
    found: list[tuple[SourceFile, str]] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if EXCLUDED_PARTS.intersection(relative.split("/")):
            continue
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if not text.strip():
            continue
        entry = SourceFile(relative, hashlib.sha256(raw).hexdigest(), len(raw), split_of(relative))
        found.append((entry, text[:MAX_FILE_CHARS]))
    return found


def long_document() -> str:
    """Return the held-out long document: the language reference behind ``help()``."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def training_texts(root: Path | None = None) -> list[str]:
    """Return the texts of the training split."""
    return [text for entry, text in list_files(root) if entry.split == "train"]


def heldout_texts(root: Path | None = None) -> list[str]:
    """Return the held-out source files, without the long document."""
    return [
        text
        for entry, text in list_files(root)
        if entry.split == "heldout" and entry.path != LONG_DOCUMENT
    ]


def encode_corpus(tokenizer: Tokenizer, texts: list[str], eos_id: int) -> np.ndarray:
    """Encode texts into one ``uint16`` array, each text closed by the end-of-text token."""
    pieces: list[np.ndarray] = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        pieces.append(np.asarray([*encoding.ids, eos_id], dtype=np.uint16))
    return np.concatenate(pieces)


def write_list(path: Path, root: Path | None = None) -> None:
    """Write the list of files, with their hashes and split, as JSON."""
    entries = [asdict(entry) for entry, _ in list_files(root)]
    totals = {
        split: {
            "files": sum(e["split"] == split for e in entries),
            "bytes": sum(e["size"] for e in entries if e["split"] == split),
        }
        for split in ("train", "heldout")
    }
    head = {"python": sys.version.split()[0], "long_document": LONG_DOCUMENT, "totals": totals}
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    body = json.dumps(head)[:-1] + ', "files": [\n' + lines + "\n]}\n"
    path.write_text(body, encoding="utf-8")


def prepare(work: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """Return the tokenizer and the encoded splits, made once and cached in ``work``."""
    work.mkdir(parents=True, exist_ok=True)
    token_file, cache = work / "tokenizer.json", work / "corpus.npz"
    if not cache.exists():
        tokenizer = train_tokenizer(training_texts())
        tokenizer.save(str(token_file))
        eos = tokenizer.token_to_id(EOS)
        splits = {"train": training_texts(), "heldout": heldout_texts()}
        arrays = {k: encode_corpus(tokenizer, texts, eos) for k, texts in splits.items()}
        np.savez(cache, **arrays)
    return Tokenizer.from_file(str(token_file)), dict(np.load(cache))
