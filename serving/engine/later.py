"""Which programs of rounds are left for later, and how long drafts may be until they are made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT")


@dataclass(slots=True)
class _Group(Generic[KeyT]):
    """The programs of one size and K that are left, those that score tokens or the others."""

    size: int
    num_draft: int
    is_scored: bool
    keys: deque[KeyT]


class Later(Generic[KeyT]):
    """Keys of programs that are to be made: those of the size that batches have now first, then a K
    for all sizes before the next one; those that score tokens last.

    A batch may shrink once its K is chosen, to a size whose programs of this K are not made:
    ``size_for`` says to which it is padded then.
    """

    def __init__(self, sizes: Sequence[int], max_draft: int, max_scored: int) -> None:
        """
        Args:
            sizes: of batches that programs are made for, ascending.
            max_draft: largest K.
            max_scored: largest K of programs that score tokens.
        """
        self._sizes = sizes
        self._max_draft = {False: max_draft, True: max_scored}
        self._made_draft = {
            (size, is_scored): most for size in sizes for is_scored, most in self._max_draft.items()
        }
        self._left: list[_Group[KeyT]] = []
        self._preferred: int | None = None

    def leave(
        self,
        most_draft: int,
        keys_of: Callable[[int, int], list[KeyT]],
        *,
        are_scored: bool = False,
    ) -> None:
        """Leave all programs of larger K than ``most_draft``, behind those that are left already.

        Args:
            keys_of: size, K -> keys of its programs.
            are_scored: they score tokens.
        """
        for num_draft in range(most_draft + 1, self._max_draft[are_scored] + 1):
            for size in self._sizes:
                made = self._made_draft[size, are_scored]
                self._made_draft[size, are_scored] = min(made, most_draft)
                if keys := keys_of(size, num_draft):
                    self._left.append(_Group(size, num_draft, are_scored, deque(keys)))

    def prefer(self, size: int) -> None:
        """Batches have this size now."""
        self._preferred = size

    @property
    def num_left(self) -> int:
        return sum(len(group.keys) for group in self._left)

    @property
    def is_empty(self) -> bool:
        """Nothing is left."""
        return not self._left

    @property
    def next(self) -> KeyT | None:
        """What to make now; ``None`` if nothing is left."""
        return self._group.keys[0] if self._left else None

    def was_made(self) -> bool:
        """The next one is made. Returns whether it is the last of its size and K, and scores no
        tokens."""
        group = self._group
        group.keys.popleft()
        if group.keys:
            return False
        self._made_draft[group.size, group.is_scored] = group.num_draft
        self._left.remove(group)
        return not group.is_scored

    def made_draft(self, size: int, *, is_scored: bool = False) -> int:
        """Largest K whose programs of a size are all made."""
        return self._made_draft[size, is_scored]

    def size_for(self, size: int, num_draft: int, *, is_scored: bool = False) -> int:
        """The smallest size from this one on whose programs of a K are made."""
        made = self._made_draft
        return next(one for one in self._sizes if one >= size and made[one, is_scored] >= num_draft)

    @property
    def _group(self) -> _Group[KeyT]:
        """The one to go on with."""
        wanted = (g for g in self._left if g.size == self._preferred and not g.is_scored)
        return next(wanted, self._left[0])
