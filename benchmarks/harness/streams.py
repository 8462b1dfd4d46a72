"""Answers streamed one after another, and the gaps between their events."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

HOST = "127.0.0.1"


async def stream(
    port: int,
    requests: Iterable[tuple[str, dict[str, Any]]],
    is_over: Callable[[], bool],
    gaps: list[tuple[float, float]],
) -> None:
    """One request after the other on one connection, until ``is_over`` or there are no more. Reads
    lines only: a client that parsed JSON would be the limit.

    Args:
        requests: path and body of each; ``stream`` is added to the bodies.
        gaps: receives (Unix time, gap) in seconds, for every event of an answer but its first.

    Raises:
        OSError: the server refused a request, or closed the connection.
    """
    reader, writer = await asyncio.open_connection(HOST, port)
    for path, fields in requests:
        if is_over():
            break
        body = json.dumps({**fields, "stream": True}).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise ConnectionError(f"the server answered {status!r}")
        last_s: float | None = None
        while True:
            line = await reader.readline()
            if not line or line.startswith(b"data: [DONE]"):
                break
            if not line.startswith(b"data: "):
                continue
            now_s = time.perf_counter()
            if last_s is not None:
                gaps.append((time.time(), now_s - last_s))
            last_s = now_s
        if not line:
            raise ConnectionError("the server closed the connection")
        while (await reader.readline()).strip() != b"0":  # the last chunk
            pass
        await reader.readline()
    writer.close()


class Streams:
    """Streams without pause, on a thread of their own, each with its own share of the requests,
    over and over."""

    def __init__(
        self, url: str, requests: Sequence[tuple[str, dict[str, Any]]], num_streams: int
    ) -> None:
        """
        Args:
            requests: see ``stream``; at least one for each.
        """
        self._port = urlsplit(url).port or 80
        self._shares = [requests[n::num_streams] for n in range(num_streams)]
        self._gaps: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self.failures: list[str] = []
        self._thread = threading.Thread(target=self._run, name="streams", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End all streams, each with its answer."""
        self._stop.set()
        self._thread.join()

    def gaps(self, since_s: float, until_s: float) -> list[float]:
        """Seconds of the gaps that ended between two Unix times."""
        return [gap for at_s, gap in tuple(self._gaps) if since_s <= at_s < until_s]

    def _run(self) -> None:
        async def all_of_them() -> None:
            await asyncio.gather(*(self._keep_on(share) for share in self._shares))

        asyncio.run(all_of_them())

    async def _keep_on(self, share: Sequence[tuple[str, dict[str, Any]]]) -> None:
        while not self._stop.is_set():
            try:
                await stream(self._port, itertools.cycle(share), self._stop.is_set, self._gaps)
            except OSError as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.1)
