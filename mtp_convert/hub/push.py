"""A converted folder onto the Hub, so that the target is at every moment the old checkpoint or the new one.

1  every file here is read once: digests, and a check against the folder's own record
2  the repository is looked at, or made; its visibility is checked before a byte is sent
3  what is new or changed goes to a branch of its own (or to a pull request), in one commit
4  the digest of every file there is compared with the one here
5  one commit brings the target to that state: large files are taken over from the branch, stale weights removed

Repeating a push goes on where the last one ended: what the Hub has is not sent again. A commit is never made twice:
when its answer is lost, the target is looked at before it is tried again, and every commit names its parent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mtp_convert.errors import ConvertError, Problem
from mtp_convert.hub.client import FAILURES, Hub, Operation, Visible
from mtp_convert.hub.plan import Changes, LocalFile, RemoteFile, compare, differing, overwritten, recorded_payload
from mtp_convert.location import PROVENANCE

MAIN = "main"
STAGES = "mtp-convert/"  # branches that hold an upload until it is complete
CARD = "README.md"
Files = Mapping[str, LocalFile]


@dataclass(frozen=True)
class PushOptions:
    """private: asked for (None: as it is, and private where it is new). pr: a pull request instead of `branch`.

    force: replace weights that no push put there.
    """

    private: bool | None = None
    branch: str = MAIN
    pr: bool = False
    message: str = "Upload converted checkpoint"
    dry_run: bool = False
    force: bool = False


@dataclass(frozen=True)
class Pushed:
    """What a push did, or would do (`dry_run`). commit: empty where nothing was written; sizes in bytes."""

    repo: str
    url: str
    target: str
    private: bool
    created: bool
    dry_run: bool
    commit: str
    pull_request: str
    new: list[str]
    changed: list[str]
    same: list[str]
    deleted: list[str]
    kept: list[str]
    nbytes: int
    nbytes_to_send: int
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """The documented JSON object."""
        return {"schema_version": 1, **asdict(self)}


@dataclass(frozen=True)
class Done:
    """The target's commit, the revision of the pull request if there is one, and what the user should know."""

    commit: str
    pull: str = ""
    notes: tuple[str, ...] = ()


def push(files: Files, hub: Hub, options: PushOptions, *, notes: Iterable[str] = ()) -> Pushed:
    """Bring a repository to hold `files`, by path.

    Raises:
        ConvertError: exit code 7 for the Hub and the network, 73 when weights of others are in the way. The target is
            the old one then, unless MTP057 says otherwise.
    """
    hub.may_write()
    found = _visible(hub, options)
    _check_card(files, hub)
    created = found is None
    if found is None and not options.dry_run:
        found = _created(hub, options)
    head, there = _state(hub, found, options)
    changes = compare(files, there, _payload(hub, head, there))
    if not options.force and (theirs := overwritten(changes, there)):
        raise ConvertError("MTP059", [Problem("not put there by this tool", path) for path in theirs])
    done = Done(head or "")
    if not options.dry_run:
        assert found is not None
        assert head is not None
        bring = _proposed if options.pr else _brought
        done = bring(hub, files, changes, head, found, options)
    return Pushed(
        repo=hub.repo,
        url=hub.url,
        target=done.pull or options.branch,
        private=found.private if found else options.private is not False,
        created=created,
        dry_run=options.dry_run,
        commit="" if options.dry_run else done.commit,
        pull_request=f"{hub.url}/discussions/{done.pull.rpartition('/')[2]}" if done.pull else "",
        new=list(changes.new),
        changed=list(changes.changed),
        same=list(changes.same),
        deleted=list(changes.deleted),
        kept=list(changes.kept),
        nbytes=sum(f.size for f in files.values()),
        nbytes_to_send=sum(files[p].size for p in changes.sent),
        notes=[*notes, *done.notes],
    )


def _check_card(files: Files, hub: Hub) -> None:
    """The metadata of the card, before anything is made or sent."""
    if CARD in files:
        source = files[CARD].source
        raw = source if isinstance(source, bytes) else source.read_bytes()
        hub.check_card(raw.decode("utf-8", errors="replace"))


def _visible(hub: Hub, options: PushOptions) -> Visible | None:
    """The repository as it is.

    Raises:
        ConvertError: MTP058 unless it is as visible as was asked for.
    """
    found = hub.look(None if options.pr else options.branch)
    if found is not None and options.private is not None and found.private != options.private:
        words = {True: "private", False: "public"}
        raise ConvertError("MTP058", Problem("visibility", hub.repo, words[found.private], words[options.private]))
    return found


def _created(hub: Hub, options: PushOptions) -> Visible:
    """The repository, new. Somebody may have made it at the same moment, so it is looked at again."""
    private = options.private is not False
    hub.create(private=private)
    made = _visible(hub, PushOptions(private, options.branch, options.pr))
    if made is None:
        raise ConvertError("MTP052", Problem("made, but not to be seen by this account", hub.repo))
    return made


