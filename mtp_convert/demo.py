"""The main job on a tiny trained model, told step by step, with a verdict at the end."""

from __future__ import annotations

import filecmp
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.convert import Result, prepare, run
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.inspection import inspect_checkpoint
from mtp_convert.options import Options
from mtp_convert.render import depth_text, facts, paint
from mtp_convert.summary import size_text

FIXTURE, TEXT = "tiny-nemotron-h", "heldout.txt"
TOLERANCE = 2e-4  # float32; a wrong mapping gives 0.3 and more
WINDOWS, LENGTH = 8, 256  # held-out bytes that are run


@dataclass(frozen=True)
class Check:
    """One line of the final summary."""

    name: str
    value: str
    ok: bool


def shipped(relative: str) -> Path:
    """A file of the shipped demo, in the repository or in the installed package."""
    package = Path(__file__).parent
    for base in (
        package / "_demo",
        package.parent / "fixtures",
        package.parent / "fixtures" / "text",
    ):
        if (base / relative).exists():
            return base / relative
    raise ConvertError("MTP002", Problem("the demo's files are not installed", relative))


def run_demo(folder: Path | None = None) -> int:
    """Tell the story; 0 when every check holds, 5 when one does not."""
    begin = monotonic()
    source = folder or shipped(FIXTURE)
    with tempfile.TemporaryDirectory(prefix="mtp-convert-demo-") as scratch:
        there, back = Path(scratch) / "megatron", Path(scratch) / "hf"
        _say(1, f"inspect {source.name}")
        found = inspect_checkpoint(open_checkpoint(source))
        mtp = depth_text(found.mtp_stored_depths, found.mtp_steps, found.mtp_repeated_layer)
        facts(
            [
                ("family", found.title),
                ("size", f"{size_text(found.nbytes)} in {found.tensors} tensors"),
                ("MTP", f"{mtp}, {found.mtp_tensors} tensors"),
            ]
        )
        _say(2, f"hf-to-megatron {source.name} {there.name}")
        _wrote(run(prepare(open_checkpoint(source), Options("megatron")), there))
        _say(3, f"megatron-to-hf {there.name} {back.name}")
        _wrote(run(prepare(open_checkpoint(there), Options("hf")), back))
        _say(4, "compare every file byte by byte")
        checks = [_same_files(source, back)]
        _say(
            5,
            "run the source with transformers, the conversion by Megatron's names, the return with transformers",
        )
        checks += _forward(source, there, back)
    return _summary(checks, monotonic() - begin)


def _say(number: int, text: str) -> None:
    print(f"\n{paint(f'[{number}/5]', 'cyan')} {paint(text, 'bold')}")


def _wrote(result: Result) -> None:
    rate = size_text(result.nbytes / result.seconds)
    facts(
        [
            (
                "wrote",
                f"{size_text(result.nbytes)}, {result.tensors} tensors, {result.seconds:.2f} s, {rate}/s",
            )
        ]
    )


def _same_files(source: Path, back: Path) -> Check:
    names = sorted(p.name for p in source.iterdir() if p.is_file())
    _, mismatch, errors = filecmp.cmpfiles(source, back, names, shallow=False)
    differing = [*mismatch, *errors]
    value = f"{len(names)} files identical" if not differing else f"different: {', '.join(differing)}"
    return Check("files after the round trip", value, not differing)


def _forward(source: Path, there: Path, back: Path) -> list[Check]:
    import torch

    from mtp_convert.verify.forward import relative_error, run_hf, run_megatron

    data = shipped(TEXT).read_bytes()[: WINDOWS * LENGTH]
    ids = torch.tensor(list(data)).reshape(WINDOWS, LENGTH)
    sides = {
        "source (transformers)": run_hf(source, ids),
        "Megatron (its own names)": run_megatron(open_checkpoint(there).stored, ids),
        "returned (transformers)": run_hf(back, ids),
    }
    reference = sides["source (transformers)"]
    checks = []
    for name, side in sides.items():
        facts([(name, f"depth-1 drafts accepted: {side.acceptance():.1%}")])
        if side is not reference:
            for part, a, b in (
                ("logits", side.logits, reference.logits),
                ("MTP logits", side.mtp_logits[0], reference.mtp_logits[0]),
            ):
                error = relative_error(a, b)
                checks.append(Check(f"{part}, {name}", f"relative error {error:.1e}", error < TOLERANCE))
    return checks


def _summary(checks: list[Check], seconds: float) -> int:
    print()
    for c in checks:
        mark = paint("ok  ", "green") if c.ok else paint("FAIL", "red")
        print(f"  {mark} {c.name:<44} {c.value}")
    ok = all(c.ok for c in checks)
    verdict = "the conversion is exact, both ways" if ok else "the conversion is WRONG"
    print(f"\n{paint(verdict, 'green' if ok else 'red')} ({seconds:.0f} s)")
    return 0 if ok else 5
