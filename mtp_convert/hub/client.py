"""A repository on the Hub, as much of it as a push needs. No other module writes to the Hub.

Every call is one question or one change. Whatever may be repeated without harm is repeated when the Hub is busy or the
connection breaks, after a pause that doubles or that the Hub asks for. What may not is `commit`: its caller first looks
whether it was done.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
)
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from mtp_convert import __version__
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.hub.faults import fault, may_pass, reason, redacted
from mtp_convert.hub.plan import LocalFile, RemoteFile
from mtp_convert.hub.session import BROKEN, asked_pause

T = TypeVar("T")
FAILURES: tuple[type[Exception], ...] = (*BROKEN, ValueError)  # the client reports malformed answers as ValueError
Operation = CommitOperationAdd | CommitOperationCopy


@dataclass(frozen=True)
class Patience:
    """How often a call is tried, and the pauses in between: `first` seconds, doubling up to `longest`."""

    attempts: int = 5
    first: float = 1.0
    longest: float = 30.0
    sleep: Callable[[float], None] = time.sleep

    def pause(self, attempt: int, asked: float = 0.0) -> None:
        """Wait after the failed attempt number `attempt`, from 1; `asked` is what the server wants."""
        self.sleep(max(asked, min(self.longest, self.first * 2 ** (attempt - 1))))


@dataclass(frozen=True)
class Visible:
    """The state of a repository: who can see it, and the commit of the revision that was asked for (None: no such)."""

    private: bool
    head: str | None


@dataclass(frozen=True)
class Pull:
    """A pull request of this account."""

    number: int
    draft: bool

    @property
    def revision(self) -> str:
        """Where its files are."""
        return f"refs/pr/{self.number}"


class Hub:
    """One repository.

    Every method raises ConvertError with exit code 7 for what the Hub or the network refuses (see `faults`).
    """

    def __init__(self, repo: str, patience: Patience | None = None, *, bars: bool = False) -> None:
        """bars: let huggingface_hub draw its progress bars."""
        self.repo = repo
        self.patience = patience or Patience()
        _check_token()
        if not bars:
            disable_progress_bars()
        self._api = HfApi(library_name="mtp-convert", library_version=__version__)

    @property
    def url(self) -> str:
        """Where people look at it."""
        return f"{self._api.endpoint}/{self.repo}"

    def may_write(self) -> str:
        """The account's name.

        Raises:
            ConvertError: MTP051 for a token that may only read.
        """
        me = self._patient(self._api.whoami)
        role = me.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise ConvertError("MTP051", Problem(f"the token of {me['name']} may only read", self.repo))
        return str(me["name"])

    def look(self, revision: str | None = None) -> Visible | None:
        """The repository; None where there is none (or none that this account may see)."""
        absent = (RepositoryNotFoundError, RevisionNotFoundError)
        try:
            info = self._patient(self._api.model_info, self.repo, revision=revision, give_up=absent)
        except RevisionNotFoundError:
            found = self.look()
            return None if found is None else Visible(found.private, None)
        except RepositoryNotFoundError:
            return None
        return Visible(bool(info.private), info.sha)

    def head(self, revision: str) -> str | None:
        """The commit of a revision, None where there is no such revision."""
        found = self.look(revision)
        return found.head if found else None

    def create(self, *, private: bool) -> None:
        """Make the repository; one that is there already stays as it is."""
        self._patient(self._api.create_repo, self.repo, private=private, exist_ok=True)

    def create_branch(self, branch: str, start: str) -> None:
        """A branch at a commit; one that is there already stays as it is."""
        self._patient(self._api.create_branch, self.repo, branch=branch, revision=start, exist_ok=True)

    def delete_branch(self, branch: str) -> None:
        """Remove a branch if it is there."""
        try:
            self._patient(self._api.delete_branch, self.repo, branch=branch, give_up=(RevisionNotFoundError,))
        except RevisionNotFoundError:
            return

    def files(self, revision: str) -> dict[str, RemoteFile]:
        """Size and digest of every file of a revision, by path."""

        def listed() -> list[RepoFile]:
            tree = self._api.list_repo_tree(self.repo, recursive=True, revision=revision)
            return [f for f in tree if isinstance(f, RepoFile)]

        rows = self._patient(listed)
        return {f.path: RemoteFile(f.size, f.blob_id, f.lfs.sha256 if f.lfs else "") for f in rows}

    def read(self, path: str, revision: str) -> bytes:
        """A small file."""
        found = self._patient(self._api.hf_hub_download, self.repo, path, revision=revision)
        return Path(found).read_bytes()

    def check_card(self, text: str) -> None:
        """Let the Hub check the metadata of a model card; nothing is stored.

        Raises:
            ConvertError: MTP060.
        """
        try:
            card = ModelCard(text, ignore_metadata_errors=False)
            self._patient(card.validate, repo_type="model", give_up=(ValueError,))
        except ValueError as error:
            raise ConvertError("MTP060", Problem(" ".join(str(error).split())[:300], "README.md")) from error

    def upload(self, files: Iterable[LocalFile], revision: str) -> list[Operation]:
        """Send what the Hub does not have yet to its storage; no revision shows it before `commit`.

        Raises:
            ConvertError: MTP041 when a file is not the one any more whose digest was taken.
        """
        files = list(files)
        added: list[CommitOperationAdd] = [
            CommitOperationAdd(f.path, f.source if isinstance(f.source, bytes) else str(f.source)) for f in files
        ]
        self._patient(self._api.preupload_lfs_files, self.repo, added, revision=revision)
        sent = ((f, a.upload_info) for f, a in zip(files, added, strict=True) if a.upload_info.is_hashed)
        changed = [f.path for f, info in sent if info.sha256.hex() != f.sha256]
        if changed:
            raise ConvertError("MTP041", [Problem("the file changed while it was uploaded", path) for path in changed])
        return list(added)

    def copies(self, paths: Iterable[str], commit: str) -> list[Operation]:
        """Files that another commit of the repository has: nothing is sent for them."""
        return [CommitOperationCopy(path, path, src_revision=commit) for path in paths]

    def commit(
        self,
        revision: str,
        operations: Iterable[Operation],
        deleted: Iterable[str],
        message: str,
        parent: str,
    ) -> str:
        """One commit on top of `parent`, tried once; returns its id.

        Raises:
            Exception: one of FAILURES, as huggingface_hub or the network raises it: whether it was done is not known.
        """
        removed = [CommitOperationDelete(path) for path in deleted]
        made = self._api.create_commit(
            self.repo, [*operations, *removed], commit_message=message, revision=revision, parent_commit=parent
        )
        return made.oid

    def pull(self, title: str) -> Pull:
        """The pull request of this title that is not closed, a new one if there is none."""
        found = self._pull(title)
        for attempt in range(1, self.patience.attempts + 1):
            if found is not None:
                return found
            try:
                made = self._api.create_pull_request(self.repo, title=title)
                return Pull(made.num, draft=True)
            except FAILURES as error:
                self.wait_or_raise(error, attempt)
            found = self._pull(title)  # the answer may have been lost after the work was done
        raise AssertionError  # the last attempt has returned or raised

    def _pull(self, title: str) -> Pull | None:
        def listed() -> list[Pull]:
            rows = self._api.get_repo_discussions(self.repo, discussion_type="pull_request")
            return [
                Pull(d.num, d.status == "draft") for d in rows if d.title == title and d.status in ("draft", "open")
            ]

        return next(iter(self._patient(listed)), None)

    def publish(self, pull: Pull) -> None:
        """Open a draft for review."""
        if pull.draft:
            self._patient(self._api.change_discussion_status, self.repo, pull.number, "open")

    def wait_or_raise(self, error: Exception, attempt: int) -> None:
        """Wait after a failure that may pass.

        Raises:
            ConvertError: for one that will not, and after the last attempt.
        """
        if not may_pass(error) or attempt >= self.patience.attempts:
            raise fault(error, self.repo) from error
        self.patience.pause(attempt, asked_pause(reason(error)))

    def _patient(
        self, call: Callable[..., T], *args: object, give_up: tuple[type[Exception], ...] = (), **given: object
    ) -> T:
        """Call until it is answered; errors of `give_up` are the caller's to handle."""
        for attempt in range(1, self.patience.attempts + 1):
            try:
                return call(*args, **given)
            except FAILURES as error:
                if isinstance(error, give_up):
                    raise
                self.wait_or_raise(error, attempt)
        raise AssertionError  # the last attempt has returned or raised


class _Quiet(logging.Filter):
    """Takes the user's token and the signatures of storage addresses out of what huggingface_hub logs."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = re.sub(r"\?[^\s'\"]+", "?...", redacted(record.getMessage())), ()
        return True


def _check_token() -> None:
    """Refuse a token that no header can carry: the HTTP library would print it in its own error.

    Raises:
        ConvertError: MTP051.
    """
    token = get_token()
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise ConvertError("MTP051", Problem("the token holds characters that no token has"))
    for handler in logging.getLogger("huggingface_hub").handlers:
        if not any(isinstance(f, _Quiet) for f in handler.filters):
            handler.addFilter(_Quiet())
