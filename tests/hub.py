"""The Hugging Face Hub on the loopback interface, for the real client to talk to.

    with Hub({"someone/model": {"config.json": b"{}", "model.safetensors": b"..."}}) as hub:
        hub.faults["config.json"] = "gated"  # see FAULTS
        subprocess.run(command, env=hub.environment(cache))
        hub.requests  # [("GET", "someone/model", LIST), ("HEAD", "someone/model", "config.json")]

The client reads HF_ENDPOINT when it is imported: a subprocess gets it from `environment`, this
process from the `hub` fixture (conftest.py), which sets the client's constants.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "5eed" * 10  # the first revision; the last one is also called "main"
REMOTE = "somewhere-else"  # the path under which large files are served, as from a CDN
LARGE = (".bin", ".safetensors")
LIST = "(list of files)"  # stands for a file's name in `faults` and `requests`

# What can be wrong with a file or the list. Those with "-once" repair themselves after one time.
FAULTS = {
    "gated": "403, the terms are not accepted",
    "private": "401, as for a repository that does not exist",
    "500": "the server is broken",
    "500-body": "the file is announced, but not to be had",
    "cut": "the connection ends halfway, each time",
    "cut-once": "the connection ends halfway, but the rest is delivered when asked for",
    "short": "fewer bytes than announced",
    "flip": "one bit is wrong",
    "portal": "a login page of the hotel answers in place of the Hub",
    "slow": "no answer before the test is over",
}


class Hub:
    """repositories: {"owner/name": {"file name": its bytes}}; may be changed while serving."""

    def __init__(self, repositories: dict[str, dict[str, bytes]] | None = None) -> None:
        self.repositories = repositories or {}
        self.commit = COMMIT
        self.earlier: dict[str, dict[str, dict[str, bytes]]] = {}  # commit -> repositories
        self.faults: dict[str, str] = {}  # file name -> one of FAULTS
        self.requests: list[tuple[str, str, str]] = []  # (method, repository, file name)
        self.others: list[str] = []  # the paths of requests for anything else
        self.ranges: list[str] = []  # the Range headers of all requests
        self.over = threading.Event()
        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self})
        )
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def push(self, repository: str, files: dict[str, bytes]) -> None:
        """A new commit with other files; the earlier one stays there under its own name."""
        self.earlier[self.commit] = dict(self.repositories)
        self.repositories[repository] = files
        self.commit = git_sha1(self.commit.encode())

    def stop(self) -> None:
        """From now on nothing listens: the network is gone."""
        self.over.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache: os.PathLike | str, **changes: str) -> dict[str, str]:
        """The environment of a subprocess for which this is the Hub, with a cache of its own."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        return {**kept, "HF_ENDPOINT": self.url, "HF_HOME": str(cache), **changes}


def nowhere() -> str:
    """The address of a Hub that is not there: nothing listens on this port."""
    hub = Hub()
    hub.server.server_close()
    return hub.url


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        if match := re.fullmatch(rf"/({REMOTE}/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            remote, repository, revision, name = match.groups()
        elif match := re.fullmatch(
            r"/api/models/([^/]+/[^/]+?)(/tree|/revision)?(?(2)/(.+))", path
        ):
            repository, kind, revision = match.groups()
            name = LIST
        else:
            self.hub.others.append(path)
            return self.refuse(404, "EntryNotFound")
        self.hub.requests.append((self.command, repository, name))
        if revision in (None, "main"):
            revision = self.hub.commit
        commits = {**self.hub.earlier, self.hub.commit: self.hub.repositories}
        fault, files = self.hub.faults.get(name), self.hub.repositories.get(repository)
        if fault == "slow":
            return self.hub.over.wait(30)
        if fault == "500" or (fault == "500-body" and self.command == "GET"):
            return self.answer(500)
        if fault == "portal":
            return self.answer(200, {"Content-Type": "text/html"}, b"<html>Room number?</html>")
        if fault == "gated":
            return self.refuse(403, "GatedRepo")
        if files is None or fault == "private":
            return self.refuse(401, "RepoNotFound")
        if revision not in commits:
            return self.refuse(404, "RevisionNotFound")
        files = commits[revision][repository]
        if name == LIST:
            return self.send_list(revision, files, with_checksums=kind == "/tree")
        if name not in files:
            return self.refuse(404, "EntryNotFound")
        data = files[name]
        large = name.endswith(LARGE)
        if large and not remote:
            # Another origin than 127.0.0.1. The checksum stands here, not where the bytes are.
            location = f"http://localhost:{self.hub.port}/{REMOTE}{self.path}"
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256(data)}"'}
            return self.answer(302, {"Location": location, "X-Repo-Commit": revision, **linked})
        etag = sha256(data) if large else git_sha1(data)
        self.send_file(name, data, fault, {"ETag": f'"{etag}"', "X-Repo-Commit": revision})

    do_HEAD = do_GET

    def send_list(self, commit: str, files: dict[str, bytes], with_checksums: bool) -> None:
        names = [{"rfilename": name} for name in files]
        content: object = {"id": "", "sha": commit, "siblings": names}
        if with_checksums:
            content = [
                {"type": "file", "path": name, "size": len(data), "oid": git_sha1(data)}
                | ({"lfs": large_file(data)} if name.endswith(LARGE) else {})
                for name, data in files.items()
            ]
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def send_file(self, name: str, data: bytes, fault: str | None, headers: dict) -> None:
        getting = self.command == "GET"
        if fault == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault == "short" and getting:
            data = data[:-20]
        status, start = 200, 0
        if part := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            self.hub.ranges.append(part[0])
            status, start = 206, int(part[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body, announced = data[start:], len(data) - start
        if fault in ("cut", "cut-once") and getting:
            body = body[: announced // 2] if status == 200 else b""
            if fault == "cut-once":
                del self.hub.faults[name]
        self.answer(status, headers, body, announced)

    def answer(
        self, status: int, headers: dict | None = None, body: bytes = b"", announced: int = -1
    ) -> None:
        self.send_response(status)
        size = len(body) if announced < 0 else announced
        for name, value in {"Content-Length": str(size), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"X-Error-Code": code, "X-Error-Message": code})


def large_file(data: bytes) -> dict[str, object]:
    return {"oid": sha256(data), "size": len(data), "pointerSize": 0}


def sha256(data: bytes) -> str:
    """The name of a large file (git-lfs) on the Hub."""
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    """The name of a small file, kept by git itself."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
