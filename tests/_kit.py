"""What the conversion and command-line tests share: where the data lies, small folders, one-line conversions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from mtp_convert.checkpoint import PROVENANCE, open_checkpoint
from mtp_convert.convert import Result, prepare, run
from mtp_convert.options import Options

FIXTURES = Path(__file__).parents[1] / "fixtures"
AUTOMODEL = FIXTURES / "golden" / "automodel"
MEGATRON = FIXTURES / "golden" / "megatron"
TINY = FIXTURES / "tiny-nemotron-h"
HF_NAMES = tuple(sorted(p.name for p in AUTOMODEL.glob("nemotron_*")))
MEGATRON_NAMES = tuple(sorted(p.name for p in MEGATRON.glob("hyb_*")))

Tensors = dict[str, Tensor]
Config = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a run of the command line left: exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        """stdout as the one JSON object that it must be."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


Cli = Callable[..., Outcome]


def command(*args: object) -> list[str]:
    """The command line as a process."""
    return [sys.executable, "-m", "mtp_convert.cli", *map(str, args)]


def run_process(*args: object, **env: str) -> Outcome:
    """Run the command line in a process of its own, without a terminal."""
    done = subprocess.run(
        command(*args), capture_output=True, text=True, timeout=60, env={**os.environ, **env}, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def convert(src: Path, dst: Path, to: str, *, hf_config: Path | None = None, **options: Any) -> Result:  # noqa: ANN401
    """Convert without the command line."""
    return run(prepare(open_checkpoint(src, hf_config=hf_config), Options(to, **options)), dst)


def there_and_back(src: Path, scratch: Path, **options: Any) -> tuple[Path, Path]:  # noqa: ANN401
    """An HF folder through Megatron and back: both results."""
    there, back = scratch / "there", scratch / "back"
    convert(src, there, "megatron", **options)
    convert(there, back, "hf")
    return there, back


def golden_tensors(name: str) -> Tensors:
    """The weights of a golden HF folder, the caller's own."""
    return load_file(AUTOMODEL / name / "model.safetensors")


def config_of(folder: Path) -> Config:
    """config.json."""
    found: Config = json.loads((folder / "config.json").read_text())
    return found


def golden_config(name: str, **changed: object) -> Config:
    """The config of a golden HF folder with fields replaced (None removes one)."""
    config = {**config_of(AUTOMODEL / name), **changed}
    return {k: v for k, v in config.items() if v is not None or k not in changed}


def hf_folder(folder: Path, tensors: Mapping[str, Tensor], config: object, file: str = "model.safetensors") -> Path:
    """A Hugging Face folder of one file."""
    folder.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / file, metadata={"format": "pt"})
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config, indent=1))
    return folder


def sharded_folder(folder: Path, tensors: Mapping[str, Tensor], config: object, count: int = 3) -> Path:
    """A Hugging Face folder of several files and their index."""
    hf_folder(folder, {}, config, "model-0.safetensors")
    (folder / "model-0.safetensors").unlink()
    where = {n: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, n in enumerate(tensors)}
    for shard in set(where.values()):
        save_file({n: tensors[n] for n, s in where.items() if s == shard}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def writable(name: str, scratch: Path) -> Path:
    """A copy of a golden HF folder to damage."""
    return Path(shutil.copytree(AUTOMODEL / name, scratch / name))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by relative path, without the tool's own record."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != PROVENANCE)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def differing(source: Path, back: Path) -> list[str]:
    """Files that did not come back byte for byte; the other golden weights and outputs do not travel."""
    a, b = files_of(source), files_of(back)
    for name in ("io.safetensors", "native.safetensors"):
        a.pop(name, None)
    return sorted(n for n in a.keys() | b.keys() if a.get(n) != b.get(n))
