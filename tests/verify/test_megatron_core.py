"""The backend megatron-core where it is not installed or cannot run a checkpoint; tests/reference runs the real one."""

from __future__ import annotations

import ast
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from _kit import AUTOMODEL, MEGATRON, convert

import mtp_convert
from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.errors import ConvertError
from mtp_convert.verify import megatron_core_side
from mtp_convert.verify.megatron_core_model import layer_pattern, missing_for
from mtp_convert.verify.side import open_side


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("megatron") / "there"
    convert(AUTOMODEL / "nemotron_d1", root, "megatron")
    return root


def refused(folder: Path, hf_config: Path | None = None) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        open_side(open_checkpoint(folder, hf_config=hf_config), backend="megatron-core")
    assert caught.value.code == "MTP032"
    return caught.value


def test_not_installed(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(megatron_core_side, "version", none)
    assert refused(there).hint == "pip install megatron-core"


def test_too_old(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_core_side, "version", lambda _: "0.16.1")
    error = refused(there)
    assert "it is 0.16.1, and 0.19 is the oldest" in error.headline()
    assert error.hint == "pip install megatron-core"


def test_a_package_that_it_needs(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(megatron_core_side, "version", lambda _: "0.19.2")
    monkeypatch.setattr(megatron_core_side, "engine_installed", broken)
    error = refused(there)
    assert "No module named 'triton'" in error.headline()
    assert error.hint == "pip install triton"


def test_hybrid_layers_need_transformer_engine(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_core_side, "version", lambda _: "0.19.2")
    monkeypatch.setattr(megatron_core_side, "engine_installed", lambda: False)
    error = refused(there)
    assert "needs transformer-engine and mamba-ssm" in error.headline()
    assert error.hint.startswith("pip install transformer-engine mamba-ssm")


def test_no_training_arguments() -> None:
    folder = MEGATRON / "dsv3_te"
    assert "no training arguments" in refused(folder / "ckpt", folder / "config.json").headline()


def test_a_hugging_face_folder() -> None:
    assert "got megatron-core, expected none" in refused(AUTOMODEL / "nemotron_d1").headline()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({}, None),
        ({"hybrid_layer_pattern": "M*E|-M/*E/*E", "mtp_num_layers": 2}, "M*E-M/*E/*E"),
        ({"hybrid_layer_pattern": "M*/E", "mtp_num_layers": 3}, "M*/E/E/E"),
        ({"hybrid_override_pattern": "M*", "mtp_hybrid_override_pattern": "*E", "mtp_num_layers": 1}, "M*/*E"),
        ({"hybrid_override_pattern": "M*"}, "M*"),
    ],
)
def test_layer_patterns(args: dict[str, object], expected: str | None) -> None:
    found = layer_pattern(args)
    assert (found if found is None else str(found)) == expected


def test_a_model_without_mamba_needs_less() -> None:
    assert missing_for(None, engine=False) == ()
    assert missing_for(layer_pattern({"hybrid_layer_pattern": "*E"}), engine=False) == ("transformer-engine",)
    assert missing_for(layer_pattern({"hybrid_layer_pattern": "*E"}), engine=True) == ()


def test_nothing_of_it_is_imported_at_the_start() -> None:
    for path in Path(mtp_convert.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] in ("megatron", "transformer_engine", "mamba_ssm")], path
