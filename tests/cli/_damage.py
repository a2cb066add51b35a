"""Sources that must be refused: each a golden folder with one thing wrong, and what the refusal has to say."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from _kit import AUTOMODEL, Config, Tensors, config_of, golden_config, golden_tensors, hf_folder, sharded_folder
from safetensors.torch import save_file

NAME = "nemotron_d1"
INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"


@dataclass(frozen=True)
class Case:
    """A damaged source: exit code, error code, and texts that stderr must hold."""

    make: Callable[[Path], Path]
    code: int
    error: str
    says: tuple[str, ...]


def single(scratch: Path) -> Path:
    return Path(shutil.copytree(AUTOMODEL / NAME, scratch / "src"))


def shards(scratch: Path) -> Path:
    return sharded_folder(scratch / "src", golden_tensors(NAME), golden_config(NAME))


def with_tensors(change: Callable[[Tensors], None], **config: object) -> Callable[[Path], Path]:
    """The golden folder with other tensors or config fields."""

    def make(scratch: Path) -> Path:
        tensors = dict(golden_tensors(NAME))
        change(tensors)
        return hf_folder(scratch / "src", tensors, golden_config(NAME, **config))

    return make


def with_config(text: str | Config) -> Callable[[Path], Path]:
    return lambda scratch: hf_folder(scratch / "src", golden_tensors(NAME), text)


def truncated(scratch: Path) -> Path:
    folder = shards(scratch)
    os.truncate(folder / FIRST, (folder / FIRST).stat().st_size - 5)
    return folder


def index_names(target: str) -> Callable[[Path], Path]:
    """The index sends the first tensor to another file."""

    def make(scratch: Path) -> Path:
        folder = shards(scratch)
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["lm_head.weight"] = target
        (folder / INDEX).write_text(json.dumps(index))
        return folder

    return make


def missing_shard(scratch: Path) -> Path:
    folder = shards(scratch)
    (folder / FIRST).unlink()
    return folder


def stored_twice(scratch: Path) -> Path:
    folder = shards(scratch)
    other = "model-00002-of-00003.safetensors"
    tensors = {n: t for i, (n, t) in enumerate(golden_tensors(NAME).items()) if i % 3 == 1}
    first = next(iter(golden_tensors(NAME)))
    save_file({**tensors, first: golden_tensors(NAME)[first]}, folder / other)
    return folder


def no_config(scratch: Path) -> Path:
    folder = single(scratch)
    (folder / "config.json").unlink()
    return folder


def add(name: str) -> Callable[[Path], Path]:
    return with_tensors(lambda t: t.update({name: torch.ones(3)}))


def reshape(tensors: Tensors) -> None:
    tensors["backbone.layers.1.mixer.q_proj.weight"] = torch.ones(32, 31)


def drop_depth(tensors: Tensors) -> None:
    for name in [n for n in tensors if n.startswith("mtp.layers.1.")]:
        del tensors[name]


def one_depth_less(tensors: Tensors) -> None:
    for name in [n for n in tensors if n.startswith("mtp.")]:
        del tensors[name]


def two_depths_stored(scratch: Path) -> Path:
    source = AUTOMODEL / "nemotron_packed"
    folder = Path(shutil.copytree(source, scratch / "src"))
    (folder / "config.json").write_text(json.dumps({**config_of(source), "num_nextn_predict_layers": 3}))
    return folder


def two_depths_one_declared(scratch: Path) -> Path:
    folder = two_depths_stored(scratch)
    (folder / "config.json").write_text(json.dumps({**config_of(folder), "num_nextn_predict_layers": 1}))
    return folder


class Evil:
    """Unpickling this would create a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


def evil_metadata(folder: Path, marker: Path) -> None:
    """Replace `.metadata` by a pickle that runs a command."""
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(marker)))


