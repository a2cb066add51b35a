"""No pickle is executed, wherever it stands: refused by name, with nothing opened, started or written."""

import argparse
import contextlib
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from _attacks import BOMBS, ODD, Call, attacks
from _dist_build import archive, replace_item, save

from mtp_convert.containers import torch_dist
from mtp_convert.containers.safe_pickle import STAND_INS, Inert, read_pickle
from mtp_convert.errors import ConvertError

NAMES = sorted(attacks(Path("/nowhere")))


@pytest.fixture(scope="module")
def sound() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield save(Path(folder) / "c")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "c")


def planted(folder: Path, carrier: str, data: bytes) -> Path:
    """The checkpoint with `data` in place of one of its pickles."""
    if carrier == "common.pt":
        (folder / "common.pt").write_bytes(archive(data))
    elif carrier == ".metadata":
        (folder / ".metadata").write_bytes(data)
    else:
        replace_item(folder, "a", archive(data, bytes(48)))
    return folder


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """Python's own unpickler runs them: otherwise the tests below would test nothing."""
    marker = tmp_path / "marker"
    for name in ("os.system, protocol 0", "eval, protocol 4", "INST", "os.system, stacked", "NEWOBJ"):
        script = "import sys, pickle; pickle.loads(sys.stdin.buffer.read())"
        data = attacks(marker)[name][0].replace(b"subprocess\nPopen", b"os\nsystem")
        subprocess.run([sys.executable, "-c", script], input=data, check=False, capture_output=True)
        if name != "NEWOBJ":
            assert marker.exists(), name
            marker.unlink()


@pytest.mark.parametrize("name", NAMES)
def test_attacks_are_refused_by_name(tmp_path: Path, name: str) -> None:
    data, asked = attacks(tmp_path / "marker")[name]
    with pytest.raises(ConvertError) as caught:
        read_pickle(data, "file.pt")
    assert (caught.value.code, caught.value.exit_code) == ("MTP014", 3)
    assert asked in str(caught.value)
    assert "in file.pt" in str(caught.value)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("carrier", [".metadata", "common.pt", "tensor item"])
@pytest.mark.parametrize("name", ["os.system, protocol 2", "builtins.exec", "nested in a dict", "torch.load"])
def test_attacks_are_refused_wherever_they_stand(folder: Path, tmp_path: Path, carrier: str, name: str) -> None:
    data, asked = attacks(tmp_path / "marker")[name]
    with pytest.raises(ConvertError) as caught:
        torch_dist.read(planted(folder, carrier, data))
    assert caught.value.code == "MTP014"
    assert asked in str(caught.value)
    assert ("other.distcp" if carrier == "tensor item" else carrier) in str(caught.value)


def test_an_attack_in_the_common_state_object(tmp_path: Path) -> None:
    golden = Path(__file__).parents[2] / "fixtures/golden/megatron/hyb_m/ckpt/iter_0000001"
    data, _ = attacks(tmp_path / "marker")["os.system, protocol 2"]
    folder = shutil.copytree(golden, tmp_path / "c")
    replace_item(folder, torch_dist.COMMON_OBJECT, archive(data))
    with pytest.raises(ConvertError, match=r"posix\.system"):
        torch_dist.read(folder)


AUDITED = """
import json, sys
from pathlib import Path
from mtp_convert.containers import torch_dist
from mtp_convert.errors import ConvertError
import mtp_convert.containers.safe_pickle
root, seen = sys.argv[1], []
def hook(event, args):
    if event.startswith(("os.", "subprocess", "socket", "ctypes", "import", "exec", "compile", "shutil", "code.")):
        seen.append(event)
    if event == "open" and (args[2] & 3 or not str(args[0]).startswith(root)):
        seen.append(f"open {args[0]}")
folders = sorted(Path(root).iterdir())
sys.addaudithook(hook)
codes = []
for folder in folders:
    try:
        torch_dist.read(folder)
        codes.append("read")
    except ConvertError as error:
        codes.append(error.code)
print(json.dumps([codes, seen]))
"""


