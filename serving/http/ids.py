"""Ids that nobody can guess, without a system call for each."""

from __future__ import annotations

import os

_ID_BYTES = 16
_DRAWN = 256
"""Ids that one call of the system is enough for. The call takes 20 times as long as an id."""


class _Pool:
    """Random bytes of the system. Not for several threads at once."""

    def __init__(self) -> None:
        self._digits, self._at = "", 0
        os.register_at_fork(after_in_child=self._drop)

    def next(self) -> str:
        if self._at == len(self._digits):
            self._digits, self._at = os.urandom(_ID_BYTES * _DRAWN).hex(), 0
        start, self._at = self._at, self._at + 2 * _ID_BYTES
        return self._digits[start : self._at]

    def _drop(self) -> None:
        """A copy of this process must not give out the same ids."""
        self._digits, self._at = "", 0


new_id = _Pool().next
"""32 hexadecimal digits, random. For the event loop's thread."""
