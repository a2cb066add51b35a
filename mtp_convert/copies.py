"""What is stored more than once must be equal: copies inside a model, and what several ranks repeat."""

from __future__ import annotations

from mtp_convert.checkpoint import Checkpoint
from mtp_convert.engine.compare import StoredExtent, compare
from mtp_convert.engine.gather import Reader
from mtp_convert.errors import ConvertError, Problem

POLICIES = ("compare", "use-main")


def check_copies(source: Checkpoint, *, use_main: bool = False) -> tuple[str, ...]:
    """Compare every stored copy with the tensor it copies, and replicas with each other, byte for byte.

    Args:
        use_main: a copy that differs is left out of account, and said so, instead of refused.

    Raises:
        ConvertError: MTP026 for copies, MTP016 for ranks, with the size of every difference.
    """
    reader = Reader()
    problems, disagreeing = [], []
    try:
        for own, again in source.stored.replicas:
            if (d := compare(StoredExtent(own), StoredExtent(again), reader)) is not None:
                disagreeing.append(Problem(f"{again.name} is not {own.name}: {d.text()}"))
        for name in sorted(source.copies):
            own = source.tensor(source.layout.home[source.layout.copies[name]][0].tensor)
            if (d := compare(StoredExtent(source.tensor(name)), StoredExtent(own), reader)) is not None:
                problems.append(Problem(f"{name} is not the copy of {own.name} that the config says: {d.text()}"))
    finally:
        reader.close()
    if disagreeing:
        raise ConvertError("MTP016", disagreeing)
    if problems and not use_main:
        hint = "--copies use-main goes by the main tensors; with a head of its own, tie_word_embeddings is false"
        raise ConvertError("MTP026", problems, hint=hint)
    return tuple(f"{p.what}; the main tensor is used" for p in problems)
