"""Byte ranges of one file of a pinned commit over HTTP.

The Hub answers for a file with its bytes or with a redirect to a storage host; the signed address of that host is kept
and used until it expires. A range that breaks off is continued at the byte where it broke off. Requests share the
connections of huggingface_hub's session, which also brings proxies, certificates and offline mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from time import sleep
from urllib.parse import urljoin

from mtp_convert.errors import ConvertError, Problem
from mtp_convert.hub import session
from mtp_convert.hub.faults import fault

ATTEMPTS = 6  # in a row without a single byte
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds
MOST_REDIRECTS = 5
NO_RANGES = "download the repository first (`hf download`), or ask the Hub itself (HF_ENDPOINT)"
EXPIRED = (401, 403, 404, 410)  # what a storage host says when its address was signed too long ago


class HubFile:
    """A file of a repository at a commit, `size` bytes long (see `containers.remote.Ranges`).

    Every answer must be about this commit, this size and one ETag.
    """

    def __init__(self, repo: str, commit: str, path: str, size: int) -> None:
        self.name = path.rpartition("/")[2]
        self.size = size
        self._where = f"{path} of {repo}@{commit}"
        self._commit = commit
        self._url = session.file_url(repo, path, commit)
        self._stored_at = ""  # address on a storage host, where the Hub named one
        self._etags: dict[bool, str] = {}  # what the Hub says, and what its storage host says
        self._lock = Lock()

    def blocks(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes [start, stop) in order.

        Raises:
            ConvertError: MTP041 the file is another one by now; exit code 7 for the Hub and the network.
        """
        at, failures = start, 0
        while at < stop:
            try:
                for block in self._answered(at, stop):
                    if len(block) > stop - at:
                        raise self._changed("length", f"more than {stop - start} bytes", str(stop - start))
                    at, failures = at + len(block), 0
                    yield block
                if at < stop:
                    raise ConnectionError("the answer ended early")
            except session.BROKEN as error:
                failures += 1
                if failures == ATTEMPTS or not session.passes(error):
                    raise fault(error, self._where) from error
                sleep(session.asked_pause(error) or min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE))

    def _answered(self, start: int, stop: int) -> Iterator[bytes]:
        """As much of a range as one answer holds."""
        url = self._stored_at or self._url
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        for _ in range(MOST_REDIRECTS):
            hub = session.same_host(url, self._url)
            with session.opened(url, headers, hub=hub) as answer:
                if hub:
                    self._check_commit(answer)
                if answer.has_redirect_location:
                    url = urljoin(url, answer.headers["Location"])
                    if not session.same_host(url, self._url):
                        self._stored_at = url
                    continue
                if not hub and answer.status_code in EXPIRED:
                    self._stored_at = ""
                    raise ConnectionError(f"{answer.status_code} from the storage host")
                session.check(answer)
                self._check_range(answer, start, stop, hub=hub)
                yield from answer.iter_raw()  # in blocks as they arrive: none waits to be filled when it breaks off
                return
        raise ConnectionError("too many redirects")

    def _check_commit(self, answer: session.Answer) -> None:
        """What the Hub says about the file."""
        commit = answer.headers.get("X-Repo-Commit", self._commit)
        if commit != self._commit:
            raise self._changed("commit", commit, self._commit)
        if answer.is_success or answer.has_redirect_location:
            self._check_etag(answer.headers.get("X-Linked-Etag") or answer.headers.get("ETag"), hub=True)

    def _check_range(self, answer: session.Answer, start: int, stop: int, *, hub: bool) -> None:
        """An answer with bytes must hold these ones, of this file."""
        if not hub:
            self._check_etag(answer.headers.get("ETag"), hub=False)
        if answer.status_code != 206:
            if (start, stop) == (0, self.size) == (0, int(answer.headers.get("Content-Length", -1))):
                return  # a whole file, whole
            raise ConvertError("MTP050", Problem("the server sends no byte ranges", self._where), hint=NO_RANGES)
        given, expected = answer.headers.get("Content-Range", ""), f"bytes {start}-{stop - 1}/{self.size}"
        if given != expected:
            raise self._changed("byte range", given, expected)

    def _check_etag(self, given: str | None, *, hub: bool) -> None:
        with self._lock:
            first = self._etags.setdefault(hub, given or "")
        if given is not None and first != given:
            raise self._changed("ETag", given, first)

    def _changed(self, what: str, got: str, expected: str) -> ConvertError:
        problem = Problem(f"{what} of another file", self._where, got, expected)
        return ConvertError("MTP041", problem, hint="run the command again")
