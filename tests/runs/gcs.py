"""A server on localhost that speaks as much of Google Cloud Storage's JSON API as gcsfs, its Python client and
TensorStore ask for: listings, conditional uploads, ranges, copies and deletions, of objects with generations."""

from __future__ import annotations

import base64
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bucket"


class _Object(NamedTuple):
    data: bytes
    generation: int


class Store:
    """The objects of one bucket, by name, and what the server is to refuse."""

    def __init__(self) -> None:
        self.objects: dict[str, _Object] = {}
        self.generation = 0
        self.lock = threading.Lock()
        self.uploads: dict[str, tuple[str, dict[str, str], bytes]] = {}
        self.fault: Callable[[str, str], int | None] = lambda method, name: None
        """(method, path and query) -> the HTTP status with which a request is refused, or None."""
        self.requests: list[tuple[str, str]] = []

    def names(self, prefix: str = "") -> list[str]:
        """Names of the objects that begin so, sorted."""
        return sorted(name for name in self.objects if name.startswith(prefix))

    def read(self, name: str) -> bytes:
        return self.objects[name].data

    def put(self, name: str, data: bytes, asked: dict[str, str]) -> _Object | None:
        """Store an object, unless the request's condition on its generation fails, which gives None."""
        with self.lock:
            there = self.objects.get(name)
            wanted = asked.get("ifGenerationMatch")
            if wanted is not None and int(wanted) != (there.generation if there else 0):
                return None
            self.generation += 1
            self.objects[name] = _Object(data, self.generation)
            return self.objects[name]


def _crc32c(data: bytes) -> str:
    import google_crc32c

    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


def _describe(name: str, found: _Object) -> dict[str, object]:
    return {
        "kind": "storage#object",
        "bucket": BUCKET,
        "name": name,
        "size": str(len(found.data)),
        "generation": str(found.generation),
        "metageneration": "1",
        "crc32c": _crc32c(found.data),
        "contentType": "application/octet-stream",
        "updated": "2025-01-01T00:00:00.000Z",
        "timeCreated": "2025-01-01T00:00:00.000Z",
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave together, as the client would wait for the second of two packets
    store: Store

    def log_message(self, *_: object) -> None:
        """Keep requests out of the tests' output."""

    def _reply(self, status: int, body: bytes | dict[str, object] = b"", **headers: str) -> None:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        if isinstance(body, dict):
            self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, message: str = "refused") -> None:
        self._reply(status, {"error": {"code": status, "message": message}})

    def _serve(self) -> None:
        url = urlsplit(self.path)
        asked = {name: values[-1] for name, values in parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        self.store.requests.append((self.command, self.path))
        status = self.store.fault(self.command, unquote(self.path))
        if status is not None:
            return self._refuse(status)
        if url.path.startswith("/upload/"):
            return self._upload(url.path, asked, body)
        found = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?(/o)?", url.path)
        if found is None or unquote(found[1]) != BUCKET:
            return self._refuse(404, "no such bucket")
        if found[2] is not None:
            return self._object(found[2], asked)
        if re.search(r"/o$", url.path):
            return self._list(asked)
        return self._reply(200, {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET, "location": "US"})

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _list(self, asked: dict[str, str]) -> None:
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter")
        items, prefixes = [], set()
        for name in self.store.names(prefix):
            if name < asked.get("startOffset", "") or ("endOffset" in asked and name >= asked["endOffset"]):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            elif (there := self.store.objects.get(name)) is not None:
                items.append(_describe(name, there))
        self._reply(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _object(self, path: str, asked: dict[str, str]) -> None:
        source, _, target = path.partition("/rewriteTo/b/")
        name = unquote(source)
        found = self.store.objects.get(name)
        if found is None:
            return self._refuse(404, f"No such object: {name}")
        wanted, unwanted = asked.get("ifGenerationMatch"), asked.get("ifGenerationNotMatch")
        if wanted is not None and int(wanted) != found.generation:
            return self._refuse(412, "generation differs")
        if unwanted is not None and int(unwanted) == found.generation:
            return self._reply(304)
        if target:
            copied = self.store.put(unquote(target.partition("/o/")[2]), found.data, {})
            assert copied is not None
            return self._reply(200, {"kind": "storage#rewriteResponse", "done": True})
        if self.command == "DELETE":
            with self.store.lock:
                self.store.objects.pop(name, None)
            return self._reply(204)
        if asked.get("alt") != "media":
            return self._reply(200, _describe(name, found))
        told = {"X_Goog_Generation": str(found.generation), "Content_Type": "application/octet-stream"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return self._reply(200, found.data, **told)
        start, end = int(span[1]), int(span[2]) + 1 if span[2] else len(found.data)
        if start >= len(found.data) > 0:
            return self._refuse(416, "range")
        part = found.data[start:end]
        told["Content_Range"] = f"bytes {start}-{start + len(part) - 1}/{len(found.data)}"
        return self._reply(206, part, **told)

    def _upload(self, path: str, asked: dict[str, str], body: bytes) -> None:
        if unquote(path.split("/")[5]) != BUCKET:
            return self._refuse(404, "no such bucket")
        kind, name = asked.get("uploadType"), asked.get("name", "")
        if "upload_id" in asked:
            name, first, before = self.store.uploads[asked["upload_id"]]
            span = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range", "bytes */0"))
            assert span is not None
            data = before + body
            if span[3] == "*":
                self.store.uploads[asked["upload_id"]] = name, first, data
                return self._reply(308, Range=f"bytes=0-{len(data) - 1}")
            asked, body = first, data
        elif kind == "resumable":
            name = name or json.loads(body)["name"]
            number = str(len(self.store.uploads))
            self.store.uploads[number] = name, asked, b""
            host = self.headers["Host"]
            return self._reply(200, {}, Location=f"http://{host}{path}?uploadType=resumable&upload_id={number}")
        elif kind == "multipart":
            edge = re.search(r'boundary="?([^";]+)"?', self.headers["Content-Type"])
            assert edge is not None
            # A client may end its lines with a bare line feed, and the content itself may end in either character.
            end = b"\r\n" if body.split(b"\n", 1)[0].endswith(b"\r") else b"\n"
            boundary = end + b"--" + edge[1].encode()
            fields, _, rest = body.partition(end * 2)[2].partition(boundary)
            name = name or json.loads(fields)["name"]
            body = rest.partition(end * 2)[2].rpartition(boundary + b"--")[0]
        stored = self.store.put(name, body, asked)
        if stored is None:
            return self._refuse(412, "generation differs")
        return self._reply(200, _describe(name, stored))


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep connections that a client closes, or that its end cuts off, out of the tests' output."""


class Server(NamedTuple):
    """A running server."""

    store: Store
    env: dict[str, str]
    """Environment in which a process takes it for Google Cloud Storage."""


@contextmanager
def serving() -> Iterator[Server]:
    """A server with one empty bucket."""
    store = Store()
    handler = type("Handler", (_Handler,), {"store": store})
    with _Listener(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        env = {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GCE_METADATA_ROOT": "127.0.0.1:1",
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        try:
            yield Server(store, env)
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def environment(env: dict[str, str]) -> Iterator[None]:
    """These variables in the environment of this process."""
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
