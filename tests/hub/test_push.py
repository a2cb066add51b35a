"""What a push does to a repository: visibility, plan, branch, pull request, stale files, comparison."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from _kit import TINY
from _push import REPO, TRANSPORTS, branches, converted, digests, own_files, push_it, ready
from _push import hub as hub  # a fixture
from _server import LoopbackHub

from mtp_convert.errors import ConvertError
from mtp_convert.hub.client import Hub, Patience
from mtp_convert.hub.folder import prepare
from mtp_convert.hub.plan import RemoteFile, compare, differing, stale
from mtp_convert.hub.push import PushOptions, push

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub's own


def refused(**options: object) -> ConvertError:
    with pytest.raises(ConvertError) as error:
        push_it(ready(), **options)
    return error.value


@pytest.mark.parametrize("hub", TRANSPORTS, indirect=True)
def test_a_push_and_its_repetition(hub: LoopbackHub) -> None:
    first = push_it(ready())
    assert own_files(hub) == digests(ready())
    assert len(hub.commits(REPO)) == 2
    assert (first.created, first.private, first.commit) == (True, True, hub.head(REPO))
    assert sorted(first.new) == sorted(ready())
    assert branches(hub) == {"main"}
    again = push_it(ready())
    assert sorted(again.same) == sorted(ready())
    assert (again.new, again.changed, again.deleted, again.nbytes_to_send) == ([], [], [], 0)
    assert len(hub.commits(REPO)) == 2


def test_a_dry_run_tells_and_creates_nothing(hub: LoopbackHub) -> None:
    first = push_it(ready(), dry_run=True)
    assert hub.store.repos == {}
    assert (first.created, first.commit, len(first.new)) == (True, "", len(ready()))
    push_it(ready())
    seen, head = len(hub.requests), hub.head(REPO)
    later = push_it(ready("megatron"), dry_run=True)
    assert {r.method for r in hub.requests[seen:] if "validate-yaml" not in r.path} == {"GET", "HEAD"}
    assert (hub.head(REPO), branches(hub)) == (head, {"main"})
    assert "model.safetensors.index.json" in later.deleted
    assert later.nbytes_to_send == sum(ready("megatron")[p].size for p in (*later.new, *later.changed))


@pytest.mark.parametrize(("there", "asked"), [(True, False), (False, True)])
def test_visibility_is_never_wrong(hub: LoopbackHub, there: bool, asked: bool) -> None:
    hub.add_model(REPO, private=there)
    assert refused(private=asked).code == "MTP058"
    assert own_files(hub) == {}
    assert not hub.count("PUT", "") + hub.count("POST", "/preupload/")
    assert push_it(ready()).private == there


def test_a_repository_made_by_somebody_at_the_same_moment(hub: LoopbackHub) -> None:
    """It was not there when we looked; then it is, and public."""
    real = Hub.create

    class Late(Hub):
        def create(self, *, private: bool) -> None:
            hub.add_model(REPO, private=False)
            real(self, private=private)

    with pytest.raises(ConvertError) as error:
        push(ready(), Late(REPO, Patience(1)), PushOptions())
    assert error.value.code == "MTP058"
    assert own_files(hub) == {}


def test_public_only_when_asked(hub: LoopbackHub) -> None:
    assert not push_it(ready(), private=False).private
    assert not hub.repo(REPO).private


def test_another_layout_replaces_every_stale_file(hub: LoopbackHub) -> None:
    push_it(ready())
    hub.put(REPO, "samples/plot.png", b"theirs")
    push_it(ready("megatron"))
    after = own_files(hub)
    assert not [p for p in after if p.startswith("model")]
    assert "samples/plot.png" in after
    assert digests(ready("megatron")).items() <= after.items()
    back = push_it(ready())
    assert not [p for p in own_files(hub) if p.startswith(("release/", "hf/", "latest_"))]
    assert "release/.metadata" in back.deleted
    assert back.kept == [".gitattributes", "samples/plot.png"]


def test_weights_of_others_are_not_replaced_unasked(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add_model(REPO, TINY)
    changed = {p: replace(f, sha256="0" * 64) if p.endswith(".safetensors") else f for p, f in ready().items()}
    with pytest.raises(ConvertError) as error:
        push_it(changed)
    assert error.value.code == "MTP059"
    assert len(error.value.problems) == 2
    assert len(hub.commits(REPO)) == 2
    assert push_it(ready()).commit == hub.head(REPO)  # the very same weights are no loss


def test_force_replaces_them(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"old")
    hub.add_model(REPO, tmp_path / "old")
    assert refused().code == "MTP059"
    assert push_it(ready(), force=True).deleted == ["pytorch_model.bin"]


def test_a_branch_that_cannot_be_removed_is_no_failure(hub: LoopbackHub) -> None:
    hub.fault("DELETE", "/branch/", 99, status=403)
    done = push_it(ready())
    assert done.commit == hub.head(REPO)
    assert own_files(hub) == digests(ready())
    (left,) = branches(hub) - {"main"}
    assert left in done.notes[0]


def test_a_new_branch_and_an_old_one(hub: LoopbackHub) -> None:
    push_it(ready())
    before = hub.head(REPO)
    push_it(ready("megatron"), branch="megatron")
    assert hub.head(REPO) == before
    assert digests(ready("megatron")).items() <= own_files(hub, "megatron").items()
    push_it(ready(), branch="megatron")
    assert own_files(hub, "megatron") == digests(ready())
    assert branches(hub) == {"main", "megatron"}


@pytest.mark.parametrize("fault", [{}, {"lose_answer": True}, {"lose_answer": True, "status": 504}])
def test_one_pull_request_however_often(hub: LoopbackHub, fault: dict[str, object]) -> None:
    push_it(ready())
    before = hub.head(REPO)
    if fault:
        hub.fault("POST", "/discussions$", **fault)
        hub.fault("POST", "/commit/refs", **fault)
    made = push_it(ready("megatron"), pr=True)
    again = push_it(ready("megatron"), pr=True)
    assert (made.target, again.target) == ("refs/pr/1", "refs/pr/1")
    assert [p.status for p in hub.repo(REPO).pulls] == ["open"]
    assert made.pull_request.endswith("/discussions/1")
    assert hub.head(REPO) == before
    assert len(hub.commits(REPO, "refs/pr/1")) == 3
    assert digests(ready("megatron")).items() <= own_files(hub, "refs/pr/1").items()


@pytest.mark.parametrize("revision", ["main", "mtp-convert"])
def test_a_file_that_the_hub_lost_is_noticed(hub: LoopbackHub, revision: str) -> None:
    hub.fault("POST", f"/commit/{revision}", lose_file="config.json")
    error = refused()
    assert error.code == "MTP057"
    assert [p.where for p in error.problems] == ["config.json"]
    if revision != "main":
        assert own_files(hub) == {}
    push_it(ready())
    assert own_files(hub) == digests(ready())


def test_a_gitignore_on_the_hub_is_noticed(hub: LoopbackHub) -> None:
    hub.add_model(REPO)
    hub.put(REPO, ".gitignore", b"*.json\n")
    error = refused()
    assert error.code == "MTP057"
    assert ".gitignore" in error.hint
    assert set(own_files(hub)) == {".gitignore"}


def test_a_killed_push_goes_on_from_its_branch(hub: LoopbackHub) -> None:
    class Killed(BaseException):
        pass

    class Dies(Hub):
        def copies(self, paths: object, commit: str) -> list[object]:  # type: ignore[override]
            raise Killed

    with pytest.raises(Killed):
        push(ready(), Dies(REPO), PushOptions())
    assert own_files(hub) == {}
    sent = hub.count("PUT", "/_blob/")
    push_it(ready())
    assert hub.count("PUT", "/_blob/") == sent
    assert hub.count("POST", "/commit/mtp-convert") == 1
    assert branches(hub) == {"main"}


def test_a_file_that_changes_while_it_is_sent(hub: LoopbackHub) -> None:
    changed = {p: replace(f, sha256="0" * 64) if p.endswith(".safetensors") else f for p, f in ready().items()}
    with pytest.raises(ConvertError) as error:
        push_it(changed)
    assert error.value.code == "MTP041"
    assert own_files(hub) == {}


@pytest.mark.parametrize("token", ["hf_test_ro", "hf_wrong", ""])
def test_tokens_that_may_not_write(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    error = refused()
    assert error.code == "MTP051"
    assert hub.store.repos == {}
    assert len(hub.requests) <= 1


def test_another_namespace(hub: LoopbackHub) -> None:
    with pytest.raises(ConvertError) as error:
        push(ready(), Hub("them/m"), PushOptions())
    assert error.value.code == "MTP051"
    assert "them" in error.value.headline()


def damage_byte(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def foreign_weights(folder: Path) -> None:
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "other.safetensors")


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (damage_byte, "MTP061"),
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "MTP011"),
        (foreign_weights, "MTP061"),
        (lambda f: (f / "mtp_convert.json").unlink(), "MTP002"),
        (lambda f: (f / "config.json").unlink(), "MTP020"),
        (lambda f: (f / "notes.txt").symlink_to("/etc/hostname"), "MTP015"),
    ],
    ids=["byte", "shard", "foreign", "record", "config", "link"],
)
def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path, damage: object, code: str) -> None:
    folder = Path(shutil.copytree(converted("hf"), tmp_path / "m"))
    damage(folder)  # type: ignore[operator]
    with pytest.raises(ConvertError) as error:
        prepare(folder, REPO, card=True, force=False)
    assert error.value.code == code


def test_digests_decide_what_is_the_same() -> None:
    here = ready()
    there = {p: RemoteFile(f.size, f.git_oid, f.sha256 if p.endswith(".safetensors") else "") for p, f in here.items()}
    assert compare(here, there, ()).none
    assert not differing(here, (), there)
    for path, file in there.items():
        for wrong in (replace(file, size=file.size + 1), replace(file, git_oid="1", sha256=file.sha256 and "1")):
            assert compare(here, {**there, path: wrong}, ()).changed == (path,)
            assert [p.where for p in differing(here, (), {**there, path: wrong})] == [path]


def test_only_what_a_loader_could_mix_up_is_stale() -> None:
    there = [
        "a.safetensors",
        "pytorch_model.bin",
        "x.gguf",
        "lora/adapter.safetensors",
        "README.md",
        "release/common.pt",
    ]
    assert stale(["model.safetensors"], there, ()) == ("a.safetensors", "pytorch_model.bin")
    assert stale(["model.safetensors"], there, ["release/__0_0.distcp"])[2:] == ("release/common.pt",)
