"""Which programs of rounds are left for later, and how long drafts may be until they are made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT")


@dataclass(slots=True)
class _Group(Generic[KeyT]):
    """The programs of one size and K that are left."""

    size: int
    num_draft: int
    keys: deque[KeyT]


class Later(Generic[KeyT]):
    """Keys of programs that are to be made: those of the size that batches have now first, then a K
    for all sizes before the next one.

    A batch may shrink once its K is chosen, to a size whose programs of this K are not made:
    ``size_for`` says to which it is padded then.
    """

    def __init__(self, sizes: Sequence[int], max_draft: int) -> None:
        """
        Args:
            sizes: of batches that programs are made for, ascending.
            max_draft: largest K.
        """
        self._sizes = sizes
        self._max_draft = max_draft
        self._made_draft = dict.fromkeys(sizes, max_draft)
        self._left: list[_Group[KeyT]] = []
        self._preferred: int | None = None

    def leave(self, most_draft: int, keys_of: Callable[[int, int], list[KeyT]]) -> None:
        """Leave all programs of larger K than ``most_draft``.

        Args:
            keys_of: size, K -> keys of its programs.
        """
        if most_draft >= self._max_draft:
            return
        self._made_draft = dict.fromkeys(self._sizes, most_draft)
        self._left += [
            _Group(size, num_draft, deque(keys))
            for num_draft in range(most_draft + 1, self._max_draft + 1)
            for size in self._sizes
            if (keys := keys_of(size, num_draft))
        ]

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

    @property
    def is_last(self) -> bool:
        """With the next one, all of its size and K are made."""
        return len(self._group.keys) == 1

    def was_made(self) -> None:
        """The next one is made."""
        group = self._group
        group.keys.popleft()
        if not group.keys:
            self._made_draft[group.size] = group.num_draft
            self._left.remove(group)

    def made_draft(self, size: int) -> int:
        """Largest K whose programs of a size are all made."""
        return self._made_draft[size]

    def size_for(self, size: int, num_draft: int) -> int:
        """The smallest size from this one on whose programs of a K are made."""
        made = (one for one in self._sizes if one >= size and self._made_draft[one] >= num_draft)
        return next(made)

    @property
    def _group(self) -> _Group[KeyT]:
        """The one to go on with."""
        return next((one for one in self._left if one.size == self._preferred), self._left[0])
