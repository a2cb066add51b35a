"""Reading a Hugging Face folder into a Nemotron-V3 tree, exactly, and writing its tensors under released names.

Releases name the backbone `backbone.*`, transformers also writes `model.*`; experts come one by one or stacked. E is
the number of experts.
"""

from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import NemotronHConfig

from mtp_convert.models.nemotron_v3.precision import stored_dtype
from mtp_convert.models.safetensors_folder import SafetensorsFolder

if TYPE_CHECKING:
    from mtp_convert.models.nemotron_v3.model import NemotronHForCausalLM

_STACKED = (".mixer.experts.up_proj", ".mixer.experts.down_proj")
_EMBEDDING, _NORM = "model.embed_tokens.", "model.norm."
_BACKBONES = ("backbone.", "model.")
# Released spelling first.
_SPELLINGS = {_EMBEDDING: ("embeddings.", "embed_tokens.", "embedding."), _NORM: ("norm_f.", "norm.")}


def read_folder_config(source: str | Path, config: NemotronHConfig | None = None) -> tuple[Path, NemotronHConfig]:
    """The folder and its config, or the one given; ValueError if `source` is no local folder."""
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{source} is no local folder with a config.json; download a repository first")
    return folder, config or NemotronHConfig.from_pretrained(folder, local_files_only=True)


def load_folder(
    model: "NemotronHForCausalLM", folder: Path, *, dtype: torch.dtype | None, device: torch.device
) -> None:
    """Fill `model`, which may be on the meta device, from the folder.

    `dtype` None keeps the stored types. Depths that the folder has beyond the model's are not read, unless depths
    share weights: then it is unclear which one to take.

    Raises ValueError that lists every tensor that is missing, unexpected, or of another shape.
    """
    stored = SafetensorsFolder(folder, device)
    state = model.state_dict()
    sources = {name: sources_of(name, len(tensor) if tensor.dim() else 0, stored) for name, tensor in state.items()}
    problems = list(_problems(stored, state, sources, _left_out(stored, model)))
    if problems:
        raise ValueError(f"{folder.name}: " + "; ".join(problems))
    read = {name: _assemble(stored, state[name], sources[name], name, dtype) for name in state}
    model.load_state_dict(read, strict=True, assign=True)


def released_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the tree under released names, experts one by one; sorted, detached."""
    released: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensor = tensor.detach()
        first = next(_spellings(name))
        if name.endswith(_STACKED):
            released |= dict(zip(_expert_names(first, len(tensor)), tensor.unbind(0), strict=True))
        else:
            released[first] = tensor
    return dict(sorted(released.items()))


def sources_of(name: str, experts: int, stored: Container[str]) -> list[str]:
    """The file tensors that make the tensor `name` [E, ..]: the first spelling of which the files have any.

    One of the same shape, or one for each of `experts` (0 where there are none).
    """
    spelled = list(_spellings(name))
    options = [[spelling] for spelling in spelled]
    if name.endswith(_STACKED):
        options = [*(_expert_names(spelling, experts) for spelling in spelled), *options]
    return next((option for option in options if any(source in stored for source in option)), options[0])


def _spellings(name: str) -> Iterator[str]:
    """What files call a tensor of the tree, the released name first."""
    if not name.startswith("model."):
        yield name
        return
    owner = next((prefix for prefix in _SPELLINGS if name.startswith(prefix)), None)
    for backbone in _BACKBONES:
        if owner is None:
            yield backbone + name.removeprefix("model.")
        else:
            yield from (backbone + spelling + name.removeprefix(owner) for spelling in _SPELLINGS[owner])


def _expert_names(stacked: str, experts: int) -> list[str]:
    """`x.experts.up_proj` -> `x.experts.0.up_proj.weight`, .. for all experts."""
    parent, leaf = stacked.rsplit(".", 1)
    return [f"{parent}.{expert}.{leaf}.weight" for expert in range(experts)]


def _left_out(stored: Mapping[str, Tensor], model: "NemotronHForCausalLM") -> set[str]:
    """Tensors of stored depths that the model was asked not to have."""
    declared = int(model.config.num_nextn_predict_layers or 0)
    wanted = model.mtp_config
    if wanted.num_layers and wanted.use_repeated_layer:
        return set()
    places = range(wanted.num_layers * wanted.pattern_length, declared * wanted.pattern_length)
    prefixes = tuple(f"mtp.layers.{place}." for place in places)
    return {name for name in stored if name.startswith(prefixes)}


def _problems(
    stored: SafetensorsFolder, state: Mapping[str, Tensor], sources: Mapping[str, list[str]], left_out: set[str]
) -> Iterator[str]:
    wanted = {source for names in sources.values() for source in names}
    if missing := sorted(wanted - stored.keys()):
        yield f"tensors missing: {missing}"
        if all(name.startswith("mtp.") for name in missing):
            yield "for a model without MTP give num_nextn_predict_layers=0"
    if unexpected := sorted(stored.keys() - wanted - left_out):
        yield f"tensors unexpected: {unexpected}"
    for name, names in sources.items():
        shape = tuple(state[name].shape)
        shape = shape[1:] if name.endswith(_STACKED) and names[0].endswith(".weight") else shape
        for source in names:
            if source in stored and stored.shape(source) != shape:
                yield f"{source} has shape {stored.shape(source)}, expected {shape}"


def _assemble(
    stored: Mapping[str, Tensor], like: Tensor, sources: list[str], name: str, dtype: torch.dtype | None
) -> Tensor:
    """The tensor `name` of the tree; experts are read one after the other into their stack."""
    first = stored[sources[0]]
    wanted = first.dtype if dtype is None or not first.is_floating_point() else stored_dtype(name, dtype)
    if len(sources) == 1 and first.shape == like.shape:
        return first.to(wanted)
    stack = torch.empty(like.shape, dtype=wanted, device=first.device)
    for expert, source in enumerate(sources):
        stack[expert] = stored[source]
    return stack
