"""Answers streamed one after another, and the gaps between their tokens."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 60.0
_TEXT = (b'"content":', b'"text":')


class Streams:
    """Threads that stream completions, of chats or of texts, without pause, each with its own share
    of the bodies, over and over.

    A gap is the time between two events of one answer that carry text, as its client saw them. The
    first token's is left out.
    """

    def __init__(self, url: str, bodies: Sequence[dict[str, Any]], num_streams: int) -> None:
        """
        Args:
            bodies: of POST /v1/chat/completions, or of /v1/completions if they have a ``prompt``;
                ``stream`` is added.
        """
        self._place = urlsplit(url)
        self._gaps: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self.failures: list[str] = []
        self._threads = [
            threading.Thread(target=self._run, args=(bodies[n::num_streams],), daemon=True)
            for n in range(num_streams)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def gaps(self, since_s: float, until_s: float) -> list[float]:
        """Seconds of the gaps that ended between two values of ``time.perf_counter``."""
        return [gap for at, gap in tuple(self._gaps) if since_s <= at < until_s]

    def _run(self, bodies: Sequence[dict[str, Any]]) -> None:
        while not self._stop.is_set():
            for body in bodies:
                if self._stop.is_set():
                    return
                try:
                    self._stream({**body, "stream": True})
                except (OSError, http.client.HTTPException) as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                    self._stop.wait(0.1)

    def _stream(self, body: dict[str, Any]) -> None:
        assert self._place.hostname is not None
        connection = http.client.HTTPConnection(
            self._place.hostname, self._place.port, timeout=TIMEOUT_S
        )
        try:
            connection.request(
                "POST",
                "/v1/completions" if "prompt" in body else "/v1/chat/completions",
                json.dumps(body),
                {"Content-Type": "application/json"},
            )
            response = connection.getresponse()
            if response.status != 200:
                raise http.client.HTTPException(f"{response.status}: {response.read(200)!r}")
            last: float | None = None
            for line in response:
                if not line.startswith(b"data: {") or (
                    b'"content":' not in line and b'"text":' not in line
                ):
                    continue
                now = time.perf_counter()
                if last is not None:
                    self._gaps.append((now, now - last))
                last = now
                if self._stop.is_set():
                    return
        finally:
            connection.close()
