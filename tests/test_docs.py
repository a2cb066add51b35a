"""Every command in the README and the task pages runs, and generated pages are current."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").glob("*.md")))]


def commands(page: str) -> list[str]:
    """The `mtp-convert` lines of the `sh` blocks of a page, comments left out."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("mtp-convert ")]


def test_there_are_commands_to_run() -> None:
    assert sum(len(commands(p)) for p in PAGES) >= 12


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)])
def test_commands_of_a_page_run(page: str, tmp_path: Path) -> None:
    for command in commands(page):
        words = shlex.split(command.replace("/tmp/", f"{tmp_path}/"))[1:]
        done = subprocess.run(
            [sys.executable, "-m", "mtp_convert.cli", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        assert done.stdout.strip()


def test_generated_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in t]
    missing = [t for t in targets if not (ROOT / page).parent.joinpath(t).exists()]
    assert not missing
