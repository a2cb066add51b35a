"""Commands on a repository: what they move, and that they do what they do on a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from _client import moved, pointed_at
from _kit import MEGATRON, TINY, Cli, convert, differing, files_of, run_process
from _release import HEADS, description, heads, release, show
from _server import LoopbackHub, serve
from huggingface_hub import HfApi, constants

from mtp_convert.containers import remote, safetensors
from mtp_convert.containers.paths import member_path
from mtp_convert.errors import ConvertError
from mtp_convert.location import PROVENANCE

COMMON_INSIDE = "hyb_rep"  # a golden checkpoint with a repeated layer, which only its arguments say
REPO, LARGE = "me/m", "me/large"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release(tmp_path_factory.mktemp("small") / "model", 4, 3)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long headers, as releases have them."""
    return release(tmp_path_factory.mktemp("large") / "model", 192, 12)


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with serve(tmp_path) as hub, pointed_at(hub, tmp_path / "cache", monkeypatch):
        hub.add_model(REPO, folder)
        yield hub


class TestInspect:
    def test_only_headers_are_moved(self, large: Path, hub: LoopbackHub, cli: Cli) -> None:
        hub.add_model(LARGE, large)
        assert cli("inspect", LARGE).code == 0
        got, needed = moved(hub, files_only=False), description(large)
        show("inspect", got, needed, large)
        assert needed <= got <= 1.05 * needed
        assert sum(r.status == 206 for r in hub.requests) == 2 * 12, "the length and the header of every shard"

    def test_it_says_what_it_says_of_a_folder(self, folder: Path, hub: LoopbackHub, cli: Cli) -> None:
        there, here = (cli("inspect", where, "--format", "json").data for where in (f"hf://{REPO}", folder))
        assert there.pop("path") == f"{REPO}@{hub.head(REPO)}"
        assert here.pop("path") == str(folder)
        assert there == here

    def test_in_a_process_of_its_own(self, hub: LoopbackHub) -> None:
        done = run_process("inspect", REPO, "--format", "json", **hub.env)
        assert (done.code, done.data["family"], done.err) == (0, "deepseek_v3", "")
        assert "hf_test_rw" not in done.out

    def test_what_is_in_the_cache_is_read_there(self, folder: Path, hub: LoopbackHub, cli: Cli) -> None:
        assert cli("roundtrip", REPO, "--format", "json").data["ok"]
        hub.requests.clear()
        assert cli("inspect", REPO).code == 0
        assert moved(hub) == 0


