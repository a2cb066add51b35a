"""What a checkpoint says about its quantisation, in config.json or in ModelOpt's hf_quant_config.json.

The tensors themselves decide what is encoded (`encoded.py`); this is what they are checked against, and what has to be
written beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from pathlib import Path
from typing import Any

HF_QUANT = "hf_quant_config.json"
SECTIONS = ("quantization_config", "compression_config")  # of config.json, at its top or in the language model's part
OTHER_FIELDS = ("expert_dtype",)  # say something about stored types elsewhere
KNOWN = ("fp8", "modelopt", "modelopt_fp4", "modelopt_mixed", "compressed-tensors", "mxfp4", "mxfp8")
LISTS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
Block = tuple[int, int]  # rows and columns under one scale; 0 is all


@dataclass(frozen=True)
class Quantization:
    """A checkpoint's own description.

    method: empty where nothing is said. fp8, fp4: the blocks that e4m3 and e2m1 weights may have; empty where that is
    left open. powers: scales are powers of two. ignored: patterns of modules that are not quantised. layers: modules
    that are said to be, by name. unscaled: e4m3 weights without a scale are values.
    """

    method: str = ""
    where: str = "config.json"
    fp8: tuple[Block, ...] = ()
    fp4: tuple[Block, ...] = ()
    powers: bool = False
    ignored: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    unscaled: bool = False

    @property
    def known(self) -> bool:
        """Whether the method is one that this package reads."""
        return not self.method or self.method in KNOWN

    def ignores(self, module: str) -> bool:
        """Whether an ignore list names a module, or a module that contains it."""
        parts = module.split(".")
        names, _, expressions = self._patterns
        ends = (".".join(parts[i:]) for i in range(1, len(parts)))
        return self._inside(module) or any(n in names for n in ends) or any(e.match(module) for e in expressions)

    def _inside(self, module: str) -> bool:
        """Whether a name or a glob covers a module; what contains many modules is looked at once."""
        found = self._seen.get(module)
        if found is None:
            names, globs, _ = self._patterns
            parent = module.rpartition(".")[0]
            found = module in names or bool(globs.fullmatch(module)) or (bool(parent) and self._inside(parent))
            self._seen[module] = found
        return found

    @cached_property
    def _seen(self) -> dict[str, bool]:
        return {}

    @cached_property
    def _patterns(self) -> tuple[frozenset[str], re.Pattern[str], tuple[re.Pattern[str], ...]]:
        """Names or their last parts; ModelOpt's globs in one; compressed-tensors' marked regular expressions."""
        marked = [p.removeprefix("re:") for p in self.ignored if p.startswith("re:")]
        globs = [p for p in self.ignored if not p.startswith("re:") and any(c in p for c in "*?[")]
        names = frozenset(self.ignored) - frozenset(globs)
        combined = re.compile("|".join(map(translate, globs)) or r"\Z.")
        return names, combined, tuple(e for e in map(_compiled, marked) if e is not None)


def _compiled(expression: str) -> re.Pattern[str] | None:
    """A pattern from a file; one that is none matches nothing."""
    try:
        return re.compile(expression)
    except re.error:
        return None


def read(config: Mapping[str, Any], section: tuple[str, ...], folder: Path) -> Quantization:
    """The description in a config (or in the language model's `section` of it), else in hf_quant_config.json."""
    for part in _parts(config, section):
        for name in SECTIONS:
            if isinstance(part.get(name), dict) and part[name]:
                return _read(part[name], "config.json")
    path = folder / HF_QUANT
    if path.is_file():
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            data = None
        found = data.get("quantization") if isinstance(data, dict) else None
        if isinstance(found, dict):
            return _read({"quant_method": "modelopt", **found}, HF_QUANT)
    dtypes = [part.get(f) for part in _parts(config, section) for f in ("dtype", "torch_dtype")]
    return Quantization(unscaled="float8_e4m3fn" in dtypes)


def _parts(config: Mapping[str, Any], section: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    yield config
    for name in section:
        config = config[name]
        yield config


def _read(data: Mapping[str, Any], where: str) -> Quantization:
    layers = data.get("quantized_layers")
    fp8, fp4 = _blocks(data)
    return Quantization(
        method=str(data.get("quant_method", "")),
        where=where,
        fp8=fp8,
        fp4=fp4,
        powers=data.get("scale_fmt") == "ue8m0",
        ignored=tuple(str(p) for name in LISTS if isinstance(data.get(name), list) for p in data[name]),
        layers=tuple(layers) if isinstance(layers, dict) else (),
    )


def _blocks(data: Mapping[str, Any]) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    """Blocks of e4m3 and of e2m1 weights."""
    if (block := _block(data.get("weight_block_size"))) is not None:
        return (block,), ()
    groups = data.get("config_groups")
    found: tuple[list[Block], list[Block]] = [], []
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and (block := _group_block(weights)) is not None:
            found[weights.get("num_bits") == 4].append(block)
    return tuple(dict.fromkeys(found[0])), tuple(dict.fromkeys(found[1]))


def _group_block(weights: Mapping[str, Any]) -> Block | None:
    strategy, size, structure = (weights.get(f) for f in ("strategy", "group_size", "block_structure"))
    if strategy == "block":
        return _block(structure)
    if isinstance(size, int) and size > 0:
        return 1, size
    return {"tensor": (0, 0), "channel": (1, 0)}.get(str(strategy))


def _block(value: object) -> Block | None:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value):
        return value[0], value[1]
    return None


def without(config: Mapping[str, Any], section: tuple[str, ...]) -> dict[str, Any]:
    """The config of the same model in high precision."""
    found = {k: v for k, v in config.items() if k not in (*SECTIONS, *OTHER_FIELDS)}
    for name in ("dtype", "torch_dtype"):
        if str(found.get(name)).startswith("float8"):
            found[name] = "bfloat16"
    if section:
        found[section[0]] = without(config[section[0]], section[1:])
    return found


def with_fields(config: Mapping[str, Any], before: Mapping[str, Any], section: tuple[str, ...]) -> dict[str, Any]:
    """`config` with everything that `before` says about quantisation."""
    said = {k: v for k, v in before.items() if k in (*SECTIONS, *OTHER_FIELDS)}
    # Where nothing else was changed, the fields return to their places.
    found = {k: config.get(k, said.get(k)) for k in before if k in config or k in said}
    found |= {k: v for k, v in config.items() if k not in found}
    if section and section[0] in before:
        found[section[0]] = with_fields(config[section[0]], before[section[0]], section[1:])
    return found


def fp8_config(block: Block, unquantised: Collection[str], *, powers: bool) -> dict[str, Any]:
    """`quantization_config` of FP8 blocks, with the modules that are left alone."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": sorted(unquantised),
        "quant_method": "fp8",
        **({"scale_fmt": "ue8m0"} if powers else {}),
        "weight_block_size": list(block),
    }


def mxfp4_config(unquantised: Collection[str]) -> dict[str, Any]:
    """`quantization_config` of MXFP4 weights as compressed-tensors writes it."""
    weights = {
        "dynamic": False,
        "group_size": 32,
        "num_bits": 4,
        "scale_dtype": "torch.uint8",
        "strategy": "group",
        "symmetric": True,
        "type": "float",
    }
    group = {"format": "mxfp4-pack-quantized", "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group},
        "format": "mxfp4-pack-quantized",
        "ignore": sorted(unquantised),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
