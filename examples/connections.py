"""Requests as cheap as they get, so that clients measure the server and not themselves.

One request costs the client 0.5 ms of processor time, of which its threads can use one core in
all. With OpenAI's package it is 4 ms, which bounds a process to some 100 requests a second; that
package works with the server all the same.
"""

from __future__ import annotations

import http.client
import json
import select
import threading
from typing import Any


class RequestError(Exception):
    """A request was refused, or its answer did not come."""


class Connections:
    """One connection for each thread, kept between requests."""

    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        """
        Args:
            timeout_s: longest wait for the next part of an answer.
        """
        self._host, self._port, self._timeout_s = host, port, timeout_s
        self._own = threading.local()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that the server answers. Nothing is sent twice: that would hide a failed
        request.

        Raises:
            RequestError: there was none, or its status is not 200.
        """
        connection = self._connection()
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                raise RequestError(f"{path}: {response.status} {content[:1000].decode()}")
            answer: dict[str, Any] = json.loads(content)
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            raise RequestError(f"{path}: {type(error).__name__}: {error}") from error
        return answer

    def _connection(self) -> http.client.HTTPConnection:
        """This thread's connection; a new one if the server has closed the last one."""
        known: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
        if known is None:
            known = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
            self._own.connection = known
        elif known.sock is not None and select.select([known.sock], [], [], 0)[0]:
            known.close()  # the next request connects again
        return known