class TestExtract:
    def test_only_the_heads_are_moved(self, large: Path, hub: LoopbackHub, cli: Cli, tmp_path: Path) -> None:
        hub.add_model(LARGE, large)
        done = cli("extract", LARGE, tmp_path / "there")
        assert done.code == 0, done.err
        carried = sum(len(hub.data(LARGE, name)) for name in ("tokenizer.json", ".gitattributes"))
        got, needed = moved(hub, files_only=False), description(large) + heads(large, ends=True) + carried
        show("extract", got, needed, large)
        assert needed <= got <= 1.05 * needed

    def test_without_ends_these_stay_there(self, folder: Path, hub: LoopbackHub, cli: Cli, tmp_path: Path) -> None:
        done = cli("extract", REPO, tmp_path / "there", "--without-ends", "--format", "json")
        assert "2 stored copies were not compared" in " ".join(done.data["notes"])
        payload = sum(r.sent for r in hub.requests if r.status == 206)
        headers = sum(8 + len(h) for h in safetensors.read(folder).headers.values())
        assert payload == headers + heads(folder, ends=False)

    @pytest.mark.parametrize("ends", ["--with-ends", "--without-ends"])
    @pytest.mark.parametrize("fault", [{}, {"drop_after": 2000, "times": 20}, {"status": 503, "times": 4}], ids=str)
    def test_the_same_files_as_from_a_folder(
        self, folder: Path, hub: LoopbackHub, cli: Cli, tmp_path: Path, ends: str, fault: dict[str, int]
    ) -> None:
        if fault:
            hub.fault("GET", "/_blob/", **fault)
        there, here = tmp_path / "there", tmp_path / "here"
        assert cli("extract", f"{REPO}@main", there, ends).code == 0
        assert cli("extract", folder, here, ends).code == 0
        found, expected = files_of(there), files_of(here)
        assert found.pop(".gitattributes") == hub.data(REPO, ".gitattributes")  # the Hub's own file travels along
        assert found == expected
        assert sum(r.hit for r in hub.requests) == fault.get("times", 0)

    def test_copies_that_differ_are_refused(self, folder: Path, hub: LoopbackHub, cli: Cli, tmp_path: Path) -> None:
        shard = "model-00003-of-00003.safetensors"
        tensor = safetensors.read(folder).tensors[f"model.{HEADS}shared_head.head.weight"]
        data = bytearray(hub.data(REPO, tensor.chunks[0].path.name))
        data[tensor.chunks[0].start] ^= 1
        assert tensor.chunks[0].path.name == shard
        hub.put(REPO, shard, bytes(data))
        done = cli("extract", REPO, tmp_path / "out")
        assert (done.code, "MTP026" in done.err) == (4, True)
        assert not (tmp_path / "out").exists()

    def test_it_is_pinned(self, folder: Path, hub: LoopbackHub, cli: Cli, tmp_path: Path) -> None:
        """A commit between headers and payload changes nothing."""
        first = hub.head(REPO)
        fetch = remote.fetch

        def moving(*args: object) -> None:
            for path in sorted(folder.glob("*.safetensors")):
                hub.put(REPO, path.name, bytes(path.stat().st_size))
            fetch(*args)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(remote, "fetch", moving)
            assert cli("extract", REPO, tmp_path / "there").code == 0
        assert hub.head(REPO) != first
        assert cli("extract", folder, tmp_path / "here").code == 0
        assert (tmp_path / "there" / "model.safetensors").read_bytes() == (
            tmp_path / "here" / "model.safetensors"
        ).read_bytes()
        noted = json.loads((tmp_path / "there" / PROVENANCE).read_text())
        assert noted["source"]["name"] == f"{REPO}@{first}"
        assert cli("inspect", f"{REPO}@{first}").code == 0


class TestPlan:
    @pytest.mark.parametrize("command", [("plan",), ("convert", "DST", "--dry-run")], ids=["plan", "dry run"])
    def test_no_payload_is_moved(
        self, command: tuple[str, ...], folder: Path, hub: LoopbackHub, cli: Cli, tmp_path: Path
    ) -> None:
        def run(src: object) -> dict[str, object]:
            first, *more = (str(tmp_path / "out") if w == "DST" else w for w in command)
            return cli(first, src, *more, "--to", "megatron", "--format", "json").data

        there, here = run(REPO), run(folder)
        headers = sum(8 + len(h) for h in safetensors.read(folder).headers.values())
        assert sum(r.sent for r in hub.requests if r.status == 206) == headers
        assert there["notes"] == [
            "2 stored copies were not compared with their main tensors: headers were read only",
            *here["notes"],  # type: ignore[misc]
        ]
        assert {k: there[k] for k in ("steps", "nbytes", "files")} == {k: here[k] for k in ("steps", "nbytes", "files")}


class TestConvert:
    def test_the_same_files_as_from_a_folder(self, folder: Path, hub: LoopbackHub, cli: Cli, tmp_path: Path) -> None:
        first = hub.head(REPO)
        for src, name in ((REPO, "there"), (folder, "here")):
            done = cli("hf-to-megatron", src, tmp_path / name)
            assert done.code == 0, done.err
        found = files_of(tmp_path / "there")
        found.pop("hf/.gitattributes")
        assert found == files_of(tmp_path / "here")
        assert json.loads((tmp_path / "there" / PROVENANCE).read_text())["source"]["name"] == f"{REPO}@{first}"
        cached = tmp_path / "cache" / "models--me--m" / "snapshots" / first
        assert (cached / "model-00001-of-00003.safetensors").is_symlink(), "the cache that every tool uses"

    def test_of_other_files_nothing_is_moved(self, hub: LoopbackHub, cli: Cli, tmp_path: Path) -> None:
        for name in ("pytorch_model.bin", "original/consolidated.safetensors", "stale.safetensors"):
            hub.put(REPO, name, b"x" * 1000)
        assert cli("hf-to-megatron", REPO, tmp_path / "out").code == 0
        asked = {r.path.rpartition("/resolve/")[2] for r in hub.requests}
        assert not [a for a in asked if a.endswith((".bin", "consolidated.safetensors", "stale.safetensors"))]

    def test_a_megatron_checkpoint_and_back(self, hub: LoopbackHub, cli: Cli, tmp_path: Path) -> None:
        convert(TINY, tmp_path / "megatron", "megatron")
        hub.add_model("me/megatron", tmp_path / "megatron")
        assert cli("megatron-to-hf", "me/megatron", tmp_path / "back").code == 0
        assert differing(TINY, tmp_path / "back") == []

    def test_the_config_may_be_on_the_hub(self, hub: LoopbackHub, cli: Cli, tmp_path: Path) -> None:
        hub.add_model("me/tiny", TINY)
        convert(TINY, tmp_path / "megatron", "megatron")
        shutil.rmtree(tmp_path / "megatron" / "hf")
        assert cli("megatron-to-hf", tmp_path / "megatron", tmp_path / "none").code == 4
        done = cli("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", "--hf-config", "me/tiny")
        assert done.code == 0, done.err
        assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()
        assert not [r for r in hub.requests if ".safetensors" in r.path and "index" not in r.path]