def _state(hub: Hub, found: Visible | None, options: PushOptions) -> tuple[str | None, Mapping[str, RemoteFile]]:
    """Commit and files that the push begins with: the target's, or those of the branch it will start from."""
    if found is None:
        return None, {}
    head = found.head or hub.head(MAIN)
    if head is None:
        raise ConvertError("MTP052", Problem(f"no branch {MAIN}", hub.repo))
    return head, hub.files(head)


def _payload(hub: Hub, head: str | None, there: Mapping[str, RemoteFile]) -> frozenset[str]:
    """The payload that an earlier push recorded."""
    if head is None or PROVENANCE not in there:
        return frozenset()
    return recorded_payload(hub.read(PROVENANCE, head))


def _brought(hub: Hub, files: Files, changes: Changes, head: str, found: Visible, options: PushOptions) -> Done:
    """The target branch as it has to be."""
    if changes.none:
        if found.head is None:
            hub.create_branch(options.branch, head)
        return Done(head)
    stage = STAGES + _identity(files, changes.deleted)
    hub.create_branch(stage, head)
    staged, there = _complete(hub, stage, files, changes.deleted, options.message)
    if found.head is None:
        hub.create_branch(options.branch, staged)
        commit = staged
    else:
        large = [p for p in changes.sent if there[p].sha256]
        small = hub.upload([files[p] for p in changes.sent if p not in large], options.branch)
        operations = [*small, *hub.copies(large, staged)]
        commit = _committed(hub, options.branch, operations, files, changes.deleted, options.message, head)
    _check(hub, options.branch, commit, files, changes.deleted)
    try:
        hub.delete_branch(stage)
    except ConvertError as error:
        return Done(commit, notes=(f"the branch {stage} is not needed any more and could not be removed: {error}",))
    return Done(commit)


def _proposed(hub: Hub, files: Files, changes: Changes, head: str, found: Visible, options: PushOptions) -> Done:
    """A pull request with the change, not merged. The same push finds the same one."""
    if changes.none:
        return Done(head)
    pull = hub.pull(f"{options.message} ({_identity(files, changes.deleted)})")
    commit, _ = _complete(hub, pull.revision, files, changes.deleted, options.message)
    hub.publish(pull)
    return Done(commit, pull.revision)


def _complete(
    hub: Hub, revision: str, files: Files, deleted: tuple[str, ...], message: str
) -> tuple[str, Mapping[str, RemoteFile]]:
    """A branch or pull request of ours with every file, compared; its commit and files."""
    parent = hub.head(revision)
    if parent is None:
        raise ConvertError("MTP053", Problem("removed by somebody else", f"{revision} of {hub.repo}"))
    there = hub.files(parent)
    missing = [f for p, f in files.items() if p not in there or not there[p].equals(f)]
    gone = [p for p in deleted if p in there]
    commit = parent
    if missing or gone:
        added = hub.upload(missing, revision)
        commit = _committed(hub, revision, added, files, gone, message, parent)
    return commit, _check(hub, revision, commit, files, deleted)


def _check(hub: Hub, revision: str, commit: str, files: Files, deleted: Iterable[str]) -> Mapping[str, RemoteFile]:
    """The files of a commit, all of them as they are here.

    Raises:
        ConvertError: MTP057.
    """
    there = hub.files(commit)
    if problems := differing(files, deleted, there):
        hint = f"look at {revision} of {hub.repo}; a .gitignore there makes the Hub leave files out"
        raise ConvertError("MTP057", problems, hint=hint)
    return there


def _committed(
    hub: Hub,
    revision: str,
    operations: list[Operation],
    files: Files,
    deleted: Iterable[str],
    message: str,
    parent: str,
) -> str:
    """One commit, exactly once; its id.

    A failure says little about what happened there. Only when the revision has not moved is the commit tried again, on
    the same parent; so of two attempts of which both arrive, the Hub refuses the second.
    """
    deleted = list(deleted)
    for attempt in range(1, hub.patience.attempts + 1):
        try:
            return hub.commit(revision, operations, deleted, message, parent)
        except FAILURES as error:
            head = hub.head(revision)
            if head != parent:
                if head is not None and not differing(files, deleted, hub.files(head)):
                    return head
                raise ConvertError("MTP053", Problem("another commit was made", f"{revision} of {hub.repo}")) from error
            hub.wait_or_raise(error, attempt)
    raise AssertionError  # the last attempt has returned or raised


def _identity(files: Files, deleted: Iterable[str]) -> str:
    """A short name of the content: the same push finds what it left."""
    lines = [f"{f.sha256} {path}\n" for path, f in files.items()] + [f"- {path}\n" for path in deleted]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]
