"""Which stored tensors are codes and scales of one tensor of values: names are generated, types and shapes are checked.

    X.weight (float8)              X.weight_scale_inv | X.scale | X.weight_scale      FP8: blocks, rows or one scale
    X.weight (int8, uint8)         X.scale | X.weight_scale                           MXFP4
    X.weight (uint8)               X.weight_scale, X.weight_scale_2                   NVFP4 (ModelOpt)
    X.weight_packed (uint8)        X.weight_scale[, X.weight_global_scale]            MXFP4, NVFP4 (compressed-tensors)

Afterwards such a weight is one tensor of its decoded shape, and nothing else has to know how it is stored. Scales of
activations and caches belong to no weight; they are listed with the tensor they stand beside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from mtp_convert.containers.base import Encoded, Shape, Stored, StoredTensor
from mtp_convert.encodings.dtype import BY_NAME, FLOATS
from mtp_convert.encodings.minifloat import E2M1, E4M3
from mtp_convert.encodings.scheme import Scheme
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.mapping.layout import Layout
from mtp_convert.quantization import Block, Quantization

DECODED = BY_NAME["BF16"]  # what values are unless another type is asked for: the type that these models compute in
CODES = ("F8_E4M3", "F8_E5M2", "U8", "I8")
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8", "F8_E4M3")
POWERS = ("F8_E8M0", "U8")
PACKED = "_packed"
OF_BLOCKS = ("_scale_inv", "_scale")  # after the name of the weight
OF_WHOLE = ("_scale_2", "_global_scale")
UNKNOWN = ("_zero_point", "_g_idx", "_scale_3")
BESIDE = (
    *("input_scale", "input_global_scale", "input_scale_inv", "input_zero_point", "output_scale"),
    *("activation_scale", "q_scale", "k_scale", "v_scale", "kv_scale"),
)
BESIDE_PARENT = ("q_scale", "k_scale", "v_scale", "kv_scale", "prob_output_scale")
ENDINGS = (*OF_BLOCKS, *OF_WHOLE, ".scale", PACKED)
OPEN_FP8: tuple[Block, ...] = ((0, 0), (1, 0), (128, 128), (1, 128), (1, 32))  # where the config says nothing


def stem(weight: str) -> str:
    """The module's part of the name of a weight, with its last dot."""
    return weight.removesuffix("weight")


def of_blocks(weight: str) -> tuple[str, ...]:
    """The names that the scales of a weight's blocks may have."""
    return (*(weight + s for s in OF_BLOCKS), *((stem(weight) + "scale",) if stem(weight) != weight else ()))


def _beside(names: Collection[str]) -> dict[str, str]:
    """The scales of activations and caches, each with the weight that it stands beside."""
    ends = {n.rpartition(".")[2] for n in names}
    here, above = [n for n in BESIDE if n in ends], [n for n in BESIDE_PARENT if n in ends]
    found: dict[str, str] = {}
    for weight in (n.removesuffix(PACKED) for n in names if here or above):
        own = stem(weight)
        if own != weight:
            parent = own[:-1].rpartition(".")[0]
            possible = (*(own + n for n in here), *(f"{parent}.{n}" for n in above))
            found |= {n: weight for n in possible if n in names}
    return found


def renamed(raw: str, weight: str, other: str) -> str:
    """The name of a raw tensor of `weight` if the weight were called `other`."""
    own, new = stem(weight), stem(other)
    if not raw.startswith(own):
        own, new = (s[:-1].rpartition(".")[0] for s in (own, new))
    return new + raw.removeprefix(own)


def called(tensor: StoredTensor, weight: str, other: str) -> StoredTensor:
    """A raw tensor of `weight` under the name that it would have for `other`."""
    return replace(tensor, name=renamed(tensor.name, weight, other))


def encoded_as(encoded: Encoded, other: str) -> Encoded:
    """The raw tensors of a weight under the names that they would have for another one."""
    weight = encoded.codes.name.removesuffix(PACKED)
    scales, whole = (None if t is None else called(t, weight, other) for t in (encoded.scales, encoded.whole))
    return Encoded(encoded.scheme, called(encoded.codes, weight, other), scales, whole)


def count_encodings(found: Iterable[Encoded | None]) -> dict[str, int]:
    """How many weights are stored in which way, the most common one first."""
    return dict(Counter(e.scheme.kind for e in found if e is not None).most_common())


def unlisted(said: Quantization, stored: Stored, layout: Layout) -> tuple[str, ...]:
    """A note about MTP weights that hold values although readers that trust the ignore list will look for scales."""
    if not stored.raw or said.method == "fp8":  # readers of that method know which layers are quantised
        return ()
    mtp = (b for b in layout.bindings.values() if b.parts[0].param.startswith("mtp.") and len(b.shape) == 2)
    values = (b.tensor for b in mtp if stored.tensors[b.tensor].encoding is None)
    plain = [name for name in values if not said.ignores(stem(name).removesuffix("."))]
    if not plain:
        return ()
    return (f"{len(plain)} MTP weights in high precision are on no ignore list of {said.where}, e.g. {plain[0]}",)


