"""Every fault at every request of a push, over three transports: nothing lost, nothing twice, nothing half."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from _push import REPO, TRANSPORTS, Slept, branches, digests, own_files, push_it, ready
from _push import hub as hub  # a fixture
from _server import LoopbackHub

from mtp_convert.errors import ConvertError

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub's own

# name -> (method, pattern) of every request that a first push sends
READS = {
    "who": ("GET", "whoami"),
    "look": ("GET", "/revision/main"),
    "tree": ("GET", "/tree/"),
    "card": ("POST", "validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "copies": ("POST", "/paths-info/"),
}
WRITES = {
    "create": ("POST", "/repos/create"),
    "branch": ("POST", "/branch/"),
    "stage commit": ("POST", "/commit/mtp-convert"),
    "main commit": ("POST", "/commit/main"),
    "delete branch": ("DELETE", "/branch/"),
}
STORAGE = {
    "lfs": {"batch": ("POST", "/objects/batch"), "blob": ("PUT", "/_blob/"), "verify": ("POST", "/verify")},
    "multipart": {"batch": ("POST", "/objects/batch"), "part": ("PUT", "/_blob/"), "complete": ("POST", "/complete")},
    "xet": {"xet token": ("GET", "/xet-write-token/")},
}
PASSING: dict[str, dict[str, Any]] = {
    "500": {"status": 500},
    "503 twice": {"status": 503, "times": 2},
    "429": {"status": 429, "retry_after": 3},
    "dropped": {"drop_after": 0},
}
LOST: dict[str, dict[str, Any]] = {
    "lost answer": {"lose_answer": True},
    "504 after": {"lose_answer": True, "status": 504},
}
SAID = "Invalid credentials in Authorization header"  # a 401 without these words means: no such repository
FINAL = {"401": ("MTP051", 401), "403": ("MTP051", 403), "404": ("MTP052", 404), "busy": ("MTP054", 503)}


@dataclass(frozen=True)
class Case:
    transport: str
    place: str
    what: str
    request: tuple[str, str]
    fault: dict[str, Any] = field(hash=False)
    code: str = ""

    def __str__(self) -> str:
        return f"{self.transport}-{self.place}-{self.what}"

    @property
    def always(self) -> bool:
        """Whether it runs by default: the commits, and one fault of every other kind."""
        if self.code:
            return self.transport == "lfs" and (self.place == "main commit" or self.what == "403")
        if self.place.endswith("commit"):
            return self.what in ("503 twice", *LOST)
        return self.what == "dropped" and (self.transport == "lfs" or self.place not in {**READS, **WRITES})


def passing() -> list[Case]:
    """Faults that pass: a push is expected to bear them."""
    found = []
    for transport, storage in STORAGE.items():
        for place, request in {**READS, **WRITES, **storage}.items():
            kinds = {**PASSING, **(LOST if place in WRITES or place in ("blob", "part", "complete") else {})}
            if request[0] == "GET":
                kinds = {**kinds, "dropped": {"lose_answer": True}}
            found += [Case(transport, place, what, request, fault) for what, fault in kinds.items()]
    return found


def final() -> list[Case]:
    """Faults that stay."""
    found = []
    for transport, storage in STORAGE.items():
        for place, request in {**READS, **WRITES, **storage}.items():
            if place == "delete branch" or (transport != "lfs" and place not in ("main commit", *storage)):
                continue
            for what, (code, status) in FINAL.items():
                if (place, what) == ("verify", "busy"):
                    continue  # the next attempt finds the file there, and nothing to verify
                found.append(
                    Case(transport, place, what, request, {"status": status, "times": 99, "message": SAID}, code)
                )
    return found


def tell(case: Case, hub: LoopbackHub, outcome: str) -> None:
    """One line for `pytest -rP`."""
    hits = sum(r.hit for r in hub.requests)
    received = sum(r.received for r in hub.requests)
    commits = len(hub.commits(REPO)) - 1 if REPO in hub.store.repos else 0
    print(f"{case}: {hits} faults in {len(hub.requests)} requests, {received} bytes, {commits} commits: {outcome}")


def complete(hub: LoopbackHub) -> None:
    """main holds everything, in one commit on top of the repository's own, and nothing else is left."""
    assert own_files(hub) == digests(ready())
    assert [c.title for c in hub.commits(REPO)] == ["Upload converted checkpoint", "initial commit"]
    assert branches(hub) == {"main"}
    assert hub.repo(REPO).private


def params(cases: list[Case]) -> pytest.MarkDecorator:
    """Cases as parameters, each with its Hub."""
    rows = [pytest.param(c.transport, c, id=str(c), marks=() if c.always else pytest.mark.hub) for c in cases]
    return pytest.mark.parametrize(("hub", "case"), rows, indirect=["hub"])


@params(passing())
def test_what_passes_is_borne(case: Case, hub: LoopbackHub) -> None:
    fault = hub.fault(*case.request, **{"times": 1, **case.fault})
    push_it(ready())
    tell(case, hub, "complete")
    assert fault.times == 0, "the fault was not met"
    complete(hub)


@params(final())
def test_what_stays_is_said_and_leaves_main_alone(case: Case, hub: LoopbackHub) -> None:
    fault = hub.fault(*case.request, **case.fault)
    with pytest.raises(ConvertError) as refused:
        push_it(ready())
    tell(case, hub, f"refused, {refused.value.code}: {refused.value.headline()}")
    assert refused.value.exit_code == 7
    assert refused.value.code == case.code
    assert fault.times < 99
    if REPO in hub.store.repos:
        assert own_files(hub) == {}
    fault.times = 0
    push_it(ready())
    complete(hub)


@pytest.mark.parametrize("hub", TRANSPORTS, indirect=True)
def test_a_repeated_push_sends_nothing_again(hub: LoopbackHub) -> None:
    """Large files that arrived before a failure are not sent a second time."""
    hub.fault("POST", "/commit/mtp-convert", 99, status=503)
    with pytest.raises(ConvertError, match="busy"):
        push_it(ready())
    sent = hub.count("PUT", "/_blob/")
    hub.store.faults.clear()
    push_it(ready())
    assert hub.count("PUT", "/_blob/") == sent
    complete(hub)


def test_pauses_double_and_follow_the_server(hub: LoopbackHub) -> None:
    slept = Slept()
    hub.fault("POST", "/commit/main", 2, status=503)
    push_it(ready(), slept)
    assert slept.pauses == [1.0, 2.0]
    hub.fault("GET", "whoami", 1, status=429, retry_after=7)
    push_it(ready(), slept)
    assert slept.pauses[2:] == [7.0]


def test_a_commit_that_arrives_late_is_not_made_twice(hub: LoopbackHub) -> None:
    """Its answer is lost, and so is the second one: the third look finds it done."""
    hub.fault("POST", "/commit/main", 2, lose_answer=True)
    push_it(ready())
    complete(hub)


def test_somebody_elses_commit_in_between_is_not_overwritten(hub: LoopbackHub) -> None:
    push_it(ready())
    head = hub.head(REPO)
    theirs: list[str] = []

    class Meanwhile(Slept):
        def sleep(self, seconds: float) -> None:
            theirs.append(hub.put(REPO, "config.json", b"{}"))

    hub.fault("POST", "/commit/main", 1, status=503)
    with pytest.raises(ConvertError) as refused:
        push_it({**ready("megatron")}, Meanwhile())
    assert refused.value.code == "MTP053"
    assert hub.head(REPO) == theirs[0]
    assert hub.commits(REPO)[1].sha == head
    push_it(ready())
    assert own_files(hub) == digests(ready())
