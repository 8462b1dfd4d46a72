"""Which programs of rounds are left for later, and how long drafts may be until they are made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT")


@dataclass(frozen=True, slots=True)
class _Left(Generic[KeyT]):
    key: KeyT
    size: int
    num_draft: int
    is_scored: bool
    is_last: bool
    """With it, all of its size and K are made."""


class Later(Generic[KeyT]):
    """Keys of programs that are to be made, a K for all sizes before the next one; those that score
    tokens last.

    Small sizes come first: a batch that shrinks once its K is chosen finds its programs made.
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
        self._left: deque[_Left[KeyT]] = deque()

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
                keys = keys_of(size, num_draft)
                for at, key in enumerate(keys, start=1):
                    self._left.append(_Left(key, size, num_draft, are_scored, at == len(keys)))

    @property
    def num_left(self) -> int:
        return len(self._left)

    @property
    def next(self) -> KeyT | None:
        """What to make now; ``None`` if nothing is left."""
        return self._left[0].key if self._left else None

    def was_made(self) -> bool:
        """The next one is made. Returns whether it is the last of its size and K, and scores no
        tokens."""
        left = self._left.popleft()
        if left.is_last:
            self._made_draft[left.size, left.is_scored] = left.num_draft
        return left.is_last and not left.is_scored

    def made_draft(self, size: int, *, is_scored: bool = False) -> int:
        """Largest K whose programs of a size are all made."""
        return self._made_draft[size, is_scored]