def test_nothing_is_started_opened_or_imported(sound: Path, tmp_path: Path) -> None:
    """All attacks at every place under an audit hook; also classes of packages that exist only as a trap."""
    marker, root, trap = tmp_path / "marker", tmp_path / "all", tmp_path / "trap" / "megatron"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text(f"open({str(marker)!r}, 'w')\nclass x: pass\n")
    pickles = {**{n: d for n, (d, _) in attacks(marker).items()}, "trap": b"cmegatron.core\nx\n)R."}
    for i, data in enumerate(pickles.values()):
        for carrier in (".metadata", "common.pt", "tensor item"):
            planted(shutil.copytree(sound, root / f"{i:03}{carrier}"), carrier, data)
    result = subprocess.run(
        [sys.executable, "-c", AUDITED, str(root)],
        capture_output=True,
        check=True,
        env={"PYTHONPATH": f"{trap.parent}:{Path(__file__).parents[2]}"},
    )
    codes, seen = json.loads(result.stdout)
    assert seen == []
    assert set(codes) == {"MTP014", "MTP013"}
    assert codes.count("MTP014") == 3 * (len(pickles) - 1)  # the trap is a stand-in that fits nowhere
    assert not marker.exists()


def test_classes_of_megatron_are_inert() -> None:
    found = read_pickle(b"cmegatron.core.transformer.enums\nAttnBackend\n(I5\ntR.", "x")
    assert isinstance(found, Inert)
    assert found.args == (5,)
    assert "megatron" not in sys.modules


def test_names_are_not_taken_for_opcodes() -> None:
    """A search for memory bombs must step over the lines of a GLOBAL: here they read like requests of gigabytes."""
    found = read_pickle(b"cmegatron.core\nrzzzzz\n(Vrzzzzz\nX\6\0\0\0rzzzzztR.", "x")
    assert found.args == ("rzzzzz", "rzzzzz")


@pytest.mark.parametrize("full", sorted(STAND_INS))
def test_a_pickle_cannot_change_a_stand_in(full: str) -> None:
    """Setting attributes (BUILD with a slot state) reaches nothing that a later pickle or the program sees."""
    module, _, name = full.rpartition(".")
    before = {k: (id(v), dict(vars(v)) if hasattr(v, "__dict__") else {}) for k, v in STAND_INS.items()}
    reference = f"c{module}\n{name}\n".encode()
    for attribute in (b"__defaults__", b"__init__", b"poison", b"__module__"):
        data = reference + b"(N}V" + attribute + b"\nVpoison\nstb."
        with contextlib.suppress(ConvertError):
            read_pickle(data, "x")
    assert not hasattr(argparse.Namespace, "poison")
    assert {k: (id(v), dict(vars(v)) if hasattr(v, "__dict__") else {}) for k, v in STAND_INS.items()} == before


def test_arguments_of_training_are_read() -> None:
    args = argparse.Namespace(hidden_size=8, nested=argparse.Namespace(x=[1, 2]))
    found = read_pickle(pickle.dumps({"args": args}), "x")["args"]
    assert found.hidden_size == 8
    assert found.nested.x == [1, 2]


@pytest.mark.parametrize("name", BOMBS)
def test_memory_bombs(name: str) -> None:
    """Under a limit of address space, so that a bomb that goes off ends the child and not the tests."""
    script = f"""
import resource
from pathlib import Path
from mtp_convert.containers.safe_pickle import read_pickle
from mtp_convert.errors import ConvertError
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
try:
    read_pickle({BOMBS[name]!r}, "f")
except ConvertError as error:
    peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    print(error.code, error, peak)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.startswith("MTP013 ")
    assert "asks for more memory" in out
    assert int(out.split()[-1]) < 200_000  # kB


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("carrier", [".metadata", "common.pt", "tensor item"])
def test_bytes_that_are_no_pickle_or_no_checkpoint(folder: Path, carrier: str, name: str) -> None:
    with pytest.raises(ConvertError) as caught:
        torch_dist.read(planted(folder, carrier, ODD[name]))
    assert (caught.value.code, caught.value.exit_code) == ("MTP013", 3)
    assert ("other.distcp" if carrier == "tensor item" else carrier) in str(caught.value)


def test_a_call_in_the_arguments_is_refused(folder: Path, tmp_path: Path) -> None:
    data = pickle.dumps({"args": argparse.Namespace(x=Call(open, str(tmp_path / "marker"), "w"))})
    with pytest.raises(ConvertError, match=r"_?io\.open"):
        torch_dist.read(planted(folder, "common.pt", data))
    assert not (tmp_path / "marker").exists()
