"""Reading a Hugging Face folder into a DeepSeek-V4 tree, exactly, and writing its tensors under released names."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config

from mtp_convert.models.deepseek_v4.names import MTP_COPIES, mtp_prefixes, released_views, spellings
from mtp_convert.models.deepseek_v4.stored import StoredTensors


def load_folder(model: nn.Module, folder: Path, *, config: DeepseekV4Config) -> None:
    """Fill `model`, whose tensors may be on the meta device, from the folder; dtypes are the model's.

    Raises ValueError that lists every tensor that is missing, unexpected, given under two spellings, or of another
    shape or type. Copies of embedding and head inside an MTP depth are accepted if they are equal.
    """
    stored = StoredTensors(folder)
    state = model.state_dict()
    chosen, problems = _choose(stored, state, layers=config.num_hidden_layers)
    copies = _copies(stored, depths=config.num_nextn_predict_layers)
    left_out = _left_out(stored, folder, config)
    problems += _cover_problems(stored, chosen, spared={*copies, *left_out})
    _refuse(folder, problems)
    read = {name: _assemble(stored, state[name], sources) for name, sources in chosen.items()}
    _refuse(folder, _value_problems(stored, read, copies, experts=config.n_routed_experts))
    model.load_state_dict(read, strict=True, assign=True)


def released_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the tree under released names, sorted, each tensor contiguous and detached."""
    released: dict[str, Tensor] = {}
    for name, tensor in state.items():
        released |= released_views(name, tensor.detach())
    return {name: tensor.contiguous() for name, tensor in sorted(released.items())}


def _choose(
    stored: StoredTensors, state: Mapping[str, Tensor], *, layers: int
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """For every tensor of the tree the file tensors that make it, as views of it; and problems."""
    chosen: dict[str, dict[str, Tensor]] = {}
    problems = []
    for name, tensor in state.items():
        options = {tuple(option): option for option in spellings(name, tensor, layers=layers)}
        found = [option for option in options.values() if not option.keys().isdisjoint(stored)]
        if len(found) > 1:
            problems.append(f"given twice: {sorted(n for o in found for n in o if n in stored)}")
        chosen[name] = found[0] if found else next(iter(options.values()))
    return chosen, problems


def _cover_problems(
    stored: StoredTensors, chosen: Mapping[str, Mapping[str, Tensor]], *, spared: set[str]
) -> list[str]:
    wanted = {source: view for sources in chosen.values() for source, view in sources.items()}
    present = wanted.keys() & stored.keys()
    scales = {stored.scale_of(name) for name in present | spared}
    missing = sorted(wanted.keys() - present)
    unexpected = sorted(stored.keys() - present - scales - spared)
    problems = [f"tensors missing: {missing}"] if missing else []
    if missing and all(name.startswith("mtp.") for name in missing):
        problems.append("for a model without MTP give num_nextn_predict_layers=0")
    problems += [f"tensors unexpected: {unexpected}"] if unexpected else []
    return problems + [p for name in sorted(present) if (p := stored.problem(name, wanted[name]))]


def _copies(stored: StoredTensors, *, depths: int) -> dict[str, str]:
    """Copies that the folder holds, by name, and the tensor of the tree that each must equal."""
    names = {f"mtp.{k}.{leaf}": original for k in range(depths) for leaf, original in MTP_COPIES.items()}
    return {name: original for name, original in names.items() if name in stored}


def _left_out(stored: StoredTensors, folder: Path, config: DeepseekV4Config) -> set[str]:
    """Tensors of depths that the folder's config has but the model was asked not to."""
    declared = int(json.loads((folder / "config.json").read_text()).get("num_nextn_predict_layers") or 0)
    dropped = range(config.num_nextn_predict_layers, declared)
    prefixes = tuple(p for k in dropped for p in mtp_prefixes(k, layers=config.num_hidden_layers))
    return {name for name in stored if name.startswith(prefixes)}


def _assemble(stored: StoredTensors, target: Tensor, sources: Mapping[str, Tensor]) -> Tensor:
    """A tensor like `target`, from file tensors that are views of it."""
    full = torch.empty(target.shape, dtype=target.dtype)
    for name, view in sources.items():
        # `view` may be on the meta device: lay the same view over the new tensor.
        full.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(stored.read(name))
    return full


def _value_problems(
    stored: StoredTensors, read: Mapping[str, Tensor], copies: Mapping[str, str], *, experts: int
) -> list[str]:
    problems = [
        f"{name} differs from {original}, of which it is a copy"
        for name, original in copies.items()
        if not torch.equal(stored.read(name).to(read[original].dtype), read[original])
    ]
    for name, table in read.items():
        if name.endswith(".tid2eid") and not (table.min() >= 0 and table.max() < experts):
            problems.append(f"{name} names experts {int(table.min())} to {int(table.max())} of {experts}")
    return problems


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{folder.name}: " + "; ".join(problems))
