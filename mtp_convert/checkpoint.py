"""Opens a checkpoint of any container and layout and checks it against its config, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from mtp_convert import adapters, encoded, quantization
from mtp_convert.containers import megatron_legacy, safetensors, torch_dist
from mtp_convert.containers.base import Stored, StoredTensor
from mtp_convert.containers.megatron_legacy import RankFile
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.location import LAYOUTS, PROVENANCE, Located, locate
from mtp_convert.mapping.family import ConfigError, Dims, Family, Names, count_stored, with_depths
from mtp_convert.mapping.layout import Binding, Layout
from mtp_convert.parts import PARTS, part_of
from mtp_convert.sharding.assemble import Contents, sharded, whole

MOST_LISTED = 20
READERS: dict[str, Callable[[Path], Stored | dict[str, RankFile]]] = {
    "safetensors": safetensors.read,
    "torch_dist": torch_dist.read,
    "legacy": megatron_legacy.read,
}


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint: what is stored, what the config says, and the layout that explains it.

    steps: MTP depths that run; repeated: whether they share one stored depth. copies: copy tensors that are stored.
    """

    located: Located
    stored: Stored
    config_path: Path
    config: Mapping[str, Any]
    section: tuple[str, ...]
    family: Family
    dims: Dims
    layout: Layout
    steps: int
    repeated: bool
    copies: frozenset[str]
    unmapped: tuple[str, ...]
    provenance: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def model_config(self) -> Mapping[str, Any]:
        """The section of the config that describes the language model."""
        return section_of(self.config, self.section)

    def tensor(self, name: str) -> StoredTensor:
        """A stored tensor."""
        return self.stored.tensors[name]


def open_checkpoint(
    path: Path | Located,
    *,
    read: Callable[[], Stored] | None = None,
    layout: str | None = None,
    hf_config: Path | None = None,
    allow_unmapped: bool = False,
) -> Checkpoint:
    """Read headers and config of a checkpoint and check that they explain each other completely.

    Args:
        path: a folder, or one that was recognised already. read: gives what is stored, where not all of it is there.
        layout: the layout that the caller counts on; None takes what is there.

    Raises:
        ConvertError: exit code 2 for another layout, 3 for damaged files, 4 when config and tensors disagree.
    """
    located = path if isinstance(path, Located) else locate(path)
    if layout is not None and layout not in LAYOUTS[located.container]:
        raise _other_layout(located, located.layout, layout)
    raw = READERS[located.container](located.weights) if read is None else read()
    return explained(raw, located, layout=layout, hf_config=hf_config, allow_unmapped=allow_unmapped)


def explained(
    raw: Stored | dict[str, RankFile],
    located: Located,
    *,
    layout: str | None = None,
    hf_config: Path | None = None,
    allow_unmapped: bool = False,
) -> Checkpoint:
    """What is stored, and the config and layout that explain all of it.

    Raises:
        ConvertError: as `open_checkpoint`.
    """
    if isinstance(raw, Stored):
        located = replace(located, container=raw.container)  # files of one name may hold one of two
    if hf_config is not None and hf_config.is_dir():
        located = replace(located, side=hf_config)  # its tokenizer and other files travel along
    config_path = hf_config if hf_config is not None and hf_config.is_file() else located.side / "config.json"
    config = read_config(config_path, located)
    family, section = adapters.find(config)
    model = section_of(config, section)
    said = quantization.read(config, section, located.side)
    if isinstance(raw, Stored) and raw.container in ("safetensors", "joined"):
        raw = encoded.grouped(raw, said, model)
    _refuse_foreign(family, model, frozenset(raw.tensors) if isinstance(raw, Stored) else frozenset())
    noted = _provenance(located)
    try:
        sizes = {**model, **adapters.decided(config, section)}
        found = _match(raw, located, family, sizes, noted=noted, wanted=layout)
    except ConfigError as error:
        hint = "correct config.json, or give the right one with --hf-config"
        raise ConvertError("MTP020", Problem(str(error), "config.json"), hint=hint) from error
    located, notes = replace(located, layout=found.layout.name), found.notes
    stored = found.contents.stored(found.layout)
    copies, unmapped = _agree(found.layout, stored, allow_unmapped)
    if unmapped:
        notes += (f"{len(unmapped)} stored tensors are not part of {family.name} and stay behind",)
    notes += encoded.unlisted(said, stored, found.layout)
    read = (located, stored, config_path, config, section, family, found.dims, found.layout)
    return Checkpoint(*read, found.steps, found.repeated, copies, unmapped, noted, notes + stored.warnings)


