"""Text of random words, each domain with an alphabet of its own; and settings that fit it."""

from __future__ import annotations

import random
from pathlib import Path

ALPHABETS = {"abc": "abcdefgh", "digits": "0123456789", "greek": "αβγδεζηθ"}
SMALL = {
    "data.vocab_size": 300,
    "data.held_out_tokens": 600,
    "data.row_length": 16,
    "data.block": 2,
    "batch_rows": 8,
    "micro_rows": 2,
    "tokens": 8 * 16 * 6,
    "model.hidden_size": 16,
    "model.layers": 2,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.experts": 4,
    "model.expert_size": 8,
    "model.dense_size": 24,
    "evaluation_tokens": 200,
    "optimizer.warmup_share": 0.0,
}


def documents(alphabet: str, *, count: int = 20, words: int = 120, seed: int = 0) -> list[str]:
    """Documents of words from a dictionary of 60."""
    rng = random.Random(f"{alphabet}{seed}")
    dictionary = ["".join(rng.choices(alphabet, k=rng.randint(2, 6))) for _ in range(60)]
    return [" ".join(rng.choices(dictionary, k=words)) for _ in range(count)]


def write_text(folder: Path, **options: int) -> None:
    """A sub-folder per domain, documents separated as `load_text` reads them."""
    for name, alphabet in ALPHABETS.items():
        (folder / name).mkdir(parents=True)
        text = "\n<|doc|>\n".join(documents(alphabet, **options))
        (folder / name / "words.txt").write_text(text, encoding="utf-8")
