"""Which programs of rounds are left for later, and how long drafts may be until they are made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT")


class Later(Generic[KeyT]):
    """Keys of programs that are to be made, a K for all sizes before the next one.

    Small sizes come first: a batch that shrinks once its K is chosen finds its programs made.
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
        self._left: deque[tuple[KeyT, int, int, bool]] = deque()
        """Key, size, K, and whether it is the last one of these."""

    def leave(self, most_draft: int, keys_of: Callable[[int, int], list[KeyT]]) -> None:
        """Leave all programs of larger K than ``most_draft``.

        Args:
            keys_of: size, K -> keys of its programs.
        """
        if most_draft >= self._max_draft:
            return
        self._made_draft = dict.fromkeys(self._sizes, most_draft)
        for num_draft in range(most_draft + 1, self._max_draft + 1):
            for size in self._sizes:
                keys = keys_of(size, num_draft)
                for at, key in enumerate(keys, start=1):
                    self._left.append((key, size, num_draft, at == len(keys)))

    @property
    def num_left(self) -> int:
        return len(self._left)

    @property
    def next(self) -> KeyT | None:
        """What to make now; ``None`` if nothing is left."""
        return self._left[0][0] if self._left else None

    @property
    def is_last(self) -> bool:
        """With the next one, all of its size and K are made."""
        return self._left[0][3]

    def was_made(self) -> None:
        """The next one is made."""
        _, size, num_draft, is_last = self._left.popleft()
        if is_last:
            self._made_draft[size] = num_draft

    def made_draft(self, size: int) -> int:
        """Largest K whose programs of a size are all made."""
        return self._made_draft[size]