class _Match(NamedTuple):
    """The sizes and the layout that explain what is stored, and the MTP depths that run."""

    contents: Contents
    dims: Dims
    layout: Layout
    steps: int
    repeated: bool
    notes: tuple[str, ...]


def _match(
    raw: Stored | dict[str, RankFile],
    located: Located,
    family: Family,
    config: Mapping[str, Any],
    *,
    noted: Mapping[str, Any],
    wanted: str | None,
) -> _Match:
    """Find the layout, and count the depths by what is stored."""
    declared = family.depths.declared(config)
    dims = family.dims(config, declared)
    contents = whole(raw) if isinstance(raw, Stored) else sharded(raw, located.weights, family, dims)
    names = contents.names
    found = _recognise(family, dims, names, located=located, noted=noted, wanted=wanted)
    physical = family.stored_depths(found, dims, names)
    counted = declared if family.depths.counts(config) else physical
    steps, repeated, notes = _depths(counted, physical, contents.arguments, noted, family.depths.name)
    if physical != declared:
        dims = with_depths(dims, physical)
        found = family.fit(found.name, dims, names, family.fixed(found.name, located.container))
    if part := _noted_part(noted):
        found = part_of(found, part)
        notes += ("only the MTP heads are here; `mtp-convert graft` puts them onto a model",)
    return _Match(contents, dims, found, steps, repeated, notes)


def _refuse_foreign(family: Family, config: Mapping[str, Any], names: frozenset[str]) -> None:
    """A model of another kind under the same `model_type` must not be read by halves.

    Raises:
        ConvertError: MTP021, naming what it is.
    """
    found = [
        Problem(f"{sign} means {what}") for sign, what in family.foreign.items() if sign in names or config.get(sign)
    ]
    if found:
        raise ConvertError("MTP021", found, hint=f"{family.name} is another model; nothing is read by halves")


def _recognise(
    family: Family,
    dims: Dims,
    names: Names,
    *,
    located: Located,
    noted: Mapping[str, Any],
    wanted: str | None,
) -> Layout:
    """The layout of the container that explains most of the stored names.

    Where several explain as many, the one that is wanted, else the one noted when the folder was written.
    """
    target = noted.get("target")
    first = wanted or (target.get("layout") if isinstance(target, dict) else None)
    candidates = [n for n in LAYOUTS[located.container] if n in family.choices]
    found: dict[str, tuple[int, Layout]] = {}
    for name in sorted(candidates, key=lambda n: n != first):
        layout = family.fit(name, dims, names, family.fixed(name, located.container))
        found[name] = count_stored(names, layout.bindings), layout
        if found[name][0] == len(layout.bindings):
            break
    best = max(found, key=lambda n: found[n][0])
    if wanted is not None and best != wanted:
        raise _other_layout(located, best, wanted)
    return found[best][1]


def _noted_part(noted: Mapping[str, Any]) -> str:
    """Which part of a model an earlier run wrote here; empty for all of it."""
    target = noted.get("target")
    part = target.get("part") if isinstance(target, dict) else ""
    return part if part in PARTS else ""


def _other_layout(located: Located, found: str, wanted: str) -> ConvertError:
    hint = f"use `mtp-convert convert {located.given} DST --to ...`, which detects the source"
    return ConvertError("MTP003", Problem("source layout", str(located.given), found, wanted), hint=hint)


def section_of(config: Mapping[str, Any], section: tuple[str, ...]) -> Mapping[str, Any]:
    """The part of a config that lies below these fields."""
    for field in section:
        config = config[field]
    return config


def read_config(path: Path, located: Located) -> dict[str, Any]:
    """config.json as a dict.

    Raises:
        ConvertError: MTP020.
    """
    hint = "give it with --hf-config" + ("" if located.layout == "megatron" else ", or copy it into the folder")
    if not path.is_file():
        raise ConvertError("MTP020", Problem("no config.json", str(path)), hint=hint)
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConvertError("MTP020", Problem(f"not JSON: {error}", str(path)), hint=hint) from error
    if not isinstance(config, dict):
        raise ConvertError("MTP020", Problem("not a JSON object", str(path)), hint=hint)
    return config