CASES: dict[str, Case] = {
    "truncated shard": Case(truncated, 3, "MTP010", (FIRST,)),
    "missing shard": Case(missing_shard, 3, "MTP011", (FIRST,)),
    "index names a missing shard": Case(index_names("nowhere.safetensors"), 3, "MTP011", ("nowhere.safetensors",)),
    "index leaves the folder": Case(index_names("../../secret.safetensors"), 3, "MTP015", ("../../secret",)),
    "index with an absolute path": Case(index_names("/etc/passwd"), 3, "MTP015", ("/etc/passwd",)),
    "tensor in two shards": Case(stored_twice, 3, "MTP012", ("and model-00002-of-00003.safetensors",)),
    "extra tensor": Case(add("backbone.layers.1.mixer.rotary"), 4, "MTP023", ("layers.1.mixer.rotary",)),
    "wrong shape": Case(
        with_tensors(reshape), 4, "MTP024", ("backbone.layers.1.mixer.q_proj.weight", "[32, 31]", "[32, 32]")
    ),
    "part of a depth missing": Case(
        with_tensors(drop_depth),
        4,
        "MTP022",
        ("mtp.layers.1.norm.weight", "mtp.layers.1.mixer.gate.weight", "and 2 more"),
    ),
    "no depth stored, one declared": Case(
        with_tensors(one_depth_less), 4, "MTP025", ("num_nextn_predict_layers", "got 1", "expected 0")
    ),
    "three depths declared, two stored": Case(two_depths_stored, 4, "MTP025", ("got 3", "expected 2")),
    "one depth declared, two stored": Case(two_depths_one_declared, 4, "MTP025", ("got 1", "expected 2")),
    "unknown model_type": Case(with_config(golden_config(NAME, model_type="gpt_oss")), 4, "MTP021", ("'gpt_oss'",)),
    "no model_type": Case(with_config(golden_config(NAME, model_type=None)), 4, "MTP021", ("model_type",)),
    "no config.json": Case(no_config, 4, "MTP020", ("config.json",)),
    "config.json not JSON": Case(with_config("{'a': 1}"), 4, "MTP020", ("not JSON", "config.json")),
    "config.json empty": Case(with_config(""), 4, "MTP020", ("not JSON", "config.json")),
    "config.json a list": Case(with_config("[1, 2]"), 4, "MTP020", ("not a JSON object", "config.json")),
    "config.json nested without end": Case(with_config('{"a":' * 5000), 4, "MTP020", ("config.json",)),
    "size missing": Case(with_config(golden_config(NAME, hidden_size=None)), 4, "MTP020", ("hidden_size",)),
    "size negative": Case(with_config(golden_config(NAME, vocab_size=-64)), 4, "MTP020", ("vocab_size", "-64")),
    "size a text": Case(with_config(golden_config(NAME, n_routed_experts="8")), 4, "MTP020", ("n_routed_experts",)),
    "block kind unknown": Case(
        with_config(golden_config(NAME, layers_block_type=["lstm"])), 4, "MTP020", ("layers_block_type", "lstm")
    ),
    "depths a text": Case(
        with_config(golden_config(NAME, num_nextn_predict_layers="two")), 4, "MTP020", ("num_nextn_predict_layers",)
    ),
    "depths negative": Case(
        with_config(golden_config(NAME, num_nextn_predict_layers=-1)), 4, "MTP020", ("num_nextn_predict_layers",)
    ),
    "blocks a number": Case(with_config(golden_config(NAME, layers_block_type=5)), 4, "MTP020", ("layers_block_type",)),
    "head_dim a text": Case(with_config(golden_config(NAME, head_dim="eight")), 4, "MTP020", ("head_dim",)),
    "latent size a text": Case(
        with_config(golden_config(NAME, moe_latent_size="big")), 4, "MTP020", ("moe_latent_size",)
    ),
    "heads do not divide": Case(
        with_config(golden_config(NAME, num_key_value_heads=3)), 4, "MTP020", ("num_key_value_heads",)
    ),
    "depths enormous": Case(
        with_config(golden_config(NAME, num_nextn_predict_layers=10**7)), 4, "MTP020", ("num_nextn_predict_layers",)
    ),
    "no source": Case(lambda scratch: scratch / "nowhere", 3, "MTP002", ("no such folder", "nowhere")),
    "source is a file": Case(lambda _: AUTOMODEL / NAME / "config.json", 3, "MTP002", ("not a folder",)),
}
