"""The protocol of the loopback Hub: one method per route."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import time
from typing import Any
from urllib.parse import parse_qs

from _connection import BLOCK, Connection, Dropped, Refused, Routes
from _store import ACCOUNT, Entry, Pull, Repo, ignored

DATE = "2026-01-01T00:00:00.000Z"


def no_repo(known: bool) -> Refused:
    return Refused(404 if known else 401, "Repository not found", "RepoNotFound")


class Handler(Connection):
    """A connection to the Hub."""

    # ------------------------------------------------------------------------------------------ accounts, repositories

    def whoami(self) -> None:
        if not self.role:
            raise Refused(401, "Unauthorized")
        token = {"displayName": "test", "role": self.role}
        self.answer(200, {"type": "user", "name": ACCOUNT, "orgs": [], "auth": {"accessToken": token}})

    def validate_yaml(self) -> None:
        text = self.asked()["content"]
        errors = [] if text.startswith("---\n") else [{"message": "no metadata"}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def create(self) -> None:
        asked = self.asked()
        if self.role != "write":
            raise Refused(403 if self.role else 401, "a token that may write is needed")
        name = asked["name"] if "/" in asked["name"] else f"{asked.get('organization') or ACCOUNT}/{asked['name']}"
        if not name.startswith(f"{ACCOUNT}/"):
            raise Refused(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]}")
        url = f"{self.here}/{name}"
        if name in self.store.repos:
            return self.answer(409, {"error": "You already created this model repo", "url": url})
        self.store.create(name, private=bool(asked.get("private") or asked.get("visibility") == "private"))
        self.answer(200, {"url": url, "name": name, "id": name})

    def repo(self, name: str, *, write: bool = False) -> Repo:
        found = self.store.repos.get(name)
        if found is None or (found.private and not self.role):
            raise no_repo(bool(self.role))
        if write and self.role != "write":
            raise Refused(403, "Forbidden: pass a token that may write") if self.role else no_repo(False)
        return found

    def at(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(revision or "main")
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def info(self, name: str, revision: str = "") -> None:
        repo = self.repo(name)
        sha = self.at(repo, revision)
        files = [{"rfilename": path} for path in sorted(repo.commits[sha].tree)]
        facts = {"private": repo.private, "gated": "auto" if repo.gated else False, "disabled": False, "tags": []}
        self.answer(200, {"_id": "0", "id": name, "modelId": name, "sha": sha, "siblings": files, **facts})

    def branch(self, name: str, branch: str) -> None:
        repo, asked = self.repo(name, write=True), self.asked()
        if self.command == "DELETE":
            if repo.refs.pop(branch, None) is None:
                raise Refused(404, f"no branch {branch}", "RevisionNotFound")
        elif branch in repo.refs:
            raise Refused(409, f"Reference already exists: {branch}")
        else:
            repo.refs[branch] = self.at(repo, asked.get("startingPoint", "main"))
        self.answer(200, {})

    def refs(self, name: str) -> None:
        heads = {n: sha for n, sha in self.repo(name).refs.items() if not n.startswith("refs/")}
        rows = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in heads.items()]
        self.answer(200, {"branches": rows, "tags": [], "converts": []})

    def history(self, name: str, revision: str) -> None:
        repo = self.repo(name)
        self.at(repo, revision)
        rows = [{"id": c.sha, "title": c.title, "message": "", "authors": [], "date": DATE}
                for c in self.store.history(repo, revision)]  # fmt: skip
        self.answer(200, rows)

    def tree(self, name: str, revision: str, below: str = "") -> None:
        repo = self.repo(name)
        tree = repo.commits[self.at(repo, revision)].tree
        self.answer(200, [_row(path, e) for path, e in sorted(tree.items()) if path.startswith(below)])

    def paths_info(self, name: str, revision: str) -> None:
        repo, raw = self.repo(name), self.body()
        tree = repo.commits[self.at(repo, revision)].tree
        paths = json.loads(raw)["paths"] if raw.startswith(b"{") else parse_qs(raw.decode())["paths"]
        self.answer(200, [_row(path, tree[path]) for path in paths if path in tree])

    def discussions(self, name: str) -> None:
        repo = self.repo(name)
        if self.command == "POST":
            repo.pulls.append(Pull(self.asked()["title"]))
            repo.refs[f"refs/pr/{len(repo.pulls)}"] = repo.refs["main"]
            return self.answer(200, {"num": len(repo.pulls), "url": f"/{name}/discussions/{len(repo.pulls)}"})
        rows = [self._discussion(name, n) for n in range(len(repo.pulls), 0, -1)]
        self.answer(200, {"discussions": rows, "count": len(rows), "start": 0})

    def discussion(self, name: str, number: str) -> None:
        self.repo(name)
        events = {"changes": {"base": "refs/heads/main"}, "events": [], "filesWithConflicts": [], "diffUrl": ""}
        self.answer(200, {**self._discussion(name, int(number)), **events})

    def discussion_status(self, name: str, number: str) -> None:
        status = self.asked()["status"]
        self.repo(name, write=True).pulls[int(number) - 1].status = status
        event = {"id": "0", "type": "status-change", "createdAt": DATE, "author": {"name": ACCOUNT}}
        self.answer(200, {"newStatus": {**event, "data": {"status": status}}})

    def _discussion(self, name: str, number: int) -> dict[str, Any]:
        pull = self.store.repos[name].pulls[number - 1]
        who = {"author": {"name": ACCOUNT}, "createdAt": DATE, "repo": {"name": name, "type": "model"}}
        return {"num": number, "title": pull.title, "status": pull.status, "isPullRequest": True, **who}

    # ---------------------------------------------------------------------------------------------------------- upload

    def preupload(self, name: str, revision: str) -> None:
        repo = self.repo(name, write=True)
        tree = repo.commits[self.at(repo, revision)].tree
        rows = []
        for f in self.asked()["files"]:
            old = tree.get(f["path"])
            mode = "lfs" if self.store.is_large(f["path"], f["size"]) else "regular"
            row = {"path": f["path"], "uploadMode": mode, "shouldIgnore": ignored(tree, f["path"])}
            rows.append({**row, "oid": (old.sha256 or old.oid) if old else None})
        self.answer(200, {"files": rows, "commitOid": repo.refs["main"]})

    def lfs_batch(self, name: str) -> None:
        asked = self.asked()
        self.repo(name, write=True)
        rows = [self._lfs_row(o["oid"], o["size"], "multipart" in asked["transfers"]) for o in asked["objects"]]
        parts = any("chunk_size" in r.get("actions", {}).get("upload", {}).get("header", {}) for r in rows)
        self.answer(200, {"transfer": "multipart" if parts else "basic", "objects": rows})

    def _lfs_row(self, oid: str, size: int, in_parts: bool) -> dict[str, Any]:
        row: dict[str, Any] = {"oid": oid, "size": size}
        url, part = f"{self.storage_host}/_blob/{oid}", self.store.part_size
        if (self.store.blobs / oid).is_file():
            return row
        if part and in_parts and size > part:
            urls = {str(n + 1): f"{url}/part/{n + 1}" for n in range(-(-size // part))}
            return {
                **row,
                "actions": {"upload": {"href": f"{url}/complete", "header": {"chunk_size": str(part), **urls}}},
            }
        return {**row, "actions": {"upload": {"href": url}, "verify": {"href": f"{self.here}/_blob/{oid}/verify"}}}

    def blob(self, oid: str, tail: str = "") -> None:
        path = self.store.blobs / oid
        if self.command == "PUT":
            self._receive(oid, tail)
        elif tail == "/complete":
            parts = sorted(self.store.blobs.glob(f"{oid}.part*"), key=lambda p: int(p.suffix[5:]))
            self.body()
            self._keep(oid, b"".join(p.read_bytes() for p in parts))
            self.answer(200, {})
        elif tail == "/verify":
            self.body()
            self.answer(200 if path.is_file() else 404, {})
        elif path.is_file():
            self.give(path.read_bytes(), {"ETag": f'"{oid}"'})
        else:
            raise Refused(404, "no such blob")

    def _receive(self, oid: str, tail: str) -> None:
        left, f, blocks = int(self.headers["Content-Length"]), self.fault, []
        while left:
            most = BLOCK if f is None or f.drop_after is None else f.drop_after - self.record.received
            if most <= 0 or not (block := self.rfile.read(min(left, BLOCK, most))):
                raise Dropped
            blocks.append(block)
            self.record.received += len(block)
            left -= len(block)
        self._body, data = b"", b"".join(blocks)
        if tail.startswith("/part/"):
            (self.store.blobs / f"{oid}.part{int(tail.removeprefix('/part/'))}").write_bytes(data)
            etag = hashlib.md5(data).hexdigest()
        else:
            self._keep(oid, data)
            etag = oid
        self.answer(200, None, {"ETag": f'"{etag}"'})

    def _keep(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refused(400, "the bytes are not those of the digest")
        (self.store.blobs / oid).write_bytes(data)

    def commit(self, name: str, revision: str) -> None:
        repo, lines = self.repo(name, write=True), [json.loads(line) for line in self.body().splitlines()]
        head = self.at(repo, revision)
        if revision not in repo.refs:
            raise Refused(404, f"{revision} is no branch", "RevisionNotFound")
        header = next(line["value"] for line in lines if line["key"] == "header")
        if not head.startswith(header.get("parentCommit") or ""):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(repo.commits[head].tree)
        for line in lines:
            self._apply(tree, line["key"], line["value"])
        sha = self.store.commit(repo, revision, header["summary"], tree, head)
        url = f"{self.here}/{name}/commit/{sha}"
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _apply(self, tree: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        path = value.get("path", "")
        if path.startswith("/") or ".." in path.split("/"):
            raise Refused(400, f"Invalid path {path!r}")
        if self.fault is not None and path and path == self.fault.lose_file:
            return
        if key == "file":
            try:
                data = base64.b64decode(value["content"], validate=True)
            except binascii.Error as error:
                raise Refused(400, str(error)) from error
            tree[path] = Entry(len(data), data)
        elif key == "lfsFile":
            if not self.xet and not (self.store.blobs / value["oid"]).is_file():
                raise Refused(400, f"LFS pointer pointed to a file that does not exist: {path}")
            size = value.get("size")  # a copy of a file that another commit has comes without
            tree[path] = Entry(size if size is not None else self._known_size(value["oid"]), None, value["oid"])
        elif key == "deletedFile" and tree.pop(path, None) is None:
            raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")

    def _known_size(self, oid: str) -> int:
        entries = (e for r in self.store.repos.values() for c in r.commits.values() for e in c.tree.values())
        return next(e.size for e in entries if e.sha256 == oid)

    def xet_token(self, name: str, kind: str, revision: str) -> None:
        repo = self.repo(name, write=kind == "write")
        self.at(repo, revision)
        if not self.xet:
            raise Refused(404, "this Hub has no Xet storage")
        url, until = f"local://{self.store.folder}/xet", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(until)}
        self.answer(200, {"casUrl": url, "exp": until, "accessToken": "xet"}, headers)

    # ------------------------------------------------------------------------------------------------------------ read

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.repo(name)
        if repo.gated and self.role != "write":
            raise Refused(403 if self.role else 401, "Access to this model is restricted", "GatedRepo")
        sha = self.at(repo, revision)
        entry = repo.commits[sha].tree.get(path)
        headers = {"X-Repo-Commit": sha}
        if entry is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        if entry.data is not None:
            return self.give(entry.data, {**headers, "ETag": f'"{entry.oid}"'})
        if self.xet and (found := self.store.xet_hashes().get(entry.sha256)):
            link = f'<{self.here}/api/models/{name}/xet-read-token/{sha}>; rel="xet-auth"'
            headers |= {"X-Xet-Hash": found, "Link": link}
        large = {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size), "ETag": f'"{entry.sha256}"'}
        self.answer(302, None, {**headers, **large, "Location": f"{self.storage_host}/_blob/{entry.sha256}"})


def _row(path: str, entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size}
    return (
        row if entry.data is not None else {**row, "lfs": {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}}
    )


M = r"([^/]+/[^/]+)"  # a model's name
ROUTES: Routes = (
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("POST", r"/api/repos/create", Handler.create),
    ("GET", rf"/api/models/{M}", Handler.info),
    ("GET", rf"/api/models/{M}/revision/(.+)", Handler.info),
    ("GET", rf"/api/models/{M}/refs", Handler.refs),
    ("POST DELETE", rf"/api/models/{M}/branch/(.+)", Handler.branch),
    ("GET", rf"/api/models/{M}/tree/([^/]+)(?:/(.*))?", Handler.tree),
    ("POST", rf"/api/models/{M}/paths-info/(.+)", Handler.paths_info),
    ("GET", rf"/api/models/{M}/commits/(.+)", Handler.history),
    ("POST", rf"/api/models/{M}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/api/models/{M}/commit/(.+)", Handler.commit),
    ("GET POST", rf"/api/models/{M}/discussions", Handler.discussions),
    ("GET", rf"/api/models/{M}/discussions/(\d+)", Handler.discussion),
    ("POST", rf"/api/models/{M}/discussions/(\d+)/status", Handler.discussion_status),
    ("GET", rf"/api/models/{M}/xet-(read|write)-token/(.+)", Handler.xet_token),
    ("POST", rf"/{M}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT GET HEAD POST", r"/_blob/([0-9a-f]{64})(/.*)?", Handler.blob),
    ("GET HEAD", rf"/{M}/resolve/([^/]+)/(.+)", Handler.resolve),
)  # fmt: skip
Handler.routes, Handler.unlocked = ROUTES, Handler.blob
