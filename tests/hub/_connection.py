"""What every route of the loopback Hub has: who asks, the body, an answer, a file or a range of it, and faults."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from _store import ROLES, Fault, Request, Store

BLOCK = 1 << 16
Routes = tuple[tuple[str, str, Callable[..., None]], ...]  # methods, pattern of the path, work


class Dropped(Exception):
    """The connection ends here."""


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


class Connection(BaseHTTPRequestHandler):
    """One connection: requests are recorded, faults happen, the routes of a subclass do the work."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits for the client's delayed acknowledgement
    routes: ClassVar[Routes] = ()
    unlocked: ClassVar[Callable[..., None] | None] = None  # the work that moves bytes and does not hold up the others
    store: Store
    xet: bool
    record: Request
    fault: Fault | None
    role: str

    def log_message(self, *args: object) -> None:
        """The log is `store.requests`."""

    def handle_any(self) -> None:
        self.record = Request(self.command, self.path, self.headers.get("Range", ""))
        self.store.requests.append(self.record)
        self.fault = self.store.fault_for(self.command, self.path)
        self.record.hit = self.fault is not None
        self._body: bytes | None = None
        try:
            self.before()
            self.route()
        except Refused as refused:
            self.body()
            headers = {"X-Error-Message": refused.message}
            self.answer(refused.status, {"error": refused.message}, {**headers, "X-Error-Code": refused.code})
        except (Dropped, ConnectionError):
            self.close_connection = True
            self.connection.close()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_any

    def before(self) -> None:
        """Faults that come before the work, and who is asking."""
        f = self.fault
        if f is not None:
            time.sleep(f.delay)
            if f.drop_after is not None and self.command not in ("GET", "PUT"):
                self.rfile.read(min(f.drop_after, int(self.headers.get("Content-Length") or 0)))
                raise Dropped
            if f.status is not None and not f.lose_answer:
                raise Refused(f.status, f.message)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if token and token not in ROLES:
            raise Refused(401, "Invalid credentials in Authorization header")
        self.role = ROLES.get(token, "")

    def route(self) -> None:
        path = urlsplit(self.path).path
        for methods, pattern, work in self.routes:
            if self.command in methods.split() and (found := re.fullmatch(pattern, path)):
                groups = [unquote(g) if g else "" for g in found.groups()]
                if work is type(self).unlocked:
                    return work(self, *groups)
                with self.store.lock:
                    return work(self, *groups)
        raise Refused(404, f"no route {self.command} {path}")

    def body(self) -> bytes:
        """The request's body, read once."""
        if self._body is None:
            self._body = b"".join(self._chunks())
            self.record.received += len(self._body)
        return self._body

    def _chunks(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def asked(self) -> dict[str, Any]:
        """The body as JSON."""
        found: dict[str, Any] = json.loads(self.body() or b"{}")
        return found

    def answer(self, status: int, data: object = None, headers: dict[str, str] | None = None) -> None:
        """An answer with a small body; a fault may lose it."""
        f = self.fault
        if f is not None and f.lose_answer and status < 400:
            if f.status is None:
                raise Dropped
            status, data, headers = f.status, {"error": "injected"}, None
        raw = data if isinstance(data, bytes) else b"" if data is None else json.dumps(data).encode()
        self.record.status = status
        self.send_response(status)
        sent = {"Content-Type": "application/json", "Content-Length": str(len(raw)), **(headers or {})}
        if f is not None and f.retry_after is not None and status >= 400:
            sent["Retry-After"] = str(f.retry_after)
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)
            self.record.sent += len(raw)

    @property
    def here(self) -> str:
        return f"http://{self.headers['Host']}"

    @property
    def storage_host(self) -> str:
        """Large files are read from another host, as from the real Hub."""
        name, _, port = self.headers["Host"].partition(":")
        return f"http://{'localhost' if name == '127.0.0.1' else '127.0.0.1'}:{port}"

    def query(self, name: str) -> str:
        return parse_qs(urlsplit(self.path).query).get(name, [""])[0]

    def give(self, data: bytes, headers: dict[str, str]) -> None:
        """The bytes of a file, or the range that was asked for."""
        size, status, start, stop = len(data), 200, 0, len(data)
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.record.range):
            start, stop = int(found[1]), min(int(found[2] or size) + 1, size)
            if start >= size:
                return self.answer(416, None, {"Content-Range": f"bytes */{size}"})
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        part = data[start:stop]
        self.record.status = status
        self.send_response(status)
        fixed = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", "Content-Length": str(len(part))}
        for key, value in {**fixed, **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        f = self.fault
        most = len(part) if f is None or f.drop_after is None else min(f.drop_after, len(part))
        self.wfile.write(part[:most])
        self.record.sent += most
        if most < len(part) or (f is not None and f.lose_answer):
            self.wfile.flush()
            raise Dropped
