"""A small hub on the loopback address, in the protocol of the client libraries, that can be told to misbehave."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

C4 = "allenai/c4"
COMMIT = hashlib.sha1(b"the one commit").hexdigest()

C4_CARD = """---
configs:
- config_name: en
  default: true
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
- config_name: realnewslike
  data_files:
  - split: train
    path: realnewslike/c4-train.*.json.gz
---
A small likeness of a large corpus.
"""

Fault = Callable[["_Answer"], bool]
"""Told of a request before it is answered; true: it has answered, or broken, it."""


@dataclass
class Rule:
    """A fault for some requests.

    Attributes:
        pattern: of the path of a request, searched.
        fault: what is done in place of an answer.
        times: how often; -1 for ever.
        skip: so many requests of the pattern are answered well before.
    """

    pattern: str
    fault: Fault
    times: int = -1
    skip: int = 0


@dataclass
class Hub:
    """What the server holds and what it was asked.

    Attributes:
        files: content by (kind, repository, path); kind is "datasets" or "models".
        rules: faults, the first that fits is carried out.
        requests: method and path of every request, in order.
        sent: bytes of content sent, by path in the repository.
        large: files of at least this size are listed with a SHA-256, smaller ones with a git blob hash.
    """

    files: dict[tuple[str, str, str], bytes] = field(default_factory=dict)
    rules: list[Rule] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    large: int = 1000
    url: str = ""
    commit: str = COMMIT
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, repository: str, path: str, content: bytes, kind: str = "datasets") -> None:
        """Put a file into a repository."""
        self.files[kind, repository, path] = content

    def shards_sent(self) -> int:
        """Bytes of shards that were sent."""
        return sum(count for path, count in self.sent.items() if path.endswith(".gz"))

    def fault_for(self, path: str) -> Fault | None:
        with self._lock:
            for rule in self.rules:
                if rule.times != 0 and re.search(rule.pattern, path):
                    if rule.skip > 0:
                        rule.skip -= 1
                        return None
                    rule.times -= rule.times > 0
                    return rule.fault
        return None

    def described(self, kind: str, repository: str, path: str) -> dict[str, Any]:
        content = self.files[kind, repository, path]
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        found: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob}
        if len(content) >= self.large:
            sha256 = hashlib.sha256(content).hexdigest()
            found["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
        return found


def refused(status: int, retry_after: str | None = None) -> Fault:
    """Answer with an error, with or without the header that says when to come back."""

    def fault(answer: _Answer) -> bool:
        headers = {"Retry-After": retry_after} if retry_after is not None else {}
        answer.send(status, b"not now", headers)
        return True

    return fault


def reset_after(count: int) -> Fault:
    """Send `count` bytes of the content and drop the connection."""

    def fault(answer: _Answer) -> bool:
        answer.limit = count
        return False

    return fault


def truncated_to(count: int) -> Fault:
    """Claim, consistently, that the file has `count` bytes."""

    def fault(answer: _Answer) -> bool:
        answer.truncate = count
        return False

    return fault


def trickle(piece: int, pause: float) -> Fault:
    """Send the content `piece` bytes at a time, with a pause after each."""

    def fault(answer: _Answer) -> bool:
        answer.piece, answer.pause = piece, pause
        return False

    return fault


def other_content(answer: _Answer) -> bool:
    """Send as many zeros as the file has bytes."""
    answer.zeros = True
    return False


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    limit: int | None = None
    truncate: int | None = None
    piece: int = 1 << 20
    pause: float = 0.0
    zeros = False

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._write(body)

    def _write(self, body: bytes) -> None:
        sent = 0
        while sent < len(body):
            piece = body[sent : sent + self.piece]
            if self.limit is not None and sent + len(piece) > self.limit:
                piece = piece[: self.limit - sent]
                self.wfile.write(piece)
                self.wfile.flush()
                self.close_connection = True
                return
            try:
                self.wfile.write(piece)
                self.wfile.flush()
            except OSError:
                self.close_connection = True
                return
            sent += len(piece)
            if self.pause:
                time.sleep(self.pause)

    def _answer(self) -> None:
        self.limit, self.truncate, self.piece, self.pause, self.zeros = None, None, 1 << 20, 0.0, False
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        fault = self.hub.fault_for(path)
        if fault is not None and fault(self):
            return
        if path in ("", "/"):
            self.send(200, b"a hub")
        elif found := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._info(found[1], found[2], found[3])
        elif found := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            self._tree(found[1], found[2], found[4] or "", parse_qs(url.query))
        elif found := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            self._paths_info(found[1], found[2], body)
        elif found := re.fullmatch(r"(?:/(datasets))?/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            self._content(found[1] or "models", found[2], found[4])
        else:
            self._missing("EntryNotFound")

    def _json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        # That of the repository, if there is one: the client keeps in mind which files a commit has not.
        commit = {"X-Repo-Commit": self.hub.commit} if code == "EntryNotFound" else {}
        self.send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": "not here", **commit})

    def _paths(self, kind: str, repository: str) -> list[str]:
        return [path for a, b, path in self.hub.files if (a, b) == (kind, repository)]

    def _info(self, kind: str, repository: str, revision: str | None) -> None:
        paths = self._paths(kind, repository)
        if not paths:
            self._missing("RepoNotFound")
            return
        if revision not in (None, "main", self.hub.commit):
            self._missing("RevisionNotFound")
            return
        self._json(
            {
                "id": repository,
                "_id": "0",
                "sha": self.hub.commit,
                "private": False,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in paths],
            }
        )

    def _tree(self, kind: str, repository: str, folder: str, query: dict[str, list[str]]) -> None:
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        found: list[dict[str, Any]] = []
        folders: set[str] = set()
        prefix = f"{folder}/" if folder else ""
        for path in self._paths(kind, repository):
            if not path.startswith(prefix):
                continue
            below = path.removeprefix(prefix).split("/")
            for depth in range(1, len(below)):
                folders.add(prefix + "/".join(below[:depth]))
                if not recursive:
                    break
            if recursive or len(below) == 1:
                found.append(self.hub.described(kind, repository, path))
        if not found and not folders:
            self._missing("EntryNotFound")
            return
        self._json([{"type": "directory", "path": each, "oid": "0" * 40} for each in sorted(folders)] + found)

    def _paths_info(self, kind: str, repository: str, body: bytes) -> None:
        kinds = self.headers.get("Content-Type", "")
        wanted = json.loads(body)["paths"] if "json" in kinds else parse_qs(body.decode())["paths"]
        there = set(self._paths(kind, repository))
        self._json([self.hub.described(kind, repository, path) for path in wanted if path in there])

    def _content(self, kind: str, repository: str, path: str) -> None:
        if (kind, repository, path) not in self.hub.files:
            self._missing("EntryNotFound" if self._paths(kind, repository) else "RepoNotFound")
            return
        content = self.hub.files[kind, repository, path]
        described = self.hub.described(kind, repository, path)
        if self.zeros:
            content = bytes(len(content))
        if self.truncate is not None:
            content = content[: self.truncate]
        headers = {
            "X-Repo-Commit": self.hub.commit,
            "ETag": f'"{described.get("lfs", described)["oid"]}"',
            "Accept-Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            part, status = content, 200
        else:
            start, stop = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
            if start >= len(content):
                self.send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            part, status = content[start:stop], 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        if self.command != "HEAD":
            self.hub.sent[path] += len(part) if self.limit is None else min(self.limit, len(part))
        self.send(status, part, headers)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients leave in the middle of things; that is what is tested."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers until the block ends, at `hub.url`."""
    hub = Hub()
    server = _Server(("127.0.0.1", 0), type("Answer", (_Answer,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def like_c4(hub: Hub, train: dict[str, bytes], validation: dict[str, bytes]) -> None:
    """Make `hub` hold a repository shaped like C4's, with these files as shards."""
    hub.add(C4, "README.md", C4_CARD.encode())
    for name, content in (train | validation).items():
        hub.add(C4, f"en/{name}", content)
    hub.add(C4, "realnewslike/c4-train.00000-of-00001.json.gz", next(iter(train.values())))
