"""What is stored more than once must be equal: copies inside a model, and what several ranks repeat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mtp_convert.checkpoint import Checkpoint
from mtp_convert.engine.compare import StoredExtent, compare
from mtp_convert.engine.gather import Reader
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.mapping.plan import Plan, Step
from mtp_convert.reread import reconfigured

POLICIES = ("compare", "use-main", "keep")


@dataclass(frozen=True)
class Settled:
    """A checkpoint whose copies are decided on. own: copies that keep numbers of their own."""

    source: Checkpoint
    notes: tuple[str, ...] = ()
    own: frozenset[str] = frozenset()


def settled(source: Checkpoint, policy: str, to: str) -> Settled:
    """Compare every stored copy with the tensor it copies, and replicas with each other, byte for byte.

    Args:
        policy: what happens to a copy that differs. compare: it is refused; use-main: it is left out of account, and
            said so; keep: both are written. An output head becomes one of its own (`tie_word_embeddings` false), which
            every layout has; other copies exist in their own layout only.
        to: the target layout.

    Raises:
        ConvertError: MTP001 for a policy that does not exist, MTP016 for ranks, MTP026 for copies that differ and
            cannot be kept, with the size of every difference.
    """
    if policy not in POLICIES:
        raise ConvertError("MTP001", Problem("--copies", got=policy, expected=", ".join(POLICIES)))
    problems = _differences(source)
    if not problems:
        return Settled(source)
    if policy == "use-main":
        return Settled(source, tuple(f"{p.what}; the main tensor is used" for p in problems.values()))
    if policy == "keep":
        return _kept(source, problems, to)
    hint = "--copies use-main goes by the main tensors; --copies keep writes both (a head: tie_word_embeddings false)"
    raise ConvertError("MTP026", list(problems.values()), hint=hint)


def _differences(source: Checkpoint) -> dict[str, Problem]:
    """Every copy that differs, and how.

    Raises:
        ConvertError: MTP016 when replicas do.
    """
    reader = Reader()
    problems, disagreeing = {}, []
    try:
        for own, again in source.stored.replicas:
            if (d := compare(StoredExtent(own), StoredExtent(again), reader)) is not None:
                disagreeing.append(Problem(f"{again.name} is not {own.name}: {d.text()}"))
        for name in sorted(source.copies):
            own = source.tensor(source.layout.home[source.layout.copies[name]][0].tensor)
            if (d := compare(StoredExtent(source.tensor(name)), StoredExtent(own), reader)) is not None:
                problems[name] = Problem(f"{name} is not the copy of {own.name} that the config says: {d.text()}")
    finally:
        reader.close()
    if disagreeing:
        raise ConvertError("MTP016", disagreeing)
    return problems


def _kept(source: Checkpoint, problems: Mapping[str, Problem], to: str) -> Settled:
    """Both values of every copy that differs."""
    if source.dims.tied and (found := _untied(source, problems)) is not None:
        note = (
            "the output head differs from the embedding: it is kept as a head of its own, tie_word_embeddings is false"
        )
        rest = settled(found, "keep", to)
        return replace(rest, notes=(note, *rest.notes))
    if to != source.layout.name:
        hint = f"the {to} layout has no tensor for it; --copies use-main goes by the main tensors"
        raise ConvertError("MTP026", list(problems.values()), hint=hint)
    return Settled(source, tuple(f"{p.what}; it keeps its own numbers" for p in problems.values()), frozenset(problems))


def _untied(source: Checkpoint, problems: Mapping[str, Problem]) -> Checkpoint | None:
    """The checkpoint with a head of its own, if a copy that differs is one then."""
    heads = {n for n in problems if source.layout.copies[n] == "embedding"}
    dims = replace(source.dims, tied=False)  # type: ignore[type-var]
    if not heads & source.family.layout(source.layout.name, dims, source.layout.words).bindings.keys():
        return None
    return reconfigured(source, tie_word_embeddings=False)


def with_own(plan: Plan, source: Checkpoint, own: frozenset[str]) -> Plan:
    """The plan of the same layout with the copies in `own` made of themselves instead of their main tensors."""
    return replace(plan, steps=tuple(_of_itself(s, source) if s.tensor in own else s for s in plan.steps))


def _of_itself(step: Step, source: Checkpoint) -> Step:
    binding = source.layout.copy_binding(step.tensor)
    home = {**source.layout.home, **{part.param: (binding, part.view) for part in binding.parts}}
    return replace(step, source=replace(source.layout, home=home))
