"""Options: spellings, environment variables, values that make no sense, help."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from _kit import AUTOMODEL, MEGATRON, Cli, convert

from mtp_convert.checkpoint import open_checkpoint
from mtp_convert.cli import app
from mtp_convert.errors import ERRORS

SOURCE = AUTOMODEL / "nemotron_d1"
CONVERT = ("hf-to-megatron", SOURCE)
PLAN = ("plan", SOURCE, "--to", "megatron")
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]

# Values that must be refused with exit code 2, and the text that says which.
BAD: dict[str, tuple[tuple[object, ...], str]] = {
    "dtype": ((*CONVERT, "OUT", "--dtype", "int3"), "--dtype"),
    "format": ((*CONVERT, "OUT", "--format", "xml"), "--format"),
    "to": (("convert", SOURCE, "OUT", "--to", "gguf"), "--to"),
    "to missing": (("convert", SOURCE, "OUT"), "--to"),
    "via": (("roundtrip", SOURCE, "--via", "gguf"), "--via"),
    "force-fold": (("fold", SOURCE, "OUT", "--force-fold", "median"), "--force-fold"),
    "depths 0": (("unfold", SOURCE, "OUT", "--depths", "0"), "--depths"),
    "depths missing": (("unfold", SOURCE, "OUT"), "--depths"),
    "tp 0": ((*CONVERT, "OUT", "--tp", "0"), "tensor"),
    "tp -1": ((*CONVERT, "OUT", "--tp", "-1"), "tensor"),
    "tp no number": ((*CONVERT, "OUT", "--tp", "two"), "--tp"),
    "tp no divisor": ((*CONVERT, "OUT", "--tp", "3"), "does not divide num_attention_heads"),
    "ep no divisor": ((*CONVERT, "OUT", "--ep", "3"), "does not divide num_experts"),
    "etp no divisor": ((*CONVERT, "OUT", "--etp", "5"), "does not divide moe_ffn_hidden_size"),
    "pp no divisor": ((*CONVERT, "OUT", "--pp", "4"), "does not divide num_layers"),
    "steps": ((("hf-to-megatron", AUTOMODEL / "nemotron_packed", "OUT", "--mtp-num-layers", "3")), "--mtp-num-layers"),
    "steps 0": ((*CONVERT, "OUT", "--mtp-num-layers", "0"), "--mtp-num-layers"),
    "steps -1": ((*CONVERT, "OUT", "--mtp-num-layers", "-1"), "--mtp-num-layers"),
    "padding 0": ((*CONVERT, "OUT", "--make-vocab-size-divisible-by", "0"), "--make-vocab-size-divisible-by"),
    "padding -8": ((*CONVERT, "OUT", "--make-vocab-size-divisible-by", "-8"), "--make-vocab-size-divisible-by"),
    "threads -1": ((*CONVERT, "OUT", "--threads", "-1"), "--threads"),
    "version": ((*CONVERT, "OUT", "--megatron-version", "latest"), "--megatron-version"),
    "shard 0": ((*PLAN, "--max-shard-size", "0"), "size"),
    "shard negative": ((*PLAN, "--max-shard-size", "-5GB"), "size"),
    "shard unit": ((*PLAN, "--max-shard-size", "5XB"), "size"),
    "shard text": ((*PLAN, "--max-shard-size", "GB"), "size"),
    "shard nan": ((*PLAN, "--max-shard-size", "nan"), "size"),
    "shard inf": ((*PLAN, "--max-shard-size", "inf"), "size"),
    "unknown option": ((*PLAN, "--frobnicate"), "--frobnicate"),
    "unknown command": (("frobnicate",), "frobnicate"),
    "no source": (("inspect",), "SRC"),
    "too many": (("inspect", SOURCE, SOURCE), "unexpected extra argument"),
    "explain nothing": (("explain", "MTP999"), "MTP999"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_value(name: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args, says = BAD[name]
    got = cli(*args)
    assert got.code == 2, got
    assert says in got.err
    assert "Traceback" not in got.err
    assert got.out == ""
    assert list(tmp_path.iterdir()) == []


def args_of(folder: Path) -> dict[str, Any]:
    args = open_checkpoint(folder).stored.arguments["args"]
    assert isinstance(args, dict)
    return args


LONG = (
    "--tensor-model-parallel-size",
    "2",
    "--expert-model-parallel-size=4",
    "--pipeline-model-parallel-size=3",
    "--expert-tensor-parallel-size",
    "2",
)


@pytest.mark.parametrize(
    "spelling",
    [
        ("--tp", "2", "--ep", "4", "--pp", "3", "--etp", "2"),
        LONG,
        tuple(w.replace("-", "_").replace("__", "--", 1) for w in LONG),
    ],
    ids=["short", "long", "underscores"],
)
@pytest.mark.parametrize("command", ["hf-to-megatron", "hf_to_megatron"])
def test_parallel_sizes(command: str, spelling: tuple[str, ...], cli: Cli, tmp_path: Path) -> None:
    assert cli(command, SOURCE, tmp_path / "out", *spelling).code == 0
    found = args_of(tmp_path / "out")
    sizes = ("tensor_model", "expert_model", "pipeline_model", "expert_tensor")
    assert [found[f"{s}_parallel_size"] for s in sizes] == [2, 4, 3, 2]


def test_underscores_in_a_path_stay(cli: Cli, tmp_path: Path) -> None:
    assert cli("hf-to-megatron", SOURCE, tmp_path / "my_out_put").code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["my_out_put"]


def test_megatron_options_reach_the_arguments(cli: Cli, tmp_path: Path) -> None:
    options = ("--mtp-num-layers", "2", "--make-vocab-size-divisible-by", "40", "--tp", "2", "--dtype", "bf16")
    assert cli(*CONVERT, tmp_path / "out", *options).code == 0
    found = args_of(tmp_path / "out")
    wanted = {"mtp_num_layers": 2, "mtp_use_repeated_layer": True, "padded_vocab_size": 80}
    assert {n: found[n] for n in wanted} == wanted
    assert open_checkpoint(tmp_path / "out").stored.tensors["output_layer.weight"].dtype.name == "BF16"


class TestEnvironment:
    """Every option has a variable; the command line wins."""

    def test_values(self, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {
            "DTYPE": "bf16",
            "TP": "2",
            "FORMAT": "json",
            "MTP_NUM_LAYERS": "3",
            "THREADS": "1",
        }.items():
            monkeypatch.setenv(f"MTP_CONVERT_{name}", value)
        got = cli(*CONVERT, tmp_path / "out", "--mtp-num-layers", "2")
        assert got.code == 0
        assert (got.data["steps"], got.data["repeated"]) == (2, True)
        assert args_of(tmp_path / "out")["tensor_model_parallel_size"] == 2
        assert open_checkpoint(tmp_path / "out").stored.tensors["output_layer.weight"].dtype.name == "BF16"

    def test_paths_and_choices(self, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MTP_CONVERT_HF_CONFIG", str(MEGATRON / "hyb_m" / "config.json"))
        monkeypatch.setenv("MTP_CONVERT_TO", "hf")
        assert cli("convert", MEGATRON / "hyb_m" / "ckpt", tmp_path / "out").code == 0
        assert (tmp_path / "out" / "model.safetensors").is_file()

    def test_flags(self, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MTP_CONVERT_FORCE", "1")
        assert [cli(*CONVERT, tmp_path / "out").code for _ in range(2)] == [0, 0]

    def test_bad_value_names_the_variable(self, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MTP_CONVERT_DTYPE", "int3")
        got = cli(*CONVERT, tmp_path / "out")
        assert got.code == 2
        assert "int3" in got.err

    @pytest.mark.parametrize("command", [c for c in COMMANDS if c != "demo"])
    def test_every_option_has_one(self, command: str) -> None:
        group = typer.main.get_command(app)
        params = group.commands[command].params  # type: ignore[attr-defined]
        options = [p for p in params if p.param_type_name == "option" and p.name != "help"]
        bare = [p.opts[0] for p in options if not str(p.envvar or "").startswith("MTP_CONVERT_")]
        assert bare == []


class TestHelp:
    """-h everywhere."""

    @pytest.mark.parametrize("command", COMMANDS)
    @pytest.mark.parametrize("flag", ["-h", "--help"])
    def test_command(self, command: str, flag: str, cli: Cli) -> None:
        got = cli(command, flag)
        assert (got.code, got.err) == (0, "")
        assert f"{command} [OPTIONS]" in got.out

    def test_program(self, cli: Cli) -> None:
        got = cli("-h")
        assert got.code == 0
        assert all(command in got.out for command in COMMANDS)

    def test_no_arguments(self, cli: Cli) -> None:
        got = cli()
        assert got.code == 2
        assert "hf-to-megatron" in got.out + got.err

    def test_version(self, cli: Cli) -> None:
        assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", cli("--version").out)

    @pytest.mark.parametrize("code", ERRORS)
    def test_explain(self, code: str, cli: Cli) -> None:
        got = cli("explain", code.lower())
        assert (got.code, got.err) == (0, "")
        assert got.out.startswith(f"{code}: {ERRORS[code].title} (exit code {ERRORS[code].exit_code})\n")
        assert ERRORS[code].explanation in got.out


def test_debug_shows_the_traceback(cli: Cli, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no such folder"):
        cli("--debug", "inspect", tmp_path / "nowhere")


def test_dry_run_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    got = cli("convert", SOURCE, tmp_path / "out", "--to", "megatron", "--dry-run", "--format", "json")
    assert got.code == 0
    assert got.data == cli(*PLAN, "--format", "json").data | {"free_disk": got.data["free_disk"]}
    assert list(tmp_path.iterdir()) == []


def test_shard_size(cli: Cli, tmp_path: Path) -> None:
    convert(SOURCE, tmp_path / "m", "megatron")
    assert cli("megatron-to-hf", tmp_path / "m", tmp_path / "hf", "--max-shard-size", "100 kB").code == 0
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) >= 3
    assert max(p.stat().st_size for p in shards) < 110_000
    assert cli("diff", SOURCE, tmp_path / "hf").code == 0