@dataclass(frozen=True)
class _Raw:
    """The tensors of the files, the description they are checked against, and the number of chunks of fused weights."""

    tensors: Mapping[str, StoredTensor]
    said: Quantization
    chunks: int
    schemes: dict[tuple[object, ...], Scheme] = field(default_factory=dict)  # by types and shapes, which repeat


def grouped(stored: Stored, said: Quantization, config: Mapping[str, Any]) -> Stored:
    """The same checkpoint with every encoded weight as one tensor of values.

    Args:
        config: the language model's part of config.json.

    Raises:
        ConvertError: MTP031, with everything that does not fit together.
    """
    if not said.known and any(t.dtype.name not in FLOATS and len(t.shape) > 1 for t in stored.tensors.values()):
        problem = Problem("quant_method", said.where, repr(said.method), "fp8, modelopt or compressed-tensors")
        raise ConvertError("MTP031", problem, hint="convert a checkpoint in another precision")
    names = stored.tensors.keys()
    loose = _beside(names)
    if not loose and not any(t.dtype.name in CODES or n.endswith(ENDINGS) for n, t in stored.tensors.items()):
        return replace(stored, warnings=(*stored.warnings, *_not_so(said)))
    heads = config.get("num_key_value_heads")
    raw = _Raw(stored.tensors, said, heads if isinstance(heads, int) and heads > 1 else 1)
    owners = (n.removesuffix(PACKED) for n in names if not n.endswith(ENDINGS[:-1]))
    sides = {s for w in owners for s in _sides(w) if s in names}
    found: dict[str, StoredTensor] = {}
    problems: list[Problem] = []
    for name, tensor in stored.tensors.items():
        if name in loose or name in sides:
            continue
        if not _is_code(raw, name):
            found[name] = tensor
            problems += _plain_problems(raw, name)
            continue
        try:
            found[name.removesuffix(PACKED)] = _logical(raw, name.removesuffix(PACKED), tensor)
        except _Unusable as error:
            problems.append(error.problem)
    problems += _list_problems(said, found)
    if problems:
        raise ConvertError("MTP031", problems, hint="files are missing, or config.json describes another quantisation")
    if not loose and all(t.encoding is None for t in found.values()):
        return replace(stored, warnings=(*stored.warnings, *_not_so(said)))
    claimed = {t.name for e in found.values() if e.encoding is not None for t in e.encoding.raw}
    found |= {n: stored.tensors[n] for n in sorted(sides - claimed - loose.keys())}
    return replace(stored, tensors=found, raw=stored.tensors, beside=loose)


def _not_so(said: Quantization) -> tuple[str, ...]:
    return (f"{said.where} describes {said.method} quantisation, and no weight is stored so",) if said.method else ()


def _sides(weight: str) -> tuple[str, ...]:
    return (*of_blocks(weight), *(weight + s for s in OF_WHOLE))


def _is_code(raw: _Raw, name: str) -> bool:
    """Whether a tensor holds codes: eight-bit floats do, bytes do where a scale stands beside them."""
    if name.endswith("weight" + PACKED) or raw.tensors[name].dtype.name in ("F8_E4M3", "F8_E5M2"):
        return True
    scaled = name.endswith(".weight") or any(s in raw.tensors for s in _sides(name))
    return raw.tensors[name].dtype.name in CODES and scaled


def _plain_problems(raw: _Raw, name: str) -> list[Problem]:
    """A scale beside a weight that holds values."""
    dtype = raw.tensors[name].dtype
    names = [name + s for s in (*OF_BLOCKS, *OF_WHOLE) if name.endswith("weight") and name + s in raw.tensors]
    return [Problem(f"{n} is the scale of {name}, which is not quantised", got=str(dtype)) for n in names]


def _list_problems(said: Quantization, found: Mapping[str, StoredTensor]) -> list[Problem]:
    """Where the tensors and the lists of the config disagree."""
    encoded = [n for n, t in found.items() if t.encoding is not None] if said.ignored else []
    ignored = [n for n in encoded if said.ignores(stem(n).removesuffix("."))]
    plain = [m for m in said.layers if f"{m}.weight" in found and found[f"{m}.weight"].encoding is None]
    return [
        *(Problem(f"{n} is quantised, and the ignore list says it is not", said.where) for n in ignored),
        *(Problem(f"{m} is listed as quantised", said.where, str(found[f"{m}.weight"].dtype)) for m in plain),
    ]


class _Unusable(Exception):
    """A weight whose codes and scales do not make values."""

    def __init__(self, what: str, where: str = "", got: str = "", expected: str = "") -> None:
        super().__init__(what)
        self.problem = Problem(what, where, got, expected)


