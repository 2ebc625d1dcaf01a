"""A local HTTP server with OpenAI's interface for chat completions, whose replies a test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Asked(NamedTuple):
    """A request as the server has received it."""

    path: str
    headers: dict[str, str]
    body: dict


class Answer(NamedTuple):
    """A response: words of the judge, or a body of any kind."""

    words: str = ""
    status: int = 200
    headers: dict[str, str] = {}  # noqa: RUF012
    body: str | None = None


class Service:
    """The state of a running server."""

    def __init__(self, answer: Callable[[Asked, int], Answer]):
        self.answer = answer
        self.asked: list[Asked] = []
        self.at_once = 0
        self.most_at_once = 0
        self.lock = threading.Lock()
        self.url = ""

    def questions(self) -> list[str]:
        """The messages without that of the first request, which a judge sends at its beginning."""
        return [one.body["messages"][0]["content"] for one in self.asked if "1 + 1" not in str(one.body)]


@contextmanager
def serving(answer: Callable[[Asked, int], Answer]) -> Iterator[Service]:
    """A server on a free port. `answer(request, n)` decides the reply to the n-th request, from 0; the first requests
    that judges send at their beginning are not counted and get the score 10."""
    service = Service(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = Asked(self.path, dict(self.headers), body)
            with service.lock:
                number = len(service.questions())
                service.asked.append(asked)
                service.at_once += 1
                service.most_at_once = max(service.most_at_once, service.at_once)
            try:
                first = "1 + 1" in str(body)
                found = Answer("Score: 10") if first else service.answer(asked, number)
            finally:
                with service.lock:
                    service.at_once -= 1
            text = found.body
            if text is None:
                text = json.dumps({"choices": [{"message": {"role": "assistant", "content": found.words}}]})
            data = text.encode()
            self.send_response(found.status)
            for name, value in found.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *arguments: object) -> None:
            """A test that breaks a connection means to."""

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    service.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
