"""Promises about the code itself: who imports whom, what loads at start, sizes, error codes, family names."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtp_convert.errors import ERRORS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mtp_convert"
FILES = sorted(PACKAGE.rglob("*.py"))
TINY = ROOT / "fixtures" / "tiny-nemotron-h"
GOLDEN = ROOT / "fixtures" / "golden" / "megatron" / "hyb_m" / "ckpt" / "iter_0000001"
LEGACY = ROOT / "fixtures" / "golden" / "megatron" / "hyb_m" / "legacy_tp2" / "iter_0000001"
HEAVY = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub"}


def module(path: Path) -> str:
    """The dotted name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(source: str) -> Iterator[str]:
    """Every module that a source imports anywhere, types aside; `from a import b` gives a and a.b."""
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield str(node.module)
            yield from (f"{node.module}.{a.name}" for a in node.names)
        if not type_checking(node):
            todo += ast.iter_child_nodes(node)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


# part of the package -> the parts that it may import
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "encodings": {"encodings"},
    "mapping": {"mapping", "encodings.dtype"},
    "adapters": {"adapters", "mapping", "errors"},
    "containers": {"containers", "encodings", "errors"},
    "sharding": {"sharding", "mapping", "containers", "errors"},
    "engine": {"engine", "sharding", "mapping", "containers", "encodings", "errors"},
}
MAY_NOT_IMPORT: dict[str, set[str]] = {
    "models": {"mapping", "adapters", "convert", "cli", "engine", "verify", "containers"},
    "verify": {"cli"},
}


def breaches(part: str, source: str) -> list[str]:
    """Imports of our own modules that a part of the package must not have."""
    own = {i.removeprefix("mtp_convert.") for i in imports(source) if within(i, "mtp_convert")} - {"mtp_convert"}
    if part in MAY_IMPORT:
        return sorted(i for i in own if not any(within(i, ok) for ok in MAY_IMPORT[part]) and i != "__version__")
    return sorted(i for i in own if any(within(i, bad) for bad in MAY_NOT_IMPORT.get(part, ())))


@pytest.mark.parametrize("path", FILES, ids=module)
def test_import_direction(path: Path) -> None:
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert breaches(part, path.read_text()) == []


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("containers", "from mtp_convert.adapters import find"),
        ("containers", "import mtp_convert.engine.runner"),
        ("containers", "from mtp_convert.sharding.sizes import Sizes"),
        ("sharding", "import mtp_convert.engine.runner"),
        ("sharding", "from mtp_convert.adapters import find"),
        ("engine", "from mtp_convert import adapters"),
        ("engine", "def f():\n    from mtp_convert.cli import app"),
        ("mapping", "from mtp_convert.errors import ConvertError"),
        ("mapping", "from mtp_convert.encodings.cast import cast"),
        ("models", "from mtp_convert.mapping import ops"),
        ("models", "from mtp_convert.convert import run"),
        ("verify", "import mtp_convert.cli"),
    ],
)
def test_a_wrong_import_is_noticed(part: str, line: str) -> None:
    assert breaches(part, line)


def test_an_import_for_types_alone_is_free() -> None:
    assert not list(imports("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"))[2:]


def loaded(script: str) -> set[str]:
    """The heavy packages that a script has loaded at its end."""
    end = "\nimport json, sys; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script + end], capture_output=True, text=True, check=True)
    return HEAVY & set(json.loads(done.stderr.splitlines()[-1]))


def command(*words: object) -> str:
    """A script that runs the command line and fails unless it ends well."""
    return f"""
import sys
sys.argv = {["mtp-convert", *map(str, words)]!r}
from mtp_convert.cli import main
try:
    main()
except SystemExit as leaving:
    assert not leaving.code, leaving.code
"""


@pytest.mark.parametrize("script", ["import mtp_convert.cli", command("--help")], ids=["import", "help"])
def test_the_command_line_starts_light(script: str) -> None:
    assert loaded(script) == set()


def test_a_heavy_start_would_be_noticed() -> None:
    assert loaded("import mtp_convert.cli, numpy") == {"numpy"}


@pytest.mark.parametrize(
    ("container", "folder"), [("safetensors", TINY), ("torch_dist", GOLDEN), ("megatron_legacy", LEGACY)]
)
def test_reading_headers_needs_no_torch(container: str, folder: Path) -> None:
    script = f"from mtp_convert.containers import {container} as c\nfrom pathlib import Path\n"
    assert loaded(f"{script}c.read(Path({str(folder)!r}))") == set()


def test_the_tables_need_no_torch() -> None:
    assert loaded("from mtp_convert.adapters import families; families()") == set()


@pytest.mark.parametrize(
    "words",
    [("inspect", TINY), *(("inspect", p, "--hf-config", p.parents[1] / "config.json") for p in (GOLDEN, LEGACY))],
    ids=["safetensors", "torch_dist", "legacy"],
)
def test_inspecting_loads_no_torch(words: tuple[object, ...]) -> None:
    assert not loaded(command(*words)) & {"torch", "transformers"}


def test_no_regular_expression_decides_where_a_weight_goes() -> None:
    for path in (*(PACKAGE / "mapping").glob("*.py"), *(PACKAGE / "adapters").glob("*.py")):
        assert not {"re", "regex", "fnmatch"} & set(imports(path.read_text())), path.name


FAMILY_WORDS = ("nemotron", "deepseek", "qwen", "glm4", "llama", "mixtral")
MAY_NAME_A_FAMILY = ("adapters", "models", "verify")


def test_families_are_named_in_their_adapters_alone() -> None:
    for path in FILES:
        inside = path.relative_to(PACKAGE).parts
        if inside[0] in MAY_NAME_A_FAMILY or inside == ("demo.py",):
            continue
        text = path.read_text().lower()
        assert not [w for w in FAMILY_WORDS if w in text], path.name


@pytest.mark.parametrize("path", FILES, ids=module)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


def docstrings(tree: ast.AST) -> set[ast.AST]:
    """The nodes that only explain."""
    bodies = [n.body for n in ast.walk(tree) if hasattr(n, "body") and isinstance(n.body, list) and n.body]
    return {b[0].value for b in bodies if isinstance(b[0], ast.Expr)}


def codes_used() -> set[str]:
    """Every error code in a string of the code, outside the list itself."""
    found: set[str] = set()
    for path in FILES:
        tree = ast.parse(path.read_text())
        if path.name != "errors.py":
            explaining = docstrings(tree)
            texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and n not in explaining]
            found |= {code for t in texts if isinstance(t, str) for code in re.findall(r"MTP\d{3}", t)}
    return found


def test_error_codes_are_used_and_listed() -> None:
    used = codes_used()
    assert used - ERRORS.keys() == set()
    assert ERRORS.keys() - used == set()


def test_error_kinds_are_complete() -> None:
    codes = {0, 1, 2, 3, 4, 5, 6, 7, 73, 75}
    for code, kind in ERRORS.items():
        assert kind.exit_code in codes, code
        assert kind.title
        assert len(kind.explanation) > 20, code
