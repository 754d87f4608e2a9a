"""A small Hugging Face Hub on loopback: enough of its HTTP interface for a model to be pushed and pulled.

    with FakeHub() as hub:
        hub.add("user/model", {"config.json": b"{}"})
        ...                               # a child process with HF_ENDPOINT=hub.url
        hub.files("user/model")

It keeps everything in memory. Files above `lfs_threshold` bytes take git-lfs's way, the others lie within the commit.
What it does not speak: the xet protocol (set HF_HUB_DISABLE_XET=1), pull requests, branches, pagination.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repo:
    """A repository: its commits, oldest first, each with all of its files."""

    private: bool
    commits: list[tuple[str, Files]] = field(default_factory=list)

    def commit(self, files: Files) -> str:
        """Add a commit with exactly these files; returns its sha."""
        parent = self.commits[-1][0] if self.commits else ""
        digest = hashlib.sha1(parent.encode())
        for path, content in sorted(files.items()):
            digest.update(f"{path} {_git_oid(content)}\n".encode())
        self.commits.append((digest.hexdigest(), dict(files)))
        return digest.hexdigest()

    def at(self, revision: str) -> tuple[str, Files] | None:
        """The commit that `revision`, main or a sha, names."""
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass(frozen=True)
class Request:
    """What a client asked."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    """What it is told. A body that is not bytes is sent as JSON."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class FakeHub:
    """The server; it listens while entered."""

    def __init__(self, *, lfs_threshold: int | None = None, token: str | None = None) -> None:
        self.lfs_threshold, self.token = lfs_threshold, token
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self._objects: Files = {}
        self._faults: list[tuple[str, int]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self._answer))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, name: str, files: Files) -> str:
        """Commit exactly these files to a repository, which is made if need be; returns the sha."""
        return self.repos.setdefault(name, Repo(private=False)).commit(files)

    def files(self, name: str) -> Files:
        """The files of the newest commit."""
        return dict(self.repos[name].commits[-1][1])

    def fail(self, pattern: str, status: int, times: int = 1) -> None:
        """Answer the next requests whose `METHOD path` matches with an error."""
        self._faults += [(pattern, status)] * times

    # ------------------------------------------------------------ the routes

    def _answer(self, request: Request) -> Reply:
        line = f"{request.method} {request.path}"
        self.requests.append(line)
        for fault in self._faults:
            if re.search(fault[0], line):
                self._faults.remove(fault)
                return _error(fault[1], "", "injected")
        # The address that an upload is sent to is itself the permission.
        public = request.path.startswith("/lfs/") or self.token is None
        if not public and request.headers.get("authorization") != f"Bearer {self.token}":
            return _error(401, "", "Invalid credentials in Authorization header")
        for pattern, route in self._routes():
            if match := re.fullmatch(pattern, request.path):
                return route(request, *match.groups())
        return _error(404, "", f"the fake Hub has no route {line}")

    def _routes(self) -> list[tuple[str, Callable[..., Reply]]]:
        repo = "([^/]+/[^/]+)"
        return [
            (r"/api/validate-yaml", lambda request: Reply({"errors": [], "warnings": []})),
            (r"/api/whoami-v2", lambda request: Reply({"type": "user", "name": "user", "orgs": []})),
            (r"/api/repos/create", self._create),
            (rf"/api/models/{repo}", self._info),
            (rf"/api/models/{repo}/revision/([^/]+)", self._info),
            (rf"/api/models/{repo}/tree/([^/]+)", self._tree),
            (rf"/api/models/{repo}/preupload/([^/]+)", self._preupload),
            (rf"/api/models/{repo}/commit/([^/]+)", self._commit),
            (rf"/{repo}\.git/info/lfs/objects/batch", self._lfs_batch),
            (r"/lfs/(\w+)", self._lfs_upload),
            (rf"/{repo}/resolve/([^/]+)/(.+)", self._resolve),
        ]

    def _create(self, request: Request) -> Reply:
        asked = request.json()
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        place = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repos:
            return Reply({**place, "error": "You already created this model repo"}, 409)
        self.repos[name] = Repo(private=bool(asked.get("private")) or asked.get("visibility") == "private")
        self.repos[name].commit({".gitattributes": b"*.onnx filter=lfs diff=lfs merge=lfs -text\n"})
        return Reply(place)

    def _info(self, request: Request, name: str, revision: str = "main") -> Reply:
        def info(sha: str, files: Files) -> Reply:
            siblings = [{"rfilename": path} for path in sorted(files)]
            return Reply({"id": name, "sha": sha, "private": self.repos[name].private, "siblings": siblings})

        return self._at(name, revision, info)

    def _tree(self, request: Request, name: str, revision: str) -> Reply:
        return self._at(
            name, revision, lambda sha, files: Reply([self._entry(path, files[path]) for path in sorted(files)])
        )

    def _preupload(self, request: Request, name: str, revision: str) -> Reply:
        def modes(sha: str, files: Files) -> Reply:
            return Reply({"files": [self._mode(asked, files.get(asked["path"])) for asked in request.json()["files"]]})

        return self._at(name, revision, modes)

    def _mode(self, asked: dict[str, Any], present: bytes | None) -> dict[str, Any]:
        path = asked["path"]
        return {
            "path": path,
            "shouldIgnore": False,
            "uploadMode": "lfs" if self._is_large(asked["size"]) else "regular",
            "oid": None if present is None else self._tag(present),
        }

    def _commit(self, request: Request, name: str, revision: str) -> Reply:
        def commit(sha: str, files: Files) -> Reply:
            new = dict(files)
            for operation in map(json.loads, request.body.splitlines()):
                kind, value = operation["key"], operation["value"]
                if kind == "file":
                    new[value["path"]] = base64.b64decode(value["content"])
                elif kind == "lfsFile":
                    new[value["path"]] = self._objects[value["oid"]]
                elif kind == "deletedFile":
                    del new[value["path"]]
            oid = self.repos[name].commit(new)
            return Reply({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"})

        return self._at(name, revision, commit)

    def _lfs_batch(self, request: Request, name: str) -> Reply:
        def offer(asked: dict[str, Any]) -> dict[str, Any]:
            present = asked["oid"] in self._objects
            upload = {"actions": {"upload": {"href": f"{self.url}/lfs/{asked['oid']}"}}}
            return asked if present else {**asked, **upload}

        return Reply({"transfer": "basic", "objects": [offer(asked) for asked in request.json()["objects"]]})

    def _lfs_upload(self, request: Request, oid: str) -> Reply:
        if hashlib.sha256(request.body).hexdigest() != oid:
            return _error(400, "", "the content does not have this sha256")
        self._objects[oid] = request.body
        return Reply()

    def _resolve(self, request: Request, name: str, revision: str, path: str) -> Reply:
        def content(sha: str, files: Files) -> Reply:
            if path not in files:
                return _error(404, "EntryNotFound", "Entry not found")
            body, tag = files[path], self._tag(files[path])
            headers = {"X-Repo-Commit": sha, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
            if self._is_large(len(body)):
                headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(body))}
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")):
                first, last = int(wanted[1]), int(wanted[2] or len(body) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
                return Reply(body[first : last + 1], 206, headers)
            return Reply(body, 200, headers)

        return self._at(name, revision, content)

    def _at(self, name: str, revision: str, found: Callable[[str, Files], Reply]) -> Reply:
        if name not in self.repos:
            return _error(404, "RepoNotFound", "Repository not found")
        commit = self.repos[name].at(revision)
        return found(*commit) if commit else _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    # ------------------------------------------------------------ files

    def _is_large(self, size: int) -> bool:
        return self.lfs_threshold is not None and size > self.lfs_threshold

    def _tag(self, content: bytes) -> str:
        return hashlib.sha256(content).hexdigest() if self._is_large(len(content)) else _git_oid(content)

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
        if self._is_large(len(content)):
            entry["lfs"] = {"oid": self._tag(content), "size": len(content), "pointerSize": 134}
        return entry


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _error(status: int, code: str, message: str) -> Reply:
    return Reply({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})


def _handler(answer: Callable[[Request], Reply]) -> type[BaseHTTPRequestHandler]:
    """HTTP as http.server has it, reduced to requests and replies."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _serve(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            path = unquote(urlsplit(self.path).path)
            reply = answer(Request(self.command, path, headers, self._read(headers)))
            body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _read(self, headers: dict[str, str]) -> bytes:
            if "chunked" not in headers.get("transfer-encoding", ""):
                return self.rfile.read(int(headers.get("content-length", 0)))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def log_message(self, *_: Any, **__: Any) -> None:
            """Say nothing."""

        do_GET = do_HEAD = do_POST = do_PUT = _serve

    return Handler
