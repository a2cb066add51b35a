"""The GitHub Action and the GitLab job of the docs, their steps run in a shell as a runner would."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from _kit import AUTOMODEL, writable
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())


@dataclass
class Runner:
    """Runs a composite action's shell steps: expressions filled in, outputs passed on, stopped by the first failure."""

    work: Path
    inputs: dict[str, str]
    outputs: dict[str, str] = field(default_factory=dict)
    log: str = ""

    def fill(self, text: str) -> str:
        """`${{ ... }}` of the kinds that the action uses."""

        def value(match: re.Match[str]) -> str:
            words = match[1].split(".")
            if words[0] == "inputs":
                return self.inputs[words[1]]
            if words[0] == "steps":
                return self.outputs[words[3]]
            return {"runner.temp": str(self.work), "github.action_path": str(ROOT)}[match[1]]

        return re.sub(r"\$\{\{ (\S+) \}\}", value, text)

    def run(self) -> int:
        """The exit code of the first step that fails, else 0."""
        for step in ACTION["runs"]["steps"]:
            if "run" not in step or step["name"] == "Install":
                continue
            code = self.step(step)
            if code:
                return code
        return 0

    def step(self, step: dict[str, Any]) -> int:
        output, summary = self.work / "output", self.work / "summary.md"
        output.touch()
        env = {name: self.fill(str(value)) for name, value in step.get("env", {}).items()}
        tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=self.work,
            env={**os.environ, **env, "PATH": tools, "GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(summary)},
            capture_output=True,
            text=True,
            check=False,
        )
        self.log += done.stdout + done.stderr
        self.outputs |= dict(line.split("=", 1) for line in output.read_text().splitlines())
        return done.returncode


def runner(work: Path, **inputs: str) -> Runner:
    work.mkdir(exist_ok=True)
    given = {name: str(spec.get("default", "")) for name, spec in ACTION["inputs"].items()}
    return Runner(work, given | inputs)


@pytest.fixture
def source() -> Path:
    return AUTOMODEL / "nemotron_d1"


def test_a_conversion_is_made_and_proven(source: Path, tmp_path: Path) -> None:
    action = runner(tmp_path, source=str(source), **{"convert-args": "--tp 2", "verify-args": '--length "16"'})
    assert action.run() == 0, action.log
    suites = ElementTree.parse(tmp_path / "mtp-convert" / "junit.xml").getroot()
    assert suites.attrib["failures"] == "0"
    assert int(suites.attrib["tests"]) > 4
    assert "</html>" in (tmp_path / "mtp-convert" / "report.html").read_text()
    assert "|" in (tmp_path / "summary.md").read_text()
    assert "::error" not in action.log


def test_a_damaged_target_fails_the_job_with_annotations(source: Path, tmp_path: Path) -> None:
    damaged = writable(source.name, tmp_path)
    tensors = load_file(damaged / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0).contiguous()
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    action = runner(tmp_path / "work", source=str(source), target=str(damaged))
    assert action.run() == 5
    assert "::error" in action.log
    suites = ElementTree.parse(tmp_path / "work" / "mtp-convert" / "junit.xml").getroot()
    assert int(suites.attrib["failures"]) > 0


def test_inputs_are_never_run_as_a_script(source: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    hostile = f"$(touch {trap}); `touch {trap}`"
    action = runner(tmp_path / "work", source=str(source), target=hostile, **{"verify-args": hostile})
    assert action.run() != 0
    assert not trap.exists()


def test_every_expression_of_the_action_is_an_input_or_known() -> None:
    text = (ROOT / "action.yml").read_text()
    for name in re.findall(r"inputs\.([\w-]+)", text):
        assert name in ACTION["inputs"], name
    for step in ACTION["runs"]["steps"]:
        assert "${{" not in step.get("run", ""), "a value in a script would be run"


def test_the_gitlab_job_of_the_docs_runs(source: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "ci.md").read_text()
    blocks = [yaml.safe_load(b) for b in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    job = next(b["parity"] for b in blocks if "parity" in b)
    shutil.copytree(source, tmp_path / "model")
    script = "\n".join(line for line in job["script"] if not line.startswith("pip "))
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=env, check=True, capture_output=True)
    junit = tmp_path / job["artifacts"]["reports"]["junit"]
    assert ElementTree.parse(junit).getroot().attrib["failures"] == "0"
    assert all((tmp_path / path).exists() for path in job["artifacts"]["paths"])
