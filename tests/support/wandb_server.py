"""A small W&B on the loopback address: runs with their history, as the real client sends them, and faults on demand."""

from __future__ import annotations

import gzip
import json
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "k" * 40


@dataclass
class StoredRun:
    """What the server knows of one run.

    Attributes:
        fields: variables of the client's last mutation: config, tags, groupName, displayName.
        history: its rows, by line.
        summary: the newest.
        exit_code: of its end, or None while it goes on.
        alerts: titles.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    alerts: list[str] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.history if "step" in row]

    def forget(self, count: int) -> None:
        """Know only the first `count` rows, as after a crash that came before the rest was sent."""
        del self.history[count:]
        self.summary = {**self.summary, "_step": count - 1} if count else {}
        self.exit_code = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that is killed resets its connection
            super().handle_error(request, client_address)


class WandbServer:
    """Answers the client on 127.0.0.1 until it is left.

    Attributes:
        runs: id -> run.
        requests: how many came.
        artifacts: names of those that were made; tables are among them.
        unanswered: requests to paths that end so get no answer, as from a network that swallows packets.
        status: answer each request with this instead, if set.
    """

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.requests = 0
        self.artifacts: list[str] = []
        self.unanswered: str | None = None
        self.status: int | None = None
        self._left = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._left.set()
        self._server.shutdown()
        self._server.server_close()

    def keep_waiting(self, path: str) -> None:
        while self.unanswered and path.endswith(self.unanswered) and not self._left.wait(0.02):
            pass

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            self._take_stream(self.runs[path.split("/")[-2]], json.loads(body))
            return {"limits": {}}
        if path != "/graphql":
            return {}
        request = json.loads(body)
        return {
            "data": self._answer_query(
                request.get("operationName") or "", request["query"], request.get("variables") or {}
            )
        }

    def _answer_query(self, name: str, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if name == "RunResumeStatus":
            run = self.runs.get(variables["name"])
            bucket = None if run is None else _bucket(variables["name"], run)
            return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}, "bucket": bucket}}
        if name == "UpsertBucket":
            run = self.runs.setdefault(variables["name"], StoredRun())
            run.fields.update({key: value for key, value in variables.items() if value is not None})
            project = {"id": "p", "name": variables["project"] or "p", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "r", "name": variables["name"], "historyLineCount": len(run.history), "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "Viewer":
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if name == "NotifyScriptableRunAlert":
            self.runs[variables["runName"]].alerts.append(variables["title"])
            return {"notifyScriptableRunAlert": {"success": True}}
        if "query ArtifactType" in query:
            return {"project": {"artifact": None}}
        if name == "CreateArtifact":  # which then counts as there already, so that nothing of it is uploaded
            self.artifacts.append(variables["input"]["artifactCollectionName"])
            return {
                "createArtifact": {
                    "artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "a"}}}
                }
            }
        if name == "CreateRunFiles":
            return {
                "createRunFiles": {
                    "runID": "r",
                    "uploadHeaders": [],
                    "files": [{"name": file, "uploadUrl": f"{self.url}/upload/{file}"} for file in variables["files"]],
                }
            }
        return {}

    def _take_stream(self, run: StoredRun, body: dict[str, Any]) -> None:
        files = body.get("files") or {}
        if "wandb-history.jsonl" in files:
            part = files["wandb-history.jsonl"]
            run.history[part["offset"] :] = [json.loads(line) for line in part["content"]]
        if "wandb-summary.json" in files:
            run.summary = json.loads(files["wandb-summary.json"]["content"][-1])
        if body.get("complete"):
            run.exit_code = body["exitcode"]


def _bucket(name: str, run: StoredRun) -> dict[str, Any]:
    return {
        "id": "r",
        "name": name,
        "displayName": run.fields.get("displayName"),
        "summaryMetrics": json.dumps(run.summary),
        "historyLineCount": len(run.history),
        "logLineCount": 0,
        "eventsLineCount": 0,
        "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
        "eventsTail": "[]",
        "config": run.fields.get("config") or "{}",
        "tags": run.fields.get("tags") or [],
        "wandbConfig": '{"t": 1}',
    }


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.respond()

        def do_GET(self):
            self.respond()

        def do_PUT(self):
            self.respond()

        def do_POST(self):
            self.respond()

        def respond(self):
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            server.requests += 1
            server.keep_waiting(self.path)
            content = json.dumps({} if server.status else server.answer(self.path, body)).encode()
            self.send_response(server.status or 200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    return Handler
