"""A server on this machine that speaks as much of the Hub's HTTP API as an upload needs, and keeps what it is sent."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

TOKEN = "hf_" + "secretsecret" * 3


class FakeHub:
    """`files` are the repository's, by path; None is no repository. `refuse(method, path)` gives a status to answer."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] | None = None
        self.private: bool | None = None
        self.objects: dict[str, bytes] = {}  # large files, by sha256
        self.commits: list[list[str]] = []
        self.large: set[str] = set()
        self.sent: list[str] = []  # sha256 of the large files that were sent, with repetitions
        self.url = ""
        self.refuse = lambda method, path: 0
        self.lock = threading.Lock()

    def tree(self) -> list[dict]:
        entries = []
        for path, content in self.files.items():
            entry = {"type": "file", "path": path, "size": len(content)}
            entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if path in self.large:
                sha = hashlib.sha256(content).hexdigest()
                entry |= {"lfs": {"oid": sha, "size": len(content), "pointerSize": 100}, "oid": "0" * 40}
            entries.append(entry)
        return entries

    def commit(self, lines: list[dict]) -> None:
        changed = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]
                self.large.add(value["path"])
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]
            changed += [value["path"]] if "path" in value else []
        self.commits.append(changed)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, content: object = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self) -> None:
        hub, path = self.hub, urlparse(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with hub.lock:
            status = hub.refuse(self.command, path)
            if status:
                self.reply(status, {"error": f"refused for {status}"})
            elif path == "/":
                self.reply(200, b"")
            elif path.startswith("/store/"):
                sha = hashlib.sha256(body).hexdigest()
                assert path.endswith(sha)
                hub.objects[sha] = body
                hub.sent.append(sha)
                self.reply(200, b"")
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.reply(401, {"error": "Invalid username or password."})
            else:
                self.answer(hub, path, body)

    def answer(self, hub: FakeHub, path: str, body: bytes) -> None:
        if path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            hub.files = {".gitattributes": b"*.safetensors filter=lfs\n"}
            hub.private = asked.get("private", asked.get("visibility") == "private")
            self.reply(200, {"url": f"{hub.url}/owner/name", "name": "owner/name"})
        elif hub.files is None:
            self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif path == "/api/models/owner/name/tree/main":
            self.reply(200, hub.tree())
        elif path == "/api/models/owner/name/preupload/main":
            self.reply(200, {"files": [self.mode(file) for file in json.loads(body)["files"]]})
        elif path == "/owner/name.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            uploads = {o["oid"]: {"upload": {"href": f"{hub.url}/store/{o['oid']}"}} for o in objects}
            answers = [o | ({} if o["oid"] in hub.objects else {"actions": uploads[o["oid"]]}) for o in objects]
            self.reply(200, {"transfer": "basic", "objects": answers})
        elif path == "/api/models/owner/name/commit/main":
            hub.commit([json.loads(line) for line in body.splitlines()])
            self.reply(200, {"commitUrl": f"{hub.url}/owner/name/commit/{'1' * 40}", "commitOid": "1" * 40})
        elif path.startswith("/owner/name/resolve/main/"):
            content = hub.files[path.removeprefix("/owner/name/resolve/main/")]
            self.reply(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit="1" * 40)
        else:
            raise AssertionError(f"{self.command} {self.path}")

    @staticmethod
    def mode(file: dict) -> dict:
        large = file["path"].endswith((".safetensors", ".png"))
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    do_GET = do_HEAD = do_POST = do_PUT = handle_any


@contextmanager
def running() -> Iterator[FakeHub]:
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfThisHub", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
