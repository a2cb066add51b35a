"""The files around the weights: what travels with a conversion, and what Megatron wants beside its tensors."""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mtp_convert.bridge_config import run_config
from mtp_convert.checkpoint import Checkpoint
from mtp_convert.containers import safetensors
from mtp_convert.containers.paths import member_path
from mtp_convert.containers.torch_save import save_object
from mtp_convert.encodings.dtype import CAST_TARGETS
from mtp_convert.location import CARRIED, LATEST, PICTURES, PROVENANCE, VERIFIED
from mtp_convert.options import Options
from mtp_convert.quantization import HF_QUANT

Content = Path | Callable[[], bytes]  # a file to copy, or bytes that are made when the payload is written
Small = dict[str, Content]
RELEASE = "release"  # the iteration folder of a converted checkpoint: no optimizer, iteration 0

SOURCE_HEADERS = "weights_layout"  # below hf/: headers and index of the source, so that the same files can come back
SOURCE_ENCODING = "weights_encoding"  # beside it: what the source's weights need to be codes again (see `before`)
LARGEST = 256 << 20  # bytes; nothing beside the weights is larger
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".distcp", ".onnx")


@dataclass(frozen=True)
class Said:
    """What a target says about how its weights are stored.

    config: config.json with the right description; `path` holds `base` and is copied as it is where that says the same.
    quant_file: its hf_quant_config.json, if it has one.
    """

    config: Mapping[str, Any]
    base: Mapping[str, Any]
    path: Path
    quant_file: Path | None


def side_files(folder: Path) -> dict[str, Path]:
    """Configuration, tokenizer, remote code, licence, ...: every regular file that is no weight, by relative path."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and travels(relative.as_posix(), path.stat().st_size):
            found[relative.as_posix()] = member_path(folder, relative.as_posix(), folder.name)  # no link leads outside
    return found


def travels(relative: str, nbytes: int) -> bool:
    """Whether a file beside the weights is carried along, by its path and size."""
    top, _, _ = relative.partition("/")
    name = relative.rpartition("/")[2]
    own = top in (".git", ".cache", SOURCE_HEADERS, SOURCE_ENCODING) or name in (
        PROVENANCE,
        VERIFIED,
        *PICTURES,
        safetensors.INDEX,
    )
    return not own and not name.endswith(WEIGHTS) and nbytes <= LARGEST


def config_file(checkpoint: Checkpoint, depths: int, dtype: str, said: Said) -> Content:
    """config.json: a file that is there if it agrees with what is written, else a corrected one."""
    family, config = checkpoint.family, dict(said.config)
    section = config[checkpoint.section[0]] if checkpoint.section else config
    if family.depths.declared(section) != depths:
        section = family.depths.corrected(section, depths)
    config = {**config, checkpoint.section[0]: section} if checkpoint.section else section
    if dtype in CAST_TARGETS:
        config = _with_dtype(config, CAST_TARGETS[dtype].torch_name)
    if config == said.base:
        return said.path
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode


def _with_dtype(config: dict[str, Any], torch_name: str) -> dict[str, Any]:
    """The config with every statement of the element type replaced, also in nested sections."""
    fields = {"dtype", "torch_dtype"}
    return {
        key: torch_name if key in fields else _with_dtype(value, torch_name) if isinstance(value, dict) else value
        for key, value in config.items()
    }


def shard_headers(checkpoint: Checkpoint, layout: str) -> tuple[Mapping[str, bytes], bytes | None]:
    """Raw headers by shard name and the index that the weights have, or once had, as safetensors in `layout`."""
    if checkpoint.stored.headers and checkpoint.layout.name == layout:
        headers, index = checkpoint.stored.headers, checkpoint.located.weights / safetensors.INDEX
    elif layout == CARRIED:
        folder = checkpoint.located.side / SOURCE_HEADERS
        headers = {p.name.removesuffix(".header"): p.read_bytes() for p in sorted(folder.glob("*.header"))}
        index = folder / safetensors.INDEX
    else:
        return {}, None
    return headers, index.read_bytes() if index.is_file() else None


def _carried_headers(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The same, of the Hugging Face folder, as files."""
    headers, index = shard_headers(checkpoint, CARRIED)
    files = {f"{SOURCE_HEADERS}/{name}.header": raw for name, raw in headers.items()}
    return files if index is None else {**files, f"{SOURCE_HEADERS}/{safetensors.INDEX}": index}


def common_state(args: Mapping[str, Any], content: Mapping[str, bool]) -> dict[str, Any]:
    """What every rank of a converted checkpoint shares, with the `content_metadata` that its readers go by."""
    return {"args": Namespace(**args), "checkpoint_version": 3.0, "iteration": 0, "content_metadata": dict(content)}


def megatron_files(common: Mapping[str, Any], folder: str, version: tuple[int, int]) -> dict[str, bytes]:
    """common.pt, metadata.json and the tracker file.

    common.pt is read by every release; 0.19 and later prefer it to their own `common_state` object when it exists.
    """
    meta: dict[str, object] = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    if version < (0, 19):
        meta |= {"common_backend": "torch", "common_backend_version": 1}
    return {
        f"{folder}/common.pt": save_object(common),
        f"{folder}/metadata.json": json.dumps(meta).encode(),
        LATEST: folder.encode(),
    }


def megatron_small(source: Checkpoint, options: Options, physical: int, common: Mapping[str, Any], said: Said) -> Small:
    """Everything beside the tensors of a Megatron checkpoint; the Hugging Face files travel below `hf/`.

    The ranks' files of a legacy checkpoint hold their arguments themselves, and Megatron-Bridge does not read them.
    """
    dist = options.container == "torch_dist"
    files = megatron_files(common, RELEASE, options.version) if dist else {LATEST: RELEASE.encode()}
    provider = source.family.bridge_provider
    if dist and provider and not source.section:  # the language model of a larger one is built by another class
        dtype = _most_common_dtype(source, options)
        if (config := run_config(provider, vars(common["args"]), torch_dtype=dtype)) is not None:
            files[f"{RELEASE}/run_config.yaml"] = config
    travelling: dict[str, Content] = {**_hf_files(source, options, physical, said), **_known(_carried_headers(source))}
    return {**{f"{CARRIED}/{relative}": c for relative, c in travelling.items()}, **_known(files)}


def safetensors_small(source: Checkpoint, options: Options, physical: int, said: Said) -> Small:
    """Everything beside the tensors of a safetensors folder with `physical` stored MTP depths."""
    carried = {} if options.to == CARRIED else _known(_carried_headers(source))
    return {**_hf_files(source, options, physical, said), **carried}


def _hf_files(source: Checkpoint, options: Options, physical: int, said: Said) -> Small:
    files: Small = {**side_files(source.located.side)}
    files.pop(HF_QUANT, None)
    if said.quant_file is not None:
        files[HF_QUANT] = said.quant_file
    return {**files, "config.json": config_file(source, physical, options.dtype, said)}


def _known(files: Mapping[str, bytes]) -> dict[str, Content]:
    return {relative: partial(bytes, raw) for relative, raw in files.items()}


def _most_common_dtype(source: Checkpoint, options: Options) -> str:
    """torch's name of the type of most bytes."""
    if options.dtype in CAST_TARGETS:
        return CAST_TARGETS[options.dtype].torch_name
    sizes: Counter[str] = Counter()
    for tensor in source.stored.tensors.values():
        sizes[tensor.dtype.torch_name] += tensor.nbytes
    return sizes.most_common(1)[0][0]
