"""Token ids to run: the same for both sides, the same in every run."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

PROMPTS = Path(__file__).with_name("prompts.txt")
TOKENIZER = "tokenizer.json"


def token_ids(rows: int, length: int, vocab: int, *, seed: int = 0, side: Path | None = None) -> Tensor:
    """Ids [rows, length] below `vocab`: text where the folder `side` has a tokenizer, else and every second row random.

    Text is what models see; random ids reach the rows of the embedding that text does not.
    """
    ids = torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))
    text = _text_ids(side, rows, length) if side is not None and (side / TOKENIZER).is_file() else []
    for row, found in enumerate(text):
        if row % 2 == 0 and max(found) < vocab:
            ids[row] = torch.tensor(found)
    return ids


def _text_ids(side: Path, rows: int, length: int) -> list[list[int]]:
    """Rows of the shipped prompts, each beginning with another one. Reads the tokenizer's file, runs no code."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(side / TOKENIZER))
    prompts = [p.strip() for p in PROMPTS.read_text(encoding="utf-8").split("\n---\n")]
    encoded = [tokenizer.encode(p, add_special_tokens=False).ids for p in prompts]
    stream = list(chain.from_iterable(encoded))
    if not stream:
        return []
    starts = [sum(map(len, encoded[: i % len(encoded)])) for i in range(rows)]
    return [[stream[(start + i) % len(stream)] for i in range(length)] for start in starts]
