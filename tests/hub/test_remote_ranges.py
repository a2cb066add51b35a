"""Byte ranges of one file from the loopback Hub, undisturbed and with every fault."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _client import moved, pointed_at
from _server import LoopbackHub, serve
from huggingface_hub import constants, get_session

from mtp_convert.errors import ConvertError
from mtp_convert.hub import ranges
from mtp_convert.hub.ranges import ATTEMPTS, HubFile

DATA = random.Random(3).randbytes(700_001)
SHARD, SMALL = "model.safetensors", "config.json"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / SHARD).write_bytes(DATA)
    (folder / SMALL).write_bytes(DATA[:1000])
    with serve(tmp_path) as hub, pointed_at(hub, tmp_path / "cache", monkeypatch):
        hub.add_model("me/m", folder)
        yield hub


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(ranges, "sleep", found.append)
    return found


def file(hub: LoopbackHub, path: str = SHARD, size: int = len(DATA)) -> HubFile:
    return HubFile("me/m", hub.head("me/m"), path, size)


def read(of: HubFile, start: int, stop: int) -> bytes:
    return b"".join(of.blocks(start, stop))


def refused(of: HubFile, start: int = 0, stop: int = 1000) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        read(of, start, stop)
    return caught.value


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (8, 700_001), (699_999, 700_001), (0, 700_001), (5, 5)])
def test_exactly_these_bytes(hub: LoopbackHub, start: int, stop: int) -> None:
    assert read(file(hub), start, stop) == DATA[start:stop]
    assert moved(hub) == stop - start


def test_the_hub_is_asked_once_for_the_storage_host(hub: LoopbackHub) -> None:
    of = file(hub)
    for at in range(0, 5000, 1000):
        read(of, at, at + 1000)
    assert [r.status for r in hub.requests] == [302, *[206] * 5]


def test_a_file_that_is_no_large_one(hub: LoopbackHub) -> None:
    assert read(file(hub, SMALL, 1000), 10, 20) == DATA[10:20]
    assert [r.status for r in hub.requests] == [206]


def test_the_token_stays_with_the_hub(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(request: Any) -> None:  # noqa: ANN401 - a request of the HTTP library
        seen.append((request.url.host, request.headers.get("authorization")))

    monkeypatch.setitem(get_session().event_hooks, "request", [look])
    read(file(hub), 0, 10)
    assert seen == [("127.0.0.1", "Bearer hf_test_rw"), ("localhost", None)]


class TestRetried:
    @pytest.mark.parametrize("after", [0, 1, 65_536, 300_000, 699_999])
    def test_a_broken_connection_goes_on_where_it_broke(
        self, hub: LoopbackHub, pauses: list[float], after: int
    ) -> None:
        hub.fault("GET", "/_blob/", drop_after=after)
        assert read(file(hub), 0, len(DATA)) == DATA
        assert moved(hub) == len(DATA), "no byte was sent twice"
        assert len(pauses) == 1

    def test_progress_renews_the_patience(self, hub: LoopbackHub, pauses: list[float]) -> None:
        hub.fault("GET", "/_blob/", times=3 * ATTEMPTS, drop_after=10_000)
        assert read(file(hub), 0, len(DATA)) == DATA
        assert pauses == [ranges.FIRST_PAUSE] * 3 * ATTEMPTS

    @pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
    @pytest.mark.parametrize("where", ["/resolve/", "/_blob/"])
    def test_a_busy_server(self, hub: LoopbackHub, pauses: list[float], where: str, status: int) -> None:
        hub.fault("GET", where, times=ATTEMPTS - 1, status=status)
        assert read(file(hub), 7, 77) == DATA[7:77]
        assert pauses == [0.5, 1, 2, 4, 8]

    def test_the_pause_that_the_server_asks_for(self, hub: LoopbackHub, pauses: list[float]) -> None:
        hub.fault("GET", "/resolve/", status=429, retry_after=7)
        assert read(file(hub), 0, 10) == DATA[:10]
        assert pauses == [7]

    @pytest.mark.parametrize("status", [401, 403, 404, 410])
    def test_a_signed_address_that_expired(self, hub: LoopbackHub, pauses: list[float], status: int) -> None:
        of = file(hub)
        read(of, 0, 10)
        hub.fault("GET", "/_blob/", status=status)
        assert read(of, 10, 20) == DATA[10:20]
        assert hub.count("GET", "/resolve/") == 2

    @pytest.mark.parametrize("what", [{"status": 503}, {"drop_after": 0}])
    def test_not_for_ever(self, hub: LoopbackHub, pauses: list[float], what: dict[str, int]) -> None:
        hub.fault("GET", "/_blob/", times=99, **what)
        error = refused(file(hub))
        assert error.exit_code == 7
        assert SHARD in error.headline()
        assert len(pauses) == ATTEMPTS - 1


class TestRefused:
    def test_no_such_repository(self, hub: LoopbackHub, pauses: list[float]) -> None:
        error = refused(HubFile("me/other", hub.head("me/m"), SHARD, 10))
        assert (error.code, error.exit_code, pauses) == ("MTP052", 7, [])

    def test_no_such_file(self, hub: LoopbackHub, pauses: list[float]) -> None:
        assert refused(file(hub, "other.safetensors")).code == "MTP052"

    def test_private(self, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.repo("me/m").private = True
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
        assert refused(file(hub)).exit_code == 7

    def test_gated(self, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.repo("me/m").gated = True
        monkeypatch.setenv("HF_TOKEN", "hf_test_ro")
        error = refused(file(hub))
        assert (error.code, error.exit_code) == ("MTP051", 7)
        assert "terms" in error.hint

    def test_a_bad_token_is_not_printed(self, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        error = refused(file(hub))
        assert error.code == "MTP051"
        assert "hf_secret" not in f"{error.headline()} {error.hint}"

    def test_offline(self, hub: LoopbackHub, pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert (refused(file(hub)).code, pauses, hub.requests) == ("MTP056", [], [])

    def test_no_connection(self, hub: LoopbackHub, pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        assert (refused(file(hub)).code, len(pauses)) == ("MTP055", ATTEMPTS - 1)


class TestChanged:
    def test_another_size(self, hub: LoopbackHub) -> None:
        assert refused(file(hub, size=len(DATA) + 1)).code == "MTP041"

    def test_other_bytes_of_the_same_size(self, hub: LoopbackHub) -> None:
        """Somebody who may rewrite history does: the commit is the same, the file is another."""
        of = file(hub)
        read(of, 0, 10)
        other = hub.store.entry(SHARD, DATA[::-1])
        hub.repo("me/m").commits[hub.head("me/m")].tree[SHARD] = other
        hub.fault("GET", "/_blob/", status=403)  # so that the Hub is asked again
        assert refused(of).code == "MTP041"

    def test_another_commit(self, hub: LoopbackHub) -> None:
        """A revision that is no commit moves on."""
        of = HubFile("me/m", "main", SHARD, len(DATA))
        assert refused(of).code == "MTP041"

    def test_a_later_commit_does_not_matter(self, hub: LoopbackHub) -> None:
        of = file(hub)
        read(of, 0, 10)
        hub.put("me/m", SHARD, DATA[::-1])
        assert read(of, 10, 20) == DATA[10:20]
        assert read(HubFile("me/m", hub.repo("me/m").commits[hub.head("me/m")].parent or "", SHARD, len(DATA)), 0, 10)


def test_a_server_without_ranges_is_not_asked_for_everything(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from _connection import Connection

    give = Connection.give

    def whole(self: Connection, data: bytes, headers: dict[str, str]) -> None:
        self.record.range = ""
        give(self, data, headers)

    monkeypatch.setattr(Connection, "give", whole)
    error = refused(file(hub))
    assert "no byte ranges" in error.headline()
    assert read(file(hub, SMALL, 1000), 0, 1000) == DATA[:1000], "what is wanted in whole may come in whole"
