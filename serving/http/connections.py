"""Connections of a process, and how many it may hold.

A process out of file descriptors can neither accept a connection nor open a file. asyncio then logs
a traceback for every connection that it is allowed to accept in one turn of its loop, again and
again: thousands a second, until clients leave. So a few connections are accepted in each turn, and
those that come near the limit are refused.
"""

from __future__ import annotations

import contextlib
import resource
import socket

ACCEPTS = 2
"""Connections that a turn of the event loop accepts."""
MOST_FILES = 65_536
"""Open files that a server asks for, where its user may have so many; shells often allow 1,024."""
_SPARE = 64
"""Descriptors that are left to traces, weights and pages; an eighth of all if these are few."""


class Listener(socket.socket):
    """A listening socket whose queue stays as long as it is: asyncio would make it as short as the
    number of connections that one turn accepts."""

    def listen(self, backlog: int = 0, /) -> None:
        """It listens already."""


def raise_limit() -> None:
    """Let this process and those it starts open as many files as the system lets them, up to
    ``MOST_FILES``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # refused: it serves with what it has
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def is_near_limit(descriptor: int) -> bool:
    """True if so many files are open that a connection with this descriptor, which was the lowest
    one free, is to be refused."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A refused connection is closed some turns later, in which others are accepted.
    spare = max(8 * ACCEPTS, min(_SPARE, soft // 8))
    return soft != resource.RLIM_INFINITY and descriptor >= soft - spare
