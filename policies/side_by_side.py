"""How much each version has drafted of late, where a policy chooses between two of them.

A policy that abandons a version says so by what it lets draft. A newer version then takes the place
of the abandoned one, and the version that has proved itself stays beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from policies.rollback import Block, DraftingShare

_ABANDONED = 2.0
"""A version is abandoned if the other one has drafted so many times as often, lately: 70 steps
after a swap at the earliest."""


@dataclass(slots=True)
class _Side:
    """One version."""

    share: DraftingShare
    recent: deque[float]
    """Mean tokens_per_step of its last blocks."""
    block: Block = field(default_factory=Block)


class SideBySide:
    """Watches the versions of one drafter that may draft. Takes what its swapper is told."""

    def __init__(self, num_blocks: int) -> None:
        """
        Args:
            num_blocks: blocks of each version that are kept.
        """
        self.drafter = DraftingShare()
        """Of the drafter that has the newest version, or in a trial the former one."""
        self._num_blocks = num_blocks
        self._sides: dict[int, _Side] = {}

    def step(self, versions: Sequence[int]) -> None:
        """A step begins.

        Args:
            versions: those that may draft in it. What others did is forgotten; one that is new is
                taken for as good as those before it.
        """
        self.drafter.step()
        if self._sides.keys() != set(versions):
            most = max((side.share.value for side in self._sides.values()), default=1.0)
            self._sides = {
                version: self._sides.get(version)
                or _Side(DraftingShare(most), deque(maxlen=self._num_blocks))
                for version in versions
            }
        for side in self._sides.values():
            side.share.step()

    def drafted(self, version: int, num_accepted: int, rounds: int) -> None:
        """A version has drafted in a step.

        Args:
            num_accepted: draft tokens kept.
            rounds: requests that it drafted for.
        """
        side = self._sides.get(version)
        if side is None:
            return
        side.share.drafted()
        block = side.block.add(1 + num_accepted / rounds, rounds) if rounds else None
        if block is not None:
            side.recent.append(block)

    def renamed(self, version: int, now: int) -> None:
        """The same weights draft under another number from now on. What was seen of them stays."""
        if (side := self._sides.pop(version, None)) is not None:
            self._sides[now] = side

    def preferred_to(self, version: int) -> int | None:
        """The other version, if this one is abandoned for it."""
        own = self._sides.get(version)
        others = (one for one in self._sides.items() if one[0] != version)
        if own is None or (other := next(others, None)) is None:
            return None
        number, side = other
        return number if side.share.value > _ABANDONED * own.share.value else None

    def blocks_of(self, version: int) -> Sequence[float]:
        """Mean tokens_per_step of a version's last blocks."""
        return tuple(self._sides[version].recent)
