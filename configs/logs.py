"""Logging of both commands: one format, to stderr, at the level of the setting ``log_level``."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable

OURS = ("serving", "trainer", "drafters", "policies", "targets", "buffer", "reporting", "configs")
"""Packages that log at ``log_level``. Libraries log warnings and errors only."""
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
"""Characters that would steer a terminal, or change the order of what it shows."""


class OneRecord(logging.Formatter):
    """Lines that nobody can forge: a message may quote what a client sent.

    Control characters are shown as Python would write them, and whatever follows an end of line
    begins with spaces, which no line of ours does.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], super().formatMessage(record))
        return line.rstrip("\n").replace("\n", "\n    ")


def set_up_logging(level: str) -> None:
    """Send log lines to stderr.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``, as in ``Settings.log_level``.
    """
    chosen = logging.getLevelNamesMapping()[level.upper()]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneRecord(FORMAT))
    logging.basicConfig(handlers=[handler], level=max(chosen, logging.WARNING))
    for name in OURS:
        logging.getLogger(name).setLevel(chosen)


class Lasting:
    """A problem that is logged once as long as it lasts."""

    def __init__(self) -> None:
        self._problem: str | None = None

    def is_new(self, problem: str | None) -> bool:
        """Whether there is a problem now that was not the last one; ``None``: there is none."""
        before, self._problem = self._problem, problem
        return problem is not None and problem != before


class Outage:
    """Something that is tried again and again, and fails at present: told when that begins, at
    growing intervals while it lasts, and when it is over. The reason may be another one each time.

    For one thread.
    """

    AGAIN_S = 60.0
    """Seconds until it is told for the second time; each time, twice as long."""
    MOST_S = 3600.0

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            what: what cannot be done, such as "look for new versions".
            clock: seconds.
        """
        self._what = what
        self._clock = clock
        self._began_s: float | None = None
        self._due_s = 0.0
        self._wait_s = self.AGAIN_S
        self._num_tries = 0

    def failed(self, problem: str) -> str | None:
        """It failed.

        Args:
            problem: the reason, and what happens meanwhile.

        Returns:
            What to tell; ``None``: it was told not long ago.
        """
        now_s = self._clock()
        self._num_tries += 1
        if self._began_s is None:
            self._began_s, self._due_s = now_s, now_s + self._wait_s
            return f"cannot {self._what} ({problem})"
        if now_s < self._due_s:
            return None
        self._wait_s = min(2 * self._wait_s, self.MOST_S)
        self._due_s = now_s + self._wait_s
        lasted = f"{now_s - self._began_s:.0f} s and {self._num_tries} tries"
        return f"still cannot {self._what}, after {lasted} ({problem})"

    def ended(self) -> str | None:
        """It succeeded.

        Returns:
            What to tell; ``None``: it had not failed.
        """
        if self._began_s is None:
            return None
        lasted_s = self._clock() - self._began_s
        tries = f"{self._num_tries} failed " + ("try" if self._num_tries == 1 else "tries")
        self._began_s, self._wait_s, self._num_tries = None, self.AGAIN_S, 0
        return f"can {self._what} again, after {lasted_s:.0f} s and {tries}"
