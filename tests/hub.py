"""The Hugging Face Hub on the loopback interface, for the real client to talk to.
It notes who asks for what (`requests`), and serves what is wrong (`faults`, by file name or LIST):

    gated, absent, 500      what the Hub says of each; absent is as private
    500-body                the file is announced, but not to be had
    cut                     the connection ends halfway, each time
    slow                    no answer before the test is over

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
LIST = "(list of files)"  # stands for a file's name in `faults` and `requests`
REFUSALS = {"gated": (403, "GatedRepo"), "absent": (401, "RepoNotFound"), "500": (500, "")}


class Hub:
    """repositories: {"owner/name": {"file name": its bytes}}; may be changed while serving."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commit = COMMIT
        self.earlier: dict[str, dict[str, dict[str, bytes]]] = {}  # commit -> repositories
        self.faults: dict[str, str] = {}
        self.requests: list[tuple[str, str, str]] = []  # (method, repository, file name)
        self.others: list[str] = []  # the paths of requests for anything else
        self.over = threading.Event()
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def push(self, repository: str, files: dict[str, bytes]) -> None:
        """A new commit with other files; the earlier one stays there under its own name."""
        self.earlier[self.commit] = dict(self.repositories)
        self.repositories[repository] = files
        self.commit = hashlib.sha1(self.commit.encode()).hexdigest()

    def stop(self) -> None:
        """From now on nothing listens: the network is gone."""
        self.over.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: os.PathLike, **changes: str) -> dict[str, str]:
        """The environment of a subprocess for which this is the Hub, with a cache of its own."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        return {**kept, "HF_ENDPOINT": self.url, "HF_HOME": str(home), **changes}


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(self.path.split("?")[0])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository, revision, name = match.groups()
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            (repository, revision), name = match.groups(), LIST
        else:
            hub.others.append(path)
            return self.refuse(404, "EntryNotFound")
        hub.requests.append((self.command, repository, name))
        revision = hub.commit if revision in (None, "main") else revision
        commits, fault = {**hub.earlier, hub.commit: hub.repositories}, hub.faults.get(name)
        if fault == "slow":
            return hub.over.wait(30)
        if fault == "500-body" and self.command == "GET":
            fault = "500"
        if fault in REFUSALS or repository not in hub.repositories:
            return self.refuse(*REFUSALS[fault or "absent"])
        if repository not in commits.get(revision, {}):
            return self.refuse(404, "RevisionNotFound")
        files = commits[revision][repository]
        if name == LIST:
            listing = {"id": "", "sha": revision, "siblings": [{"rfilename": n} for n in files]}
            return self.answer({"Content-Type": "application/json"}, json.dumps(listing).encode())
        if name not in files:
            return self.refuse(404, "EntryNotFound")
        etag, length = hashlib.sha256(files[name]).hexdigest(), len(files[name])
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": revision, "Content-Length": str(length)}
        self.answer(headers, files[name][: length // 2 if fault == "cut" else length])

    do_HEAD = do_GET

    def answer(self, headers: dict[str, str], body: bytes = b"", status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer({"X-Error-Code": code, "X-Error-Message": code}, status=status)
