"""What clients are told while the model loads: the port is held, but nothing is served yet.

The listener is open from the start, so that no other process can take the port during minutes of
loading. Without an answer, clients and health checks would hang that long.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

from starlette.responses import Response

from serving.http.boundary import MAX_HEAD_BYTES
from serving.http.connections import ACCEPTS, is_near_limit
from serving.http.errors import ApiError
from serving.http.response_bodies import Health, Readiness
from serving.http.responses import json_answer

LOADING = "the model is being loaded"
"""Why a server is not ready yet."""
_HEAD_S = 10.0
"""Time to send a request's headers."""
_REST_S = 1.0
"""Time to send the rest of a request, which is discarded: closing before it came could cost the
client the answer."""
_LAST_S = 0.5
"""Time that clients which are connected when the model is loaded have to send their requests."""


@contextlib.contextmanager
def answering_503(listener: socket.socket) -> Iterator[None]:
    """Answer every request with 503, and ``/health`` with 200, until the block ends.

    Connections that nobody has accepted by then stay in the listener's queue.

    Args:
        listener: a listening socket; it stays open.
    """
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(
        asyncio.start_server(_answer, sock=listener.dup(), limit=MAX_HEAD_BYTES, backlog=ACCEPTS)
    )
    thread = threading.Thread(target=loop.run_forever, name="loading", daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(_end(server))
        loop.close()


async def _end(server: asyncio.Server) -> None:
    """Close the server's own descriptor, and finish the answers to connections it has accepted.

    A client that was accepted and not answered would see its connection reset.
    """
    server.close()
    loop = asyncio.get_running_loop()
    end = loop.time() + _LAST_S
    # An accepted connection becomes a task that starts another, the answer.
    while (left := _others()) and loop.time() < end:
        await asyncio.wait(left, timeout=end - loop.time())
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    await asyncio.sleep(0)  # the connections are closed by the loop's next turn


def _others() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        if is_near_limit(writer.get_extra_info("socket").fileno()):
            return
        async with asyncio.timeout(_HEAD_S):
            head = await reader.readuntil(b"\r\n\r\n")
        writer.write(_response(head))
        writer.write_eof()
        async with asyncio.timeout(_REST_S):
            while await reader.read(1 << 16):
                pass
    except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
        pass
    except asyncio.CancelledError:
        pass  # the stream's own callback logs a cancelled task as an error
    finally:
        writer.close()


def _response(head: bytes) -> bytes:
    """The whole answer to a request with these headers."""
    words = head.partition(b"\r\n")[0].split(b" ")
    path = words[1].partition(b"?")[0] if len(words) > 1 else b""
    is_health = path in (b"/health", b"/health/")
    if is_health:
        answer = json_answer(Health(status="alive"))
    else:
        answer = _not_ready() if path in (b"/ready", b"/ready/") else _not_yet()
    reason = b"200 OK" if is_health else b"503 Service Unavailable"
    lines = [b"HTTP/1.1 " + reason, *(b": ".join(header) for header in answer.raw_headers)]
    return b"\r\n".join([*lines, b"connection: close", b"", bytes(answer.body)])


def _not_ready() -> Response:
    """``/ready`` has one shape, whatever it says."""
    answer = json_answer(Readiness(status="not ready", reason=LOADING))
    answer.headers["Retry-After"] = "1"
    return answer


def _not_yet() -> Response:
    return ApiError(
        503,
        "The server is loading its model; retry shortly.",
        code="loading",
        headers={"Retry-After": "1"},
    ).response()
