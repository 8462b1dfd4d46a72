"""One beginning in each turn of the event loop, so that events of streams get between them.

Requests come in bursts: those that were admitted together often end together, and their clients ask
again at once. All of a burst in one turn would hold up every stream of the process by the sum.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """Lets one task pass in each turn of the event loop, in the order in which they come."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_taken = False
        """A task has passed in this turn of the loop."""

    async def mine(self) -> None:
        """Wait for a turn in which nobody else has passed."""
        loop = asyncio.get_running_loop()
        if self._is_taken:
            passing = loop.create_future()
            self._waiting.append(passing)
            await passing
            return
        self._is_taken = True
        loop.call_soon(self._begin_turn, loop)

    def _begin_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting:
            passing = self._waiting.popleft()
            if not passing.done():  # a task that was cancelled passes its turn on
                passing.set_result(None)
                loop.call_soon(self._begin_turn, loop)
                return
        self._is_taken = False