def test_from_xet_storage(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are links to what all repositories of the cache share."""
    with serve(tmp_path, xet=True) as hub, pointed_at(hub, tmp_path / "cache", monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        api = HfApi()
        api.create_repo("me/xet")
        api.upload_folder(repo_id="me/xet", folder_path=TINY)
        done = cli("hf-to-megatron", "me/xet", tmp_path / "there")
        assert done.code == 0, done.err
        assert not hub.count("GET", "/_blob/")
    convert(TINY, tmp_path / "here", "megatron")
    there, here = files_of(tmp_path / "there"), files_of(tmp_path / "here")
    there.pop("hf/.gitattributes")
    assert there == here
    links = (tmp_path / "cache" / "models--me--xet" / "blobs").iterdir()
    assert {p.readlink().parts[:3] for p in links if p.is_symlink()} == {("..", "..", "blobs")}


class TestMegatron:
    """`.metadata` says what the payload files hold; training arguments may lie inside of one of them."""

    @pytest.fixture(params=["common.pt", "common object"])
    def megatron(self, request: pytest.FixtureRequest, hub: LoopbackHub, tmp_path: Path) -> Path:
        made = tmp_path / "megatron"
        if request.param == "common.pt":
            convert(TINY, made, "megatron")
        else:
            shutil.copytree(MEGATRON / COMMON_INSIDE / "ckpt", made)
            assert not list(made.rglob("common.pt"))
        hub.add_model("me/megatron", made)
        return made

    def options(self, folder: Path) -> tuple[object, ...]:
        config = folder / "hf" / "config.json"
        return () if config.exists() else ("--hf-config", MEGATRON / COMMON_INSIDE / "config.json")

    def test_inspect(self, megatron: Path, hub: LoopbackHub, cli: Cli) -> None:
        more = (*self.options(megatron), "--format", "json")
        there, here = (cli("inspect", src, *more).data for src in ("me/megatron", megatron))
        assert there.pop("path") != here.pop("path")
        assert there == here
        payload = [r for r in hub.requests if r.status == 206]
        assert sum(r.sent for r in payload) < 16_384, "one object at most"
        assert not [r for r in hub.requests if r.status == 200 and "/_blob/" in r.path and r.sent > 16_384]

    def test_plan(self, megatron: Path, hub: LoopbackHub, cli: Cli) -> None:
        more = (*self.options(megatron), "--to", "hf", "--format", "json")
        there, here = (cli("plan", src, *more).data for src in ("me/megatron", megatron))
        assert there["steps"] == here["steps"]
        assert not [r for r in hub.requests if r.sent > 16_384 and "/_blob/" in r.path]

    def test_heads_are_taken_from_the_whole(self, megatron: Path, hub: LoopbackHub, cli: Cli, tmp_path: Path) -> None:
        for src, name in (("me/megatron", "there"), (megatron, "here")):
            done = cli("extract", src, tmp_path / name, *self.options(megatron))
            assert done.code == 0, done.err
        assert files_of(tmp_path / "there") == files_of(tmp_path / "here")


class TestOffline:
    def test_from_the_cache(self, hub: LoopbackHub, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert cli("hf-to-megatron", REPO, tmp_path / "online").code == 0
        hub.requests.clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert cli("inspect", REPO).code == 0
        assert cli("hf-to-megatron", f"{REPO}@main", tmp_path / "offline").code == 0
        assert files_of(tmp_path / "online") == files_of(tmp_path / "offline")
        assert hub.requests == []

    @pytest.mark.parametrize("command", ["inspect", "extract", "hf-to-megatron"])
    def test_not_in_the_cache(
        self, command: str, hub: LoopbackHub, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        more = () if command == "inspect" else (tmp_path / "out",)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        done = cli(command, REPO, *more)
        assert (done.code, done.err.startswith("error[MTP056]")) == (7, True)
        assert f"hf download {REPO}" in done.err
        assert hub.requests == []

    def test_headers_alone_are_not_kept(self, hub: LoopbackHub, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        assert cli("inspect", REPO).code == 0
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        done = cli("inspect", REPO)
        assert (done.code, "model-00003-of-00003.safetensors" in done.err) == (7, True)


class TestRefused:
    @pytest.mark.parametrize(
        ("src", "code", "said"),
        [
            ("me/other", "MTP052", "no folder me/other here"),
            ("hf://me/other", "MTP052", "no such repository"),
            (f"{REPO}@v9", "MTP052", "no such revision"),
            ("hf://m", "MTP001", "hf://org/name"),
        ],
    )
    def test_names(self, src: str, code: str, said: str, hub: LoopbackHub, cli: Cli) -> None:
        done = cli("inspect", src)
        assert done.err.startswith(f"error[{code}]")
        assert said in done.err
        assert done.code == (2 if code == "MTP001" else 7)

    def test_gated(self, hub: LoopbackHub, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.repo(REPO).gated = True
        monkeypatch.setenv("HF_TOKEN", "hf_test_ro")
        done = cli("inspect", REPO)
        assert (done.code, "terms" in done.err) == (7, True)

    def test_no_connection(self, hub: LoopbackHub, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        """It may be a path with a mistake in it: both is said, and soon."""
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        done = cli("inspect", "out/modle")
        assert (done.code, done.err.startswith("error[MTP055]")) == (7, True)
        assert "no folder out/modle here" in done.err

    def test_a_busy_hub_is_waited_for(self, hub: LoopbackHub, cli: Cli) -> None:
        hub.fault("GET", "/api/models/", times=3, status=503)
        assert cli("inspect", REPO).code == 0

    def test_a_shard_that_the_repository_lacks(self, hub: LoopbackHub, cli: Cli, tmp_path: Path) -> None:
        tree = hub.repo(REPO).commits[hub.head(REPO)].tree
        del tree["model-00002-of-00003.safetensors"]
        for words in (("inspect", REPO), ("hf-to-megatron", REPO, tmp_path / "out")):
            done = cli(*words)
            assert (done.code, "model-00002-of-00003.safetensors" in done.err) == (3, True), done.err

    def test_no_weights(self, hub: LoopbackHub, cli: Cli) -> None:
        hub.add_model("me/empty")
        done = cli("inspect", "me/empty")
        assert (done.code, "MTP002" in done.err) == (3, True)


def test_files_that_repositories_share_in_the_cache_are_inside(tmp_path: Path) -> None:
    """A blob of a repository may itself be a link into the blobs of the whole cache."""
    repository = tmp_path / "models--me--m"
    folder = repository / "snapshots" / "0123" / "release"
    shared = tmp_path / "blobs" / "ab" / "abcd"
    for path in (folder, repository / "blobs", shared.parent):
        path.mkdir(parents=True)
    shared.write_bytes(b"x")
    (repository / "blobs" / "etag").symlink_to("../../blobs/ab/abcd")
    (folder / "a.distcp").symlink_to("../../../blobs/etag")
    (folder / "b.distcp").symlink_to("../../../../secret")
    (tmp_path / "secret").write_bytes(b"x")
    assert member_path(folder, "a.distcp", "here") == folder / "a.distcp"
    with pytest.raises(ConvertError):
        member_path(folder, "b.distcp", "here")


def test_a_golden_checkpoint_without_sides_needs_a_config(hub: LoopbackHub, cli: Cli) -> None:
    hub.add_model("me/golden", MEGATRON / "hyb_m" / "ckpt")
    assert cli("inspect", "me/golden").code == 4
