"""The tensors of a Hugging Face folder by name, each read when it is asked for."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_CPU = torch.device("cpu")


class SafetensorsFolder(Mapping[str, Tensor]):
    """What a folder's safetensors file holds, or the files that its index names.

    Raises ValueError if the index names a file outside the folder, or two files hold one name.
    """

    def __init__(self, folder: Path, device: torch.device = _CPU) -> None:
        self._files: dict[str, Any] = {}
        for file in _files(folder):
            handle: Any = safe_open(file, "pt", device=str(device))
            if twice := sorted(self._files.keys() & set(handle.keys())):
                raise ValueError(f"{folder.name}: tensors in more than one file: {twice}")
            self._files |= dict.fromkeys(handle.keys(), handle)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._files  # not by reading the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape by the file's header."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The type by the file's header, as safetensors names it."""
        return str(self._files[name].get_slice(name).get_dtype())


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    listed: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
    names = sorted(set(listed.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{folder.name}: the index names files outside its folder: {outside}")
    return [folder / name for name in names]
