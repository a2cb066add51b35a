"""A checkpoint whose tensors, or whose config, are not just what one folder holds: checked like any other."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mtp_convert.checkpoint import Checkpoint, explained
from mtp_convert.containers.base import Place, Stored, StoredTensor


def in_files(c: Checkpoint, names: Iterable[str]) -> dict[str, StoredTensor]:
    """The tensors of the files that hold these: codes, their scales, and the scales that stand beside them."""
    names = frozenset(names)
    raw = [t for n, tensor in c.stored.tensors.items() if n in names for t in _raw(tensor)]
    raw += [c.stored.raw[beside] for beside, owner in c.stored.beside.items() if owner in names]
    return {t.name: t for t in raw}


def _raw(tensor: StoredTensor) -> tuple[StoredTensor, ...]:
    return (tensor,) if tensor.encoding is None else tensor.encoding.raw


def joined(
    base: Checkpoint, tensors: Mapping[str, StoredTensor], section: Mapping[str, Any], *, files: Iterable[Place]
) -> Checkpoint:
    """Tensors from several places as one checkpoint, beside the side files of `base`.

    Args:
        tensors: as they are in `files`.
        section: the language model's part of the config.

    Raises:
        ConvertError: as `explained`.
    """
    stored = Stored("joined", base.stored.folder, tensors, files=tuple(files))
    return _under(base, stored, _with_section(base, section))


def reconfigured(source: Checkpoint, **fields: object) -> Checkpoint:
    """The same tensors under a config that says something else, wherever it says it.

    Raises:
        ConvertError: as `explained`.
    """
    plain = replace(source.stored, tensors=source.stored.in_files, raw={}, beside={})
    config = _with_section(source, {**source.model_config, **fields})
    return _under(source, plain, {**config, **{name: value for name, value in fields.items() if name in config}})


def _with_section(source: Checkpoint, section: Mapping[str, Any]) -> dict[str, Any]:
    return {**source.config, source.section[0]: dict(section)} if source.section else dict(section)


def _under(source: Checkpoint, stored: Stored, config: Mapping[str, Any]) -> Checkpoint:
    """What is stored, explained by a config that lies in a temporary folder as long as the checkpoint is needed."""
    folder = Path(tempfile.mkdtemp(prefix="mtp-convert-config-"))
    path = folder / "config.json"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        found = explained(stored, source.located, layout=source.layout.name, hf_config=path, allow_unmapped=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
    return found
