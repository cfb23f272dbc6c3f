"""A model hub on loopback: identities, repositories, and commits of files, with failures where they are asked for."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USERS = {
    "writer": {"name": "ann", "role": "write", "orgs": ["team"]},
    "reader": {"name": "bob", "role": "read", "orgs": []},
}


@dataclass
class Hub:
    """What it holds, and how it will fail."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[tuple[str, str, list[str]]] = field(default_factory=list)
    """(repository, message, files)"""
    fail: list[int] = field(default_factory=list)
    """Status codes of the next commits; 0 breaks the connection."""
    closed: set[str] = field(default_factory=set)
    """Repositories that nobody may write to."""
    hold: threading.Event | None = None
    """Commits wait for it."""
    tries: int = 0


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, value: Any, status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def user(self) -> dict[str, Any] | None:
            return USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

        def do_GET(self) -> None:
            user = self.user()
            if self.path == "/api/whoami-v2":
                if user is None:
                    return self.answer({"error": "Invalid credentials in Authorization header"}, 401)
                access = {"accessToken": {"role": user["role"]}}
                orgs = [{"name": name} for name in user["orgs"]]
                return self.answer({"type": "user", "name": user["name"], "orgs": orgs, "auth": access})
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/main", self.path)
            if found is not None and found[1] in hub.repos:  # asked where a commit would change nothing
                return self.answer({"id": found[1], "sha": f"{len(hub.commits):040x}", "siblings": [], "private": True})
            return self.answer({"error": f"not here: {self.path}"}, 404)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            user = self.user()
            if user is None or user["role"] == "read":
                return self.answer({"error": "forbidden"}, 403)
            if self.path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization') or user['name']}/{asked['name']}"
                known = name in hub.repos
                hub.repos.setdefault(name, {})
                hub.private.setdefault(name, bool(asked.get("private", asked.get("visibility") == "private")))
                return self.answer({"url": f"{hub.url}/{name}", "error": "exists"}, 409 if known else 200)
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path)
            if found is None or found[1] not in hub.repos:
                return self.answer({"error": f"not here: {self.path}"}, 404)
            if found[1] in hub.closed:
                return self.answer({"error": "you may not write here"}, 403)
            if found[2] == "preupload":
                files = [f["path"] for f in json.loads(body)["files"]]
                told = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
                return self.answer({"files": told})
            return self.commit(found[1], body)

        def commit(self, name: str, body: bytes) -> None:
            hub.tries += 1
            if hub.hold is not None:
                hub.hold.wait(30)
            status = hub.fail.pop(0) if hub.fail else 200
            if status == 0:
                self.close_connection = True
                return None
            if status != 200:
                return self.answer({"error": "injected"}, status)
            lines = [json.loads(line) for line in body.splitlines() if line]
            files = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
            message = next(x["value"]["summary"] for x in lines if x["key"] == "header")
            hub.repos[name] |= files
            hub.commits.append((name, message, sorted(files)))
            oid = f"{len(hub.commits):040x}"
            return self.answer({"success": True, "commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid})

    return Handler


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
