"""What the push tests share: converted folders, the three ways to store large files, the client in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import huggingface_hub
import pytest
from _kit import TINY, convert
from _server import LoopbackHub, serve
from huggingface_hub import constants
from huggingface_hub.utils import _http

from mtp_convert.hub.client import Hub, Patience
from mtp_convert.hub.folder import prepare
from mtp_convert.hub.plan import LocalFile
from mtp_convert.hub.push import Pushed, PushOptions, push

REPO = "me/m"
TRANSPORTS: dict[str, dict[str, object]] = {"lfs": {}, "multipart": {"part_size": 300_000}, "xet": {"xet": True}}


@cache
def converted(layout: str) -> Path:
    """The shipped model, converted; do not change it in place."""
    folder = Path(mkdtemp(prefix="mtp-convert-push-"))
    if layout == "megatron":
        convert(TINY, folder / "megatron", "megatron")
    else:
        convert(converted("megatron"), folder / "model", "hf")
    return next(p for p in folder.iterdir() if not p.name.startswith("."))


@cache
def ready(layout: str = "hf") -> dict[str, LocalFile]:
    """Its files, made ready."""
    return prepare(converted(layout), REPO, card=True, force=False).files


def digests(files: dict[str, LocalFile]) -> dict[str, str]:
    """sha256 by path, of the content itself."""
    found = {}
    for path, f in files.items():
        data = f.source if isinstance(f.source, bytes) else f.source.read_bytes()
        found[path] = hashlib.sha256(data).hexdigest()
    return found


class Slept:
    """Stands in for `time`: pauses are noted, not made."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        """Note a pause."""
        self.pauses.append(seconds)


@contextmanager
def client_of(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slept]:
    """huggingface_hub in this process talks to `hub`, whose pauses cost no time."""
    slept = Slept()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_DISABLE_XET", not hub.xet)
        patch.setattr(constants, "HF_HUB_CACHE", str(hub.store.folder / "cache"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(_http, "time", slept)
        patch.setenv("HF_TOKEN", "hf_test_rw")
        patch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "2")  # read when the first upload begins
        patch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")
        huggingface_hub.close_session()
        yield slept
        huggingface_hub.close_session()


@pytest.fixture
def hub(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub that this process's client talks to; the parameter is a transport."""
    kind = getattr(request, "param", "lfs")
    with serve(tmp_path, **TRANSPORTS[kind]) as made, client_of(made, monkeypatch):  # type: ignore[arg-type]
        yield made


def push_it(files: dict[str, LocalFile], slept: Slept | None = None, attempts: int = 3, **options: object) -> Pushed:
    """A push without pauses."""
    patience = Patience(attempts, 1.0, sleep=(slept or Slept()).sleep)
    return push(files, Hub(REPO, patience), PushOptions(**options))  # type: ignore[arg-type]


def own_files(hub: LoopbackHub, rev: str = "main") -> dict[str, str]:
    """sha256 of every file that is not the repository's own."""
    return {p: digest for p, digest in hub.files(REPO, rev).items() if p != ".gitattributes"}


def branches(hub: LoopbackHub) -> set[str]:
    """Every branch."""
    return {name for name in hub.repo(REPO).refs if not name.startswith("refs/")}
