"""Logging of both commands: one format, to stderr, at the level of the setting ``log_level``."""

from __future__ import annotations

import logging
import sys

OURS = ("serving", "trainer", "drafters", "policies", "targets", "buffer", "reporting", "configs")
"""Packages that log at ``log_level``. Libraries log warnings and errors only."""
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_up_logging(level: str) -> None:
    """Send log lines to stderr.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``, as in ``Settings.log_level``.
    """
    chosen = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(stream=sys.stderr, level=max(chosen, logging.WARNING), format=FORMAT)
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
