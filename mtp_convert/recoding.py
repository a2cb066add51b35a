"""How the weights of a target are stored: as values, as codes with the scales they had, or as new codes.

Nothing is quantised unless it is asked for. `--encoding source` gives every weight the form it had in the Hugging Face
folder that it came from; a block of values that nobody changed becomes the bytes that it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mtp_convert import quantization
from mtp_convert.before import Before, before
from mtp_convert.checkpoint import Checkpoint
from mtp_convert.containers.base import Encoded, Shape, StoredTensor
from mtp_convert.encoded import called, count_encodings, encoded_as, stem
from mtp_convert.encodings.dtype import BY_NAME, FLOATS, DType
from mtp_convert.encodings.minifloat import E2M1, E4M3
from mtp_convert.encodings.scheme import Scheme
from mtp_convert.engine.compare import StoredExtent
from mtp_convert.engine.encode import CodedExtent, Coder
from mtp_convert.engine.sinks import Out, OutRaw, OutTensor
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.location import CARRIED
from mtp_convert.mapping.plan import Plan, Step
from mtp_convert.options import Options
from mtp_convert.quantization import HF_QUANT
from mtp_convert.sidecar import SOURCE_ENCODING, Said

ENCODINGS = ("auto", "source", "bf16", "fp8-block", "mxfp4")
FP8_BLOCK = Scheme(E4M3, (128, 128))
FP8_POWERS = Scheme(E4M3, (128, 128), powers=True)
MXFP4 = Scheme(E2M1, (1, 32), powers=True)


@dataclass(frozen=True)
class Recoding:
    """How a target is stored.

    weights: the raw tensors of every weight that is stored as codes; bytes among them are the scales it had. copied:
    those whose raw tensors are the source's own. beside: stored tensors that go along with a target tensor. said: what
    the target's config says.
    """

    said: Said
    weights: Mapping[str, Encoded] = field(default_factory=dict)
    copied: frozenset[str] = frozenset()
    beside: Mapping[str, tuple[StoredTensor, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def out(self, tensor: OutTensor, source: Mapping[str, StoredTensor]) -> list[Out]:
        """What is written for one target tensor."""
        along = [OutRaw(t.name, t.dtype, t.shape, StoredExtent(t)) for t in self.beside.get(tensor.name, ())]
        encoded = self.weights.get(tensor.name)
        if encoded is None:
            return [tensor, *along]
        if tensor.name in self.copied:
            return [*(OutRaw(t.name, t.dtype, t.shape, StoredExtent(t)) for t in encoded.raw), *along]
        types = {source[n].dtype for n in tensor.step.sources}
        coder = Coder(tensor.step, source, types.pop() if len(types) == 1 else BY_NAME["F32"], encoded)
        raw = {"codes": encoded.codes, "scales": encoded.scales, "whole": encoded.whole}
        parts = ((role, t) for role, t in raw.items() if t is not None)
        return [*(OutRaw(t.name, t.dtype, t.shape, CodedExtent(coder, role)) for role, t in parts), *along]


def recoding(source: Checkpoint, plan: Plan, options: Options) -> Recoding:
    """Choose how the target is stored.

    Raises:
        ConvertError: MTP001 for an option that this target does not have, MTP028 when the form that is asked for is not
            known or does not fit, MTP031 when what is known does not fit together.
    """
    if options.encoding not in ENCODINGS:
        raise ConvertError("MTP001", Problem("--encoding", got=options.encoding, expected=", ".join(ENCODINGS)))
    as_it_is = Said(source.config, source.config, source.config_path, _quant_file(source))
    if options.to != CARRIED:
        if options.encoding not in ("auto", "bf16"):
            raise ConvertError(
                "MTP001",
                Problem(f"--encoding for a {options.to} target", got=options.encoding, expected="auto or bf16"),
                hint="this layout holds high precision; scales travel along, so that going back can restore them",
            )
        said = as_it_is if options.to == "megatron" else _plain(source)  # below hf/ the config is a keepsake
        return Recoding(said, notes=_decoded_note(source))
    here = source.layout.name == CARRIED
    coded = any(t.encoding is not None for t in source.stored.tensors.values())
    if options.encoding == "auto" and here and coded and options.dtype == "auto":
        return _same_folder(source, plan, as_it_is)
    if options.encoding in ("auto", "bf16"):
        return Recoding(_plain(source), notes=_plain_notes(source, options))
    known = before(source)
    if options.encoding == "source":
        if known is None:
            raise _unknown()
        return _same_folder(source, plan, as_it_is) if here else _returning(source, plan, known)
    return _new(source, plan, options.encoding, known)


def _quant_file(source: Checkpoint) -> Path | None:
    path = source.located.side / HF_QUANT
    return path if path.is_file() else None


def _plain(source: Checkpoint) -> Said:
    return Said(quantization.without(source.config, source.section), source.config, source.config_path, None)


def _decoded_note(source: Checkpoint) -> tuple[str, ...]:
    kinds = count_encodings(t.encoding for t in source.stored.tensors.values())
    if not kinds:
        return ()
    text = ", ".join(f"{n} x {kind}" for kind, n in kinds.items())
    return (f"weights decoded: {text}; on the way back --encoding source gives the same bytes",)


def once_coded(source: Checkpoint) -> tuple[str, ...]:
    """A note about weights that hold values now, and whose codes can come back."""
    kept = (source.located.side / SOURCE_ENCODING).is_dir()
    if not kept or any(t.encoding is not None for t in source.stored.tensors.values()):
        return ()
    return ("these weights were stored as codes once; on the way to hf, --encoding source gives that form back",)


def _plain_notes(source: Checkpoint, options: Options) -> tuple[str, ...]:
    notes = list(once_coded(source)) if options.encoding == "auto" else []
    if source.stored.beside:
        notes.append(f"{len(source.stored.beside)} scales of activations or caches are not carried over")
    return tuple(notes)


def _unknown() -> ConvertError:
    problem = Problem("--encoding source", got="a checkpoint that does not say how its weights were stored")
    hint = "give the original folder with --hf-config, or choose a form with --encoding fp8-block or mxfp4"
    return ConvertError("MTP028", problem, hint=hint)


def _same_folder(source: Checkpoint, plan: Plan, said: Said) -> Recoding:
    """Every weight in the form that it has: its raw tensors are copied, unless several are averaged."""
    weights, copied, beside, problems = {}, set(), {}, []
    owners: dict[str, list[str]] = {}
    for raw, owner in source.stored.beside.items():
        owners.setdefault(owner, []).append(raw)
    for step in plan.steps:
        first = source.tensor(step.sources[0])
        along = [source.stored.raw[n] for n in owners.get(first.name, ())]
        beside[step.tensor] = tuple(called(t, first.name, step.tensor) for t in along)
        if all(source.tensor(n).encoding is None for n in step.sources):
            continue
        if first.encoding is None or first.shape != step.shape:
            problems.append(Problem(f"{step.tensor} is made of {', '.join(step.sources)} ({step.op})"))
            continue
        weights[step.tensor] = encoded_as(first.encoding, step.tensor)
        if step.op in ("copy", "rename"):
            copied.add(step.tensor)
    if problems:
        hint = "codes of one tensor cannot be spread over others; --encoding bf16 decodes them"
        raise ConvertError("MTP028", problems, hint=hint)
    return Recoding(said, weights, frozenset(copied), beside)


def _returning(source: Checkpoint, plan: Plan, known: Before) -> Recoding:
    """Every weight in the form that it had in the Hugging Face folder."""
    was = known.stored
    weights, problems = {}, []
    for step in plan.steps:
        tensor = was.tensors.get(step.tensor)
        if tensor is None or tensor.encoding is None:
            if tensor is None and known.encoded:
                problems.append(Problem(f"nothing says how {step.tensor} was stored"))
            continue
        if tensor.shape != step.shape:
            problems.append(Problem(step.tensor, "the kept record", str(list(tensor.shape)), str(list(step.shape))))
        weights[step.tensor] = tensor.encoding
    lost = [t.name for e in weights.values() for t in (e.scales, e.whole) if t is not None and not t.chunks]
    problems += [Problem(f"{name} was not kept") for name in lost]
    if problems:
        hint = "give the original folder with --hf-config, or choose another form with --encoding"
        raise ConvertError("MTP028", problems, hint=hint)
    beside: dict[str, list[StoredTensor]] = {}
    for raw, owner in was.beside.items():
        if was.raw[raw].chunks:
            beside.setdefault(owner, []).append(was.raw[raw])
    config = quantization.with_fields(source.config, known.config, source.section)
    said = Said(config, known.config, known.config_path, known.quant_path)
    return Recoding(said, weights, frozenset(), {n: tuple(ts) for n, ts in beside.items()})


def _new(source: Checkpoint, plan: Plan, encoding: str, known: Before | None) -> Recoding:
    """New codes: for the weights that had some, else for every linear weight that is not sensitive."""
    had = {n for n, t in known.stored.tensors.items() if t.encoding is not None} if known else set()
    floats = [s for s in plan.steps if all(source.tensor(n).dtype.name in FLOATS for n in s.sources)]
    linear = [s for s in floats if (s.tensor in had if had else _is_linear(s))]
    experts = [s for s in linear if "experts" in s.binding.parts[0].param.split(".")]
    scale = _scale_name(source, known)
    whole = [s for s in experts or linear if s.shape[-1] % MXFP4.block[1] == 0]  # no reader knows partial blocks
    fp4 = {s.tensor for s in whole} if encoding == "mxfp4" else set()
    weights = {}
    for step in linear:
        if step.tensor in fp4:
            weights[step.tensor] = _mxfp4(step.tensor, step.shape, packed=scale != "scale")
        elif encoding == "fp8-block" or scale == "scale":
            weights[step.tensor] = _fp8(step.tensor, step.shape, powers=scale == "scale")
    plain = [s.tensor for s in plan.steps if s.tensor not in weights and len(s.binding.shape) == 2]
    modules = [stem(n).removesuffix(".") for n in plain if n.endswith(".weight")]
    config = quantization.without(source.config, source.section)
    if fp4 and scale != "scale":
        config["quantization_config"] = quantization.mxfp4_config(modules)
    else:
        powers = scale == "scale"
        config["quantization_config"] = quantization.fp8_config(FP8_BLOCK.block, modules, powers=powers)
        if fp4:
            config["expert_dtype"] = "fp4"
    if not weights:
        raise ConvertError("MTP028", Problem(f"--encoding {encoding}", got="no weight that could be stored so"))
    return Recoding(Said(config, source.config, source.config_path, None), weights)


def _is_linear(step: Step) -> bool:
    """Whether a target tensor is a weight of a linear layer that releases quantise."""
    binding = step.binding
    if binding.high_precision or binding.unquantised or binding.vocab or not step.tensor.endswith(("weight", "_proj")):
        return False
    return len(step.shape) - binding.stacked == 2 and 1 not in step.shape[-2:]


def _scale_name(source: Checkpoint, known: Before | None) -> str:
    """The last word of the names of scales: as before, else as the family's releases have them."""
    for tensor in known.stored.tensors.values() if known else ():
        if tensor.encoding is not None and tensor.encoding.scales is not None:
            return "scale" if tensor.encoding.scales.name.endswith(".scale") else "weight_scale_inv"
    return source.family.scales


def _fp8(weight: str, shape: Shape, *, powers: bool) -> Encoded:
    scheme = FP8_POWERS if powers else FP8_BLOCK
    scales = stem(weight) + "scale" if powers else weight + "_scale_inv"
    return _described(scheme, shape, (weight, "F8_E4M3"), (scales, "F8_E8M0" if powers else "F32"))


def _mxfp4(weight: str, shape: Shape, *, packed: bool) -> Encoded:
    if packed:
        return _described(MXFP4, shape, (weight + "_packed", "U8"), (weight + "_scale", "U8"))
    return _described(MXFP4, shape, (weight, "I8"), (stem(weight) + "scale", "F8_E8M0"))


def _described(scheme: Scheme, shape: Shape, codes: tuple[str, str], scales: tuple[str, str]) -> Encoded:
    """Raw tensors that hold nothing yet."""

    def tensor(name: str, dtype: DType, sizes: Shape) -> StoredTensor:
        return StoredTensor(name, dtype, sizes, ())

    return Encoded(
        scheme,
        tensor(codes[0], BY_NAME[codes[1]], scheme.stored_shape(shape)),
        tensor(scales[0], BY_NAME[scales[1]], scheme.scale_shape(shape)),
    )
