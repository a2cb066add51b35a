"""What the Hugging Face folder of the weights was, after they have left it: kept beside a checkpoint of another layout.

weights_layout/       the headers of its shards and their index (see `sidecar`)
weights_encoding/     everything of its shards that is no value: scales, where weights were stored as codes;
                      its config.json and hf_quant_config.json, where they say how
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtp_convert import encoded, quantization
from mtp_convert.checkpoint import Checkpoint, read_config, section_of
from mtp_convert.containers import safetensors
from mtp_convert.containers.base import Stored, StoredTensor
from mtp_convert.engine.compare import StoredExtent
from mtp_convert.engine.files import OutFile
from mtp_convert.engine.sinks import OutRaw, safetensors_output
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.location import CARRIED
from mtp_convert.quantization import HF_QUANT
from mtp_convert.sidecar import SOURCE_ENCODING, Small, shard_headers


@dataclass(frozen=True)
class Before:
    """The Hugging Face folder that weights came from; codes hold no bytes any more, scales do.

    config: what its config.json says; config_path: a file with these contents. quant_path: its hf_quant_config.json.
    """

    stored: Stored
    config: Mapping[str, Any]
    config_path: Path
    quant_path: Path | None

    @property
    def encoded(self) -> bool:
        """Whether any weight was stored as codes."""
        return any(t.encoding is not None for t in self.stored.tensors.values())


def before(source: Checkpoint) -> Before | None:
    """The folder that the weights of `source` came from, as far as it is known; for a Hugging Face folder, itself.

    Raises:
        ConvertError: MTP010 the kept files are damaged, MTP031 they do not fit together.
    """
    side = source.located.side
    if source.layout.name == CARRIED:
        return Before(source.stored, source.config, source.config_path, _file(side / HF_QUANT))
    folder = side / SOURCE_ENCODING
    headers, _ = shard_headers(source, CARRIED)
    if headers:
        tensors = {n: t for name, raw in headers.items() for n, t in safetensors.described(name, raw).items()}
        tensors = _with_bytes(tensors, folder)
    elif side != source.located.weights and any(side.glob("*.safetensors")):  # the folder itself, by --hf-config
        tensors = dict(safetensors.read(side).tensors)
        folder = side
    else:
        return None
    path = folder / "config.json" if (folder / "config.json").is_file() else source.config_path
    config = read_config(path, source.located)
    said = quantization.read(config, source.section, folder if (folder / HF_QUANT).is_file() else side)
    stored = encoded.grouped(Stored("safetensors", side, tensors), said, section_of(config, source.section))
    return Before(stored, config, path, _file(folder / HF_QUANT) or _file(side / HF_QUANT))


def _file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _with_bytes(tensors: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """Put the kept scales in the place of their descriptions."""
    kept = safetensors.read(folder).tensors if any(folder.glob("*.safetensors")) else {}
    wrong = [
        Problem(f"{n} is not what the headers beside it describe", str(folder))
        for n, t in kept.items()
        if n not in tensors or (t.dtype, t.shape) != (tensors[n].dtype, tensors[n].shape)
    ]
    if wrong:
        raise ConvertError("MTP010", wrong, hint="the checkpoint is a mixture of two conversions; convert again")
    return {**tensors, **kept}


def travelling(source: Checkpoint, to: str, limit: int) -> tuple[tuple[OutFile, ...], Small]:
    """What goes along to another layout so that the encoding can come back: payload files, and small ones.

    Args:
        limit: bytes of the largest file.
    """
    if to == CARRIED:
        return (), {}
    prefix = (f"{CARRIED}/" if to == "megatron" else "") + f"{SOURCE_ENCODING}/"
    if source.layout.name != CARRIED:
        files = sorted(p for p in (source.located.side / SOURCE_ENCODING).glob("*") if p.is_file())
        return (), {prefix + p.name: p for p in files}
    weights = {n: t.encoding for n, t in source.stored.tensors.items() if t.encoding is not None}
    named = (encoded.encoded_as(e, name) for name, e in weights.items())
    kept = [t for e in named for t in (e.scales, e.whole) if t is not None]
    kept += [source.stored.raw[name] for name in source.stored.beside]
    if not kept:
        return (), {}
    raw = [OutRaw(t.name, t.dtype, t.shape, StoredExtent(t)) for t in kept]
    output = safetensors_output(raw, {}, max_shard_size=limit)
    small: Small = {"config.json": source.config_path, **output.small}
    if (quant := _file(source.located.side / HF_QUANT)) is not None:
        small[HF_QUANT] = quant
    payload = tuple(replace(f, path=prefix + f.path) for f in output.files)
    return payload, {prefix + name: content for name, content in small.items()}
