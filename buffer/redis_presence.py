"""Signs of life of the members of groups: keys that expire unless they are renewed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection

from buffer.interface import ServiceAwayError
from buffer.redis_client import RedisClient

_RENEWALS = 4  # in the time after which a member is taken for dead


class Presence:
    """A member's sign of life, renewed by a thread until ``end``."""

    def __init__(self, client: RedisClient, member: str) -> None:
        """
        Raises:
            ServiceAwayError: nobody would see it.
        """
        self._client = client
        self._member = member
        self._ended = threading.Event()
        self._renew()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Others may take over at once."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(ServiceAwayError):
            end_presence(self._client, self._member)

    def _run(self) -> None:
        while not self._ended.wait(self._client.options.member_timeout_s / _RENEWALS):
            with contextlib.suppress(ServiceAwayError):
                self._renew()

    def _renew(self) -> None:
        timeout_ms = int(self._client.options.member_timeout_s * 1000)
        self._client.call("SET", _key(self._client, self._member), 1, "PX", max(1, timeout_ms))


def end_presence(client: RedisClient, member: str) -> None:
    """Let others take over from a member."""
    client.call("DEL", _key(client, member))


def alive_members(client: RedisClient, members: Collection[str]) -> set[str]:
    """Those that have given a sign of life."""
    names = sorted(members)
    found = client.at_once(("EXISTS", _key(client, name)) for name in names)
    return {name for name, exists in zip(names, found, strict=True) if exists}


def _key(client: RedisClient, member: str) -> str:
    return client.options.key("alive", member)
