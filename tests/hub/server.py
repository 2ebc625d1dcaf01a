"""A server on localhost that speaks as much of the hub's HTTP interface as huggingface_hub and datasets ask for:
repositories of models and data sets with commits, branches and tags, private and gated ones, tokens, ranges, and
uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.*))?)?)?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_BATCH = re.compile(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")

Files = dict[str, bytes]
"""Contents of the files of a commit, by path."""


@dataclass
class Repo:
    """A repository: its commits, and who may read it."""

    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    """Users who may read it although it is private or gated."""
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    """Commit of each branch and tag."""

    def commit(self, files: Files, *names: str) -> str:
        """Add a commit with these files, to which main and the named tags then point."""
        digest = hashlib.sha1(str(len(self.commits)).encode())
        for path in sorted(files):
            digest.update(path.encode() + hashlib.sha1(files[path]).digest())
        sha = digest.hexdigest()
        self.commits[sha] = files
        self.refs |= dict.fromkeys(("main", *names), sha)
        return sha


class Hub:
    """The hub's repositories and users, and what the server is to refuse."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        """Repositories by kind (models or datasets) and id."""
        self.users = {"hf_owner": "me", "hf_other": "other"}
        """User of each token. A user may write to repositories under their own name."""
        self.objects: dict[str, bytes] = {}
        """Large files that were uploaded, by the SHA-256 of their contents."""
        self.fault: Callable[[str, str], int | None] = lambda method, path: None
        """(method, path) -> the HTTP status with which a request is refused, or None."""
        self.cut: dict[str, list[int]] = {}
        """Path of a file -> numbers of bytes after which its next downloads are cut off."""
        self.requests: list[tuple[str, str, str]] = []
        """Method, path and range of each request."""
        self.url = ""

    def add(self, kind: str, name: str, files: Files, **settings: Any) -> Repo:
        """A new repository with one commit; `settings` are fields of `Repo`."""
        repo = self.repos[kind, name] = Repo(**settings)
        repo.commit(files)
        return repo

    def downloads(self, end: str = "") -> list[tuple[str, str]]:
        """(path, range) of each download of a file whose path ends so."""
        return [(path, span) for method, path, span in self.requests if method == "GET" and "/resolve/" in path
                and path.endswith(end)]  # fmt: skip


