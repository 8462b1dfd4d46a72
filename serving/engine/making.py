"""Makes programs that were left for later, one at a time, between the steps of a server.

A server that has been idle for a moment makes one after another; a request that arrives meanwhile
waits for one at most. A client that asks again as soon as it is answered leaves no such moment: it
would wait for a program at every request. While requests are decoding, making one stops them for as
long as it takes, so the next one is not made before fifty times that has passed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

_SHARE = 0.02
"""Share of the time that making programs may take from requests that are decoding."""
PAUSE_S = 0.1
"""For which nothing has come when a server is taken for idle: several times what making one takes
(22 ms on an H200, 30 layers), and longer than a program that asks the next question needs for it.
"""


class Making:
    """What is left to make, and when. For one thread."""

    def __init__(
        self,
        make_next: Callable[[], bool],
        clock: Callable[[], float] = time.perf_counter,
        pause_s: float = PAUSE_S,
    ) -> None:
        """
        Args:
            make_next: makes one program; returns False if none is left.
            clock: seconds, monotonic.
            pause_s: see ``PAUSE_S``.
        """
        self.pause_s = pause_s
        self._make_next = make_next
        self._clock = clock
        self._is_over = True
        self._not_before_s = 0.0
        self._num, self._longest_s, self._spent_s = 0, 0.0, 0.0

    def begin(self) -> None:
        """Some are left from now on."""
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """Nothing is left, as far as is known."""
        return self._is_over

    @property
    def is_due(self) -> bool:
        """One may be made although requests are decoding."""
        return not self._is_over and self._clock() >= self._not_before_s

    def make(self) -> bool:
        """Make one, with nothing in flight. Returns False if none was left."""
        if self._is_over:
            return False
        started_s = self._clock()
        try:
            was_left = self._make_next()
        except RuntimeError:  # of the device, such as no memory left: go on with what there is
            log.exception("a program cannot be made; drafts stay as long as they are now")
            self._is_over = True
            return True
        ended_s = self._clock()
        took_s = ended_s - started_s
        if not was_left:
            self._is_over = True
            log.info(
                "made %d more programs in %.1f s, the longest in %.2f s",
                self._num, self._spent_s, self._longest_s,
            )  # fmt: skip
            return False
        self._num += 1
        self._spent_s += took_s
        self._longest_s = max(self._longest_s, took_s)
        self._not_before_s = ended_s + took_s / _SHARE
        return True
