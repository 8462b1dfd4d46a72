"""A proxy before a server, which ends TLS and makes the network's mistakes."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator

_CHUNK = 1 << 16


class Proxy:
    """Carries bytes between clients and one server. Faults hold for present and new connections."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        """
        Args:
            port: of the server, on this machine.
            tls: speak TLS with the clients.
        """
        self._server_port = port
        self._tls = tls
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._flows = threading.Event()
        self._flows.set()
        self._closed = False
        self.delay_s = 0.0
        """Before each piece is carried on."""
        self.swallow_answers = False
        """Carry commands to the server, and nothing back."""
        self.refuses = False
        """End new connections at once."""
        self.bytes_per_s: float | None = None
        """Read no faster than this from clients; ``None``: as fast as they send."""
        self._abandoned: set[tuple[socket.socket, socket.socket]] = set()
        self._thread = threading.Thread(target=self._accept, name="proxy", daemon=True)
        self._thread.start()

    def stall(self) -> None:
        """Carry nothing any more, and keep the connections."""
        self._flows.clear()

    def flow(self) -> None:
        """Carry again, and accept connections."""
        self.delay_s, self.swallow_answers, self.refuses = 0.0, False, False
        self.bytes_per_s = None
        self._flows.set()

    def cut(self) -> None:
        """End all connections with FIN."""
        self._end_all(reset=False)

    def abandon(self) -> None:
        """Carry nothing over the present connections any more, and never tell either end; new ones
        work."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
            self._abandoned |= set(pairs)

    def reset(self) -> None:
        """End all connections with RST."""
        self._end_all(reset=True)

    def close(self) -> None:
        self._closed = True
        # Wakes the thread in ``accept``, which closing alone would not.
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        self._listening.close()
        self._flows.set()
        self._end_all(reset=False)
        self._thread.join(5)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end_all(self, reset: bool) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for one in pair:
                _end(one, reset)

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        if self.refuses or self._closed:
            _end(client, reset=True)
            return
        try:
            if self._tls is not None:
                client = self._tls.wrap_socket(client, server_side=True)
            server = socket.create_connection(("127.0.0.1", self._server_port))
        except OSError:
            _end(client, reset=False)
            return
        with self._lock:
            pair = client, server
            self._pairs.append(pair)
        for is_answer in (False, True):
            threading.Thread(target=self._carry, args=(pair, is_answer), daemon=True).start()

    def _carry(self, pair: tuple[socket.socket, socket.socket], is_answer: bool) -> None:
        source, sink = reversed(pair) if is_answer else pair
        try:
            for piece in _pieces(source):
                self._flows.wait()
                if self.delay_s:
                    time.sleep(self.delay_s)
                if self.bytes_per_s is not None and not is_answer:
                    time.sleep(len(piece) / self.bytes_per_s)
                if pair in self._abandoned:
                    continue
                if not (is_answer and self.swallow_answers):
                    sink.sendall(piece)
        except (OSError, ValueError):
            pass
        _end(source, reset=False)
        _end(sink, reset=False)


def _pieces(source: socket.socket) -> Iterator[bytes]:
    while piece := source.recv(_CHUNK):
        yield piece


def _end(one: socket.socket, reset: bool) -> None:
    with contextlib.suppress(OSError):
        if reset:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            one.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        one.close()