class _RefusalError(Exception):
    """An answer of the hub that refuses a request."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Keep requests out of the tests' output."""

    def _reply(self, status: int, body: object = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _serve(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        try:
            if (status := self.hub.fault(self.command, path)) is not None:
                return self._reply(status, {"error": "refused"})
            self._answer(path, {k: v[-1] for k, v in parse_qs(url.query).items()}, body)
        except _RefusalError as refusal:
            told = {"X_Error_Code": refusal.code} if refusal.code else {}
            message = {"error": refusal.message}
            self._reply(refusal.status, message, X_Error_Message=refusal.message, **told)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _answer(self, path: str, asked: dict[str, str], body: bytes) -> None:
        user = self._user()
        if path == "/api/whoami-v2":
            if user is None:
                raise _RefusalError(401, message="Invalid username or password.")
            return self._reply(200, {"type": "user", "name": user, "auth": {"accessToken": {"role": "write"}}})
        if path == "/api/validate-yaml":
            return self._reply(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body), user)
        if found := re.fullmatch(r"/objects/(\w+)", path):
            self.hub.objects[found[1]] = body
            return self._reply(200)
        if found := _BATCH.fullmatch(path):
            return self._batch(json.loads(body))
        if found := _FILE.fullmatch(path):
            return self._file("datasets" if found[1] else "models", found[2], found[3], found[4], user)
        if found := _API.fullmatch(path):
            return self._api(*found.groups(), asked=asked, body=body, user=user)
        raise _RefusalError(404, message="no such page")

    def _user(self) -> str | None:
        """The user whose token came with the request; None = no token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise _RefusalError(401, message="Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def _repo(self, kind: str, name: str, user: str | None) -> Repo:
        """A repository of which the user may see that it exists."""
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and user not in {*repo.readers, name.partition("/")[0]}):
            raise _RefusalError(404 if user else 401, "RepoNotFound", "Repository not found")
        return repo

    def _api(
        self, kind: str, name: str, call: str | None, revision: str | None, rest: str | None, *, asked: dict[str, str],
        body: bytes, user: str | None,
    ) -> None:  # fmt: skip
        repo = self._repo(kind, name, user)
        if call == "refs":
            shown = [{"name": n, "ref": n, "targetCommit": sha} for n, sha in repo.refs.items()]
            return self._reply(200, {"branches": shown[:1], "tags": shown[1:], "converts": [], "pullRequests": []})
        if call in ("preupload", "commit") and user != name.partition("/")[0]:
            raise _RefusalError(403, message="You have no right to write to this repository")
        if call == "auth-check":
            if repo.gated and user not in repo.readers:
                raise _RefusalError(403 if user else 401, "GatedRepo", f"Access to {name} is restricted")
            return self._reply(200, {})
        if call == "preupload":
            return self._reply(200, {"files": [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]})  # fmt: skip
        if call == "commit":
            return self._commit(repo, name, body)
        sha = self._commit_of(repo, revision or "main")
        files = repo.commits[sha]
        if call == "tree":
            return self._reply(200, _tree(files, rest or "", asked.get("recursive", "").lower() == "true"))
        if call == "paths-info":
            paths = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            return self._reply(200, [_entry(p, files[p]) for p in paths if p in files])
        info = {"id": name, "sha": sha, "private": repo.private, "gated": "manual" if repo.gated else False}
        info |= {"siblings": [{"rfilename": p} for p in files], "tags": [], "downloads": 0, "likes": 0}
        return self._reply(200, info)

    def _commit_of(self, repo: Repo, revision: str) -> str:
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise _RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def _file(self, kind: str, name: str, revision: str, path: str, user: str | None) -> None:
        repo = self._repo(kind, name, user)
        if repo.gated and user not in repo.readers:
            raise _RefusalError(403 if user else 401, "GatedRepo", f"Access to {name} is restricted")
        sha = self._commit_of(repo, revision)
        data = repo.commits[sha].get(path)
        told = {"X_Repo_Commit": sha}
        if data is None:
            return self._reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", **told)
        told |= {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept_Ranges": "bytes"}
        start, status = 0, 200
        if self.command == "GET" and (span := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            start, status = int(span[1]), 206
            told["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        told["Content_Length"] = str(len(data) - start)
        cuts = self.hub.cut.get(path, [])
        if self.command == "GET" and cuts:
            data = data[: start + cuts.pop(0)]
            self.close_connection = True
        self._reply(status, data[start:], **told)

    def _create(self, asked: dict[str, Any], user: str | None) -> None:
        owner = asked.get("organization") or user
        if user is None:
            raise _RefusalError(401, message="Invalid username or password.")
        if owner != user:
            raise _RefusalError(403, message=f'You don\'t have the rights to create a model under "{owner}"')
        key = f"{asked.get('type', 'model')}s", f"{owner}/{asked['name']}"
        url = f"{self.hub.url}/{key[1]}"
        if key in self.hub.repos:
            return self._reply(409, {"error": "You already created this model repo", "url": url})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.add(*key, {".gitattributes": b""}, private=bool(private))
        return self._reply(200, {"url": url, "name": key[1], "id": key[1]})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.hub.url}/objects/{o['oid']}"}}}
            for o in asked["objects"]
        ]
        self._reply(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def _commit(self, repo: Repo, name: str, body: bytes) -> None:
        files = dict(repo.commits[repo.refs["main"]])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        sha = repo.commit(files)
        self._reply(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})


def _tree(files: Files, folder: str, deep: bool) -> list[dict[str, object]]:
    """What is in a folder of a commit; `deep` = in its folders too."""
    start = f"{folder.rstrip('/')}/" if folder else ""
    inside = [path for path in files if path.startswith(start)]
    if deep:
        return [_entry(path, files[path]) for path in inside]
    names = dict.fromkeys(start + path[len(start) :].partition("/")[0] for path in inside)
    return [
        _entry(path, files[path]) if path in files else {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        for path in names
    ]


def _entry(path: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers at `Hub.url` while the block runs."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