def _provenance(located: Located) -> dict[str, Any]:
    path = located.root / PROVENANCE
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _depths(
    declared: int, physical: int, arguments: Mapping[str, object], provenance: Mapping[str, Any], name: str
) -> tuple[int, bool, tuple[str, ...]]:
    """Steps that run, whether one depth is repeated, and what to tell the user.

    A config that declares several depths over one stored depth describes a repeated layer (Megatron-Bridge exported
    such folders). Megatron's own arguments say it outright, and an earlier conversion noted it.
    """
    steps = _repeated_steps(arguments, provenance) if physical == 1 and declared <= 1 else 0
    if steps > 1 and declared == physical:
        return steps, True, ()
    if declared == physical:
        return physical, False, ()
    if declared > 1 and physical == 1:
        note = f"the config declares {declared} MTP depths over one stored depth: treated as a repeated layer"
        return declared, True, (note,)
    raise ConvertError(
        "MTP025",
        Problem(
            name,
            "config.json",
            str(declared),
            f"{physical}, the stored MTP depths",
        ),
        hint=f"set {name} to {physical} if the weights are complete"
        + ("; else fetch the missing MTP tensors" if declared > physical else ""),
    )


def _repeated_steps(arguments: Mapping[str, object], provenance: Mapping[str, Any]) -> int:
    """How often the one stored depth runs, if that is known from elsewhere than the config; else 0."""
    args, mtp = arguments.get("args"), provenance.get("mtp")
    if isinstance(args, dict) and args.get("mtp_use_repeated_layer"):
        steps = args.get("mtp_num_layers")
    elif isinstance(mtp, dict) and mtp.get("repeated_layer") is True and not args:
        steps = mtp.get("steps")
    else:
        steps = 0
    return steps if isinstance(steps, int) and 0 < steps < 2**16 else 0


def _agree(layout: Layout, stored: Stored, allow_unmapped: bool) -> tuple[frozenset[str], tuple[str, ...]]:
    """Every disagreement of the layout with what is stored, by kind. Returns stored copies and unmapped tensors."""
    missing = [n for n in layout.bindings if n not in stored.tensors]
    copies = frozenset(layout.copies.keys() & stored.tensors.keys())
    unexpected = sorted(stored.tensors.keys() - layout.bindings.keys() - copies)
    if missing:
        raise ConvertError("MTP022", _missing(missing, unexpected), hint=_missing_hint(unexpected))
    if unexpected and not allow_unmapped:
        files = [stored.tensors[n].chunks[0].path.name for n in unexpected]
        raise ConvertError(
            "MTP023",
            [Problem(f"{n} has no place in this model", w) for n, w in zip(unexpected, files, strict=True)],
            hint="correct the config, or leave them behind with --allow-unmapped",
        )
    wrong = []
    for binding in (*layout.bindings.values(), *map(layout.copy_binding, copies)):
        tensor = stored.tensors[binding.tensor]
        if not _fits(tensor, binding):
            where = tensor.chunks[0].path.name
            wrong.append(Problem(binding.tensor, where, str(list(tensor.shape)), str(list(binding.shape))))
    if wrong:
        raise ConvertError("MTP024", wrong, hint="config.json describes another model than the one stored")
    return copies, tuple(unexpected)


def _missing(missing: list[str], unexpected: list[str]) -> list[Problem]:
    """The missing names; with a few of them it is worth looking for near misses among the unexpected ones."""
    near = missing[:MOST_LISTED] if unexpected else []
    found = {n: get_close_matches(n, unexpected, 1, 0.8) for n in near}
    return [Problem(f"{n} is not stored", got=found[n][0] if found.get(n) else "") for n in missing]


def _missing_hint(unexpected: list[str]) -> str:
    more = f"; {len(unexpected)} stored tensors are unknown, e.g. {unexpected[0]}" if unexpected else ""
    return f"the checkpoint is incomplete or config.json describes another model{more}"


def _fits(tensor: StoredTensor, binding: Binding) -> bool:
    """Equal shapes; Megatron pads the vocabulary rows."""
    if tensor.shape == binding.shape:
        return True
    return binding.vocab and tensor.shape[1:] == binding.shape[1:] and tensor.shape[0] > binding.shape[0]