def _logical(raw: _Raw, weight: str, codes: StoredTensor) -> StoredTensor:
    """The tensor of values that codes and their scales make.

    Raises:
        _Unusable
    """
    tensors = raw.tensors
    where = codes.chunks[0].path.name if codes.chunks else ""
    scales = [tensors[s] for s in of_blocks(weight) if s in tensors]
    whole = [tensors[weight + s] for s in OF_WHOLE if weight + s in tensors]
    if len(scales) > 1 or len(whole) > 1:
        both = ", ".join(t.name for t in (*scales, *whole))
        raise _Unusable(f"{weight} has more than one scale", where, both)
    if codes.name != weight and weight in tensors:
        raise _Unusable(f"{weight} is stored as values and as codes", where, f"{weight}, {codes.name}")
    if unknown := [weight + s for s in UNKNOWN if weight + s in tensors]:
        raise _Unusable(f"{weight} is stored in a way that is not known", where, unknown[0])
    if codes.dtype.name not in CODES or codes.dtype.name == "F8_E5M2" or len(codes.shape) < 2:
        raise _Unusable(f"{codes.name} cannot be read as codes", where, f"{codes.dtype} {list(codes.shape)}")
    if codes.dtype.name == "F8_E4M3" and not scales and raw.said.unscaled:
        return _tensor(weight, codes, Encoded(Scheme(E4M3, (0, 0), scaled=False), codes))
    if not scales:
        expected = " or ".join(n.rpartition(".")[2] for n in of_blocks(weight))
        raise _Unusable(f"{weight} holds codes and has no scale beside it", where, str(codes.dtype), expected)
    key = tuple((t.dtype, t.shape) for t in (codes, *scales, *whole)) + tuple(t.name[len(weight) :] for t in whole)
    scheme = raw.schemes.get(key)
    if scheme is None:
        scheme = raw.schemes[key] = _scheme(raw, weight, codes, scales[0], whole[0] if whole else None)
    return _tensor(weight, codes, Encoded(scheme, codes, scales[0], whole[0] if whole else None))


def _tensor(weight: str, codes: StoredTensor, encoded: Encoded) -> StoredTensor:
    shape = (*codes.shape[:-1], codes.shape[-1] * encoded.scheme.per_byte)
    return StoredTensor(weight, DECODED, shape, codes.chunks, encoded)


def _scheme(raw: _Raw, weight: str, codes: StoredTensor, scales: StoredTensor, whole: StoredTensor | None) -> Scheme:
    """The scheme whose blocks have the shape of the scales.

    Raises:
        _Unusable: none has.
    """
    if scales.dtype.name not in SCALES or (whole is not None and (prod(whole.shape) != 1 or whole.dtype.name != "F32")):
        odd = scales if scales.dtype.name not in SCALES or whole is None else whole
        raise _Unusable(f"{odd.name} cannot be read as a scale", got=f"{odd.dtype} {list(odd.shape)}")
    fp8 = codes.dtype.name == "F8_E4M3"
    nested = scales.dtype.name == "F8_E4M3"
    if nested != (whole is not None) or (fp8 and nested) or (not fp8 and scales.dtype.name not in (*POWERS, "F8_E4M3")):
        got = f"{codes.dtype} codes, {scales.dtype} scales" + (f", {whole.name}" if whole is not None else "")
        raise _Unusable(f"{weight} is stored in a way that is not known", got=got)
    blocks = raw.said.fp8 or OPEN_FP8 if fp8 else raw.said.fp4 or (((1, 16) if nested else (1, 32)),)
    powers = scales.dtype.name in POWERS or (fp8 and raw.said.powers)
    way = "" if whole is None else "over" if whole.name.endswith("_global_scale") else "times"
    base = Scheme(E4M3 if fp8 else E2M1, blocks[0], powers, whole=way)
    shape = (*codes.shape[:-1], codes.shape[-1] * base.per_byte)
    for block in blocks:
        for chunks in dict.fromkeys((1, raw.chunks, 0)):
            scheme = replace(base, block=block, chunks=chunks)
            if _fits(scheme, shape, scales):
                return scheme
    expected = str(list(base.scale_shape(shape)))
    raise _Unusable(f"{scales.name} does not fit {weight} {list(shape)}", "", str(list(scales.shape)), expected)


def _fits(scheme: Scheme, shape: Shape, scales: StoredTensor) -> bool:
    """Whether scales have one entry per block; last dimensions of 1 may be left out."""
    if scheme.chunks > 1 and (shape[-2] % scheme.chunks or not scheme.block[0]):
        return False
    if scheme.chunks == 0:
        return scheme.block == (0, 0) and prod(scales.shape) == 1
    wanted = scheme.scale_shape(shape)
    return _short(scales.shape) == _short(wanted) or (prod(wanted) == 1 and prod(scales.shape) == 1)


def _short(shape: Shape) -> Shape:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape
