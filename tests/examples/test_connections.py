"""The demo's connections against a server that behaves as told."""

from __future__ import annotations

import json
import select
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from examples.connections import Connections, RequestError


class Server(ThreadingHTTPServer):
    """Answers with the number of its connection, and closes it if it was asked to."""

    daemon_threads = True
    num_connections = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.num_connections += 1
        self.number = self.server.num_connections

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body.get("raw", json.dumps({"connection": self.number})).encode()
        self.send_response(body.get("status", 200))
        self.send_header("Content-Length", str(len(content) + body.get("missing", 0)))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = body.get("close", False)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def connections(server: Server) -> Connections:
    return Connections("127.0.0.1", server.server_port, 30.0)


def test_a_thread_keeps_its_connection(server: Server, connections: Connections) -> None:
    found = [connections.post("/", {})["connection"] for _ in range(3)]
    assert found == [1, 1, 1]

    other = threading.Thread(target=lambda: found.append(connections.post("/", {})["connection"]))
    other.start()
    other.join()
    assert found[3] == 2


def test_a_connection_that_the_server_closed_is_made_again(connections: Connections) -> None:
    assert connections.post("/", {"close": True}) == {"connection": 1}
    ended = select.select([connections._own.connection.sock], [], [], 30)
    assert ended[0]

    assert connections.post("/", {}) == {"connection": 2}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"status": 503, "raw": "draining"}, "^/path: 503 draining$"),
        ({"raw": "no JSON"}, "^/path: JSONDecodeError: "),
        ({"missing": 5, "close": True}, "^/path: IncompleteRead: "),
    ],
)
def test_what_is_no_answer_is_an_error_and_the_next_request_is_answered(
    connections: Connections, body: dict[str, object], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        connections.post("/path", body)

    assert "connection" in connections.post("/path", {})


def test_a_server_that_is_not_there_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = Connections("127.0.0.1", taken.getsockname()[1], 5.0)
        with pytest.raises(RequestError, match=r"^/: ConnectionRefusedError: "):
            nobody.post("/", {})
