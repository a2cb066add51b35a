"""Speed and memory of a conversion against `cp` of the same bytes, in paired runs.

    python benchmarks/throughput.py --size 4GB --rounds 5 --folder /tmp/bench

A pair is `cp -r SRC DST` followed by `sync DST/*`, and the whole command `mtp-convert ... SRC DST` (which syncs too),
in alternating order, each on a fresh output. `warm` reads the source once before every run, `cold` drops it from the
page cache. The ratio is cp's time over ours: above 1 we are faster. Peak memory is the child's own maximum.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

TOOL = [sys.executable, "-m", "mtp_convert.cli"]


@dataclass(frozen=True)
class Pair:
    """One paired measurement, in seconds; memory in MB."""

    copy: float
    copy_unsynced: float
    ours: float
    memory: float

    @property
    def ratio(self) -> float:
        """How many times faster than `cp` + `sync`."""
        return self.copy / self.ours

    @property
    def ratio_unsynced(self) -> float:
        """The same against `cp` alone, which leaves the data in memory."""
        return self.copy_unsynced / self.ours


def payload(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return [p for p in folder.rglob("*") if p.is_file()]


def cache(folder: Path, *, warm: bool) -> None:
    """Put the files into the page cache, or take them out."""
    for path in payload(folder):
        with path.open("rb", buffering=0) as f:
            if warm:
                while f.read(1 << 22):
                    pass
            else:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed_copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds of `cp` with and without the data on disk."""
    begin = perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    copied = perf_counter() - begin
    subprocess.run(["sync", *map(str, payload(target))], check=True)
    return perf_counter() - begin, copied


def timed_convert(verb: str, source: Path, target: Path) -> tuple[float, float]:
    """Seconds of the whole command, and its peak memory in MB."""
    begin = perf_counter()
    child = subprocess.Popen([*TOOL, verb, str(source), str(target), "--format", "quiet"])
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{verb} failed with status {status}")
    return perf_counter() - begin, usage.ru_maxrss / 1024


def pair(verb: str, source: Path, scratch: Path, *, warm: bool, copy_first: bool) -> Pair:
    """One pair on fresh outputs."""
    results: dict[str, tuple[float, float]] = {}
    for what in ("copy", "ours") if copy_first else ("ours", "copy"):
        target = scratch / what
        shutil.rmtree(target, ignore_errors=True)
        os.sync()
        cache(source, warm=warm)
        if what == "copy":
            results[what] = timed_copy(source, target)
        else:
            results[what] = timed_convert(verb, source, target)
        shutil.rmtree(target)
    return Pair(*results["copy"], *results["ours"])


def source_of(size: str, folder: Path) -> tuple[Path, Path]:
    """The Hugging Face and the Megatron form of a synthetic checkpoint."""
    hf, megatron = folder / f"hf-{size}", folder / f"megatron-{size}"
    if not hf.exists():
        maker = Path(__file__).with_name("make_checkpoint.py")
        subprocess.run([sys.executable, str(maker), "--size", size, "--out", str(hf)], check=True)
    if not megatron.exists():
        timed_convert("hf-to-megatron", hf, megatron)
    return hf, megatron


def line(name: str, pairs: list[Pair], nbytes: int) -> str:
    """A Markdown table row: medians with ranges."""
    ratios = [p.ratio for p in pairs]
    rate = nbytes / 1e9 / statistics.median(p.ours for p in pairs)
    return (
        f"| {name} | {statistics.median(p.copy for p in pairs):.1f} | {statistics.median(p.ours for p in pairs):.1f} "
        f"| {rate:.2f} | **{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) "
        f"| {statistics.median(p.ratio_unsynced for p in pairs):.2f} | {max(p.memory for p in pairs):.0f} |"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["4GB"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/mtp-convert-bench"))
    parser.add_argument("--modes", nargs="+", default=["warm", "cold"], choices=["warm", "cold"])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    kernel = platform.release().split("-")[0]
    print(f"{platform.machine()}, {os.cpu_count()} cores, Linux {kernel}, Python {platform.python_version()}\n")
    print("| direction, source | cp + sync, s | ours, s | GB/s | times faster (range) | against cp alone | peak MB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for size in args.size:
        hf, megatron = source_of(size, args.folder)
        for verb, source in (("hf-to-megatron", hf), ("megatron-to-hf", megatron)):
            nbytes = sum(p.stat().st_size for p in payload(source))
            for mode in args.modes:
                pairs = [
                    pair(verb, source, args.folder, warm=mode == "warm", copy_first=i % 2 == 0)
                    for i in range(args.rounds)
                ]
                print(line(f"{verb}, {nbytes / 1e9:.1f} GB {mode}", pairs, nbytes), flush=True)
                raw = [p.__dict__ for p in pairs]
                (args.folder / f"{verb}-{size}-{mode}.json").write_text(json.dumps(raw, indent=1))


if __name__ == "__main__":
    main()
