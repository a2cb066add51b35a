"""The package from Python: results are the command line's, and print well."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from _kit import AUTOMODEL, TINY, Cli

from mtp_convert import api
from mtp_convert.readable import styled

SOURCE = AUTOMODEL / "nemotron_d1"
ROOT = Path(__file__).parents[1]


class Balance(HTMLParser):
    """Fails on a tag that is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def words_of(html: str) -> str:
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    return parser.text


def test_the_whole_story(tmp_path: Path) -> None:
    found = api.inspect(str(SOURCE))
    assert found.family == "nemotron_h"
    planned = api.plan(SOURCE, "megatron")
    result = api.convert(SOURCE, tmp_path / "b", "megatron")
    assert result.nbytes == planned.nbytes
    compared = api.diff(SOURCE, tmp_path / "b")
    assert compared.equal
    verified = api.verify(SOURCE, tmp_path / "b", rows=1, length=8)
    assert verified.ok
    explained = api.explain(SOURCE, "lm_head.weight")
    for shown in (found, planned, result, compared, verified, explained):
        text = str(shown)
        assert text
        assert "\x1b" not in text
        assert words_of(shown._repr_html_()).splitlines()[0].split() == text.splitlines()[0].split()


def test_results_are_those_of_the_command_line(cli: Cli) -> None:
    assert cli("inspect", SOURCE).out.rstrip("\n") == str(api.inspect(SOURCE))
    assert cli("inspect", SOURCE, "--format", "json").data["tensors"] == api.inspect(SOURCE).tensors


def test_options_are_one_record(tmp_path: Path) -> None:
    options = api.Options("megatron", container="legacy", parallel={"tensor": 2})
    api.convert(SOURCE, tmp_path / "ranks", options)
    assert len(list((tmp_path / "ranks").glob("*/mp_rank_*"))) == 2


def test_errors_are_raised_with_their_code() -> None:
    with pytest.raises(api.ConvertError) as caught:
        api.inspect("/no/such/folder")
    assert (caught.value.code, caught.value.exit_code) == ("MTP002", 3)


def test_tensors_one_by_one_are_the_converted_ones(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    api.convert(SOURCE, tmp_path / "native", "native")
    expected = load_file(next((tmp_path / "native").glob("*.safetensors")))
    found = dict(api.iter_tensors(SOURCE, to="native"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_families_are_listed() -> None:
    assert {"nemotron_h", "deepseek_v3", "deepseek_v4"} <= {f.name for f in api.families()}


def test_names_that_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        _ = api.frobnicate
    assert set(api.__all__) <= {*dir(api), *api._WITH_TORCH}


def test_styles_become_spans_and_text_is_escaped() -> None:
    assert styled("a \x1b[31m<b>\x1b[0m &") == 'a <span style="color:#c5221f">&lt;b&gt;</span> &amp;'


def test_importing_it_loads_no_torch() -> None:
    script = "import sys, mtp_convert.api; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_the_python_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = blocks("python.md")
    assert len(found) >= 2
    for block in found:
        exec(block.replace("/tmp/", f"{tmp_path}/"), {})


def test_weight_sync_as_in_the_docs(tmp_path: Path) -> None:
    from mtp_convert.models.nemotron_v3 import NemotronHForCausalLM

    class Engine:
        """Takes released names, as inference engines do."""

        def __init__(self) -> None:
            self.loaded: dict[str, torch.Tensor] = {}

        def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
            self.loaded |= dict(weights)

    engine = Engine()
    (block,) = blocks("weight-sync.md")
    exec(block, {"module": NemotronHForCausalLM.from_pretrained(TINY), "engine": engine})
    expected = dict(api.iter_tensors(TINY, to="hf"))
    assert engine.loaded.keys() == expected.keys()
    assert all(torch.equal(engine.loaded[n].float(), expected[n].float()) for n in expected)
