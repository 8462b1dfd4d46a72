"""Text of a running request: a suffix tree that grows with it."""

from __future__ import annotations

from collections.abc import Sequence

from drafters.suffix.recent import MAX_VOTES


class RunningText:
    """A running request's tokens, and where its n-grams have occurred: the suffix tree of the text
    read backwards, ``max_match`` tokens deep.

    A node stands for n-grams that end at the same positions, and keeps the latest of those.
    Its longest n-gram is as long as ``_lengths`` says; its shortest is one token longer than the
    longest of its parent, and that one token leads from the parent to it. The last token of the
    text is stored but not yet linked: it has no continuation.
    """

    def __init__(self, min_match: int, max_match: int) -> None:
        self.tokens: list[int] = []
        self._min_match = min_match
        self._max_match = max_match
        # Nodes are numbers, not objects, so that garbage collection has nothing to visit.
        self._nodes: dict[tuple[int, ...] | int, int] = {}
        self._lengths: list[int] = []
        self._ends: list[tuple[int, ...]] = []

    def append(self, tokens: Sequence[int]) -> None:
        """Store tokens, and link those that now have a continuation."""
        for token in tokens:
            self._link(len(self.tokens) - 1)
            self.tokens.append(token)

    def find(self, tail: list[int]) -> tuple[int, tuple[int, ...]]:
        """Length of the longest linked suffix of ``tail``, and where it ends, latest first.

        Args:
            tail: the last ``max_match`` tokens (or all) of the text, or of the text and a draft.
        """
        found: tuple[int, tuple[int, ...]] = (0, ())
        key: tuple[int, ...] | int = tuple(tail[-self._min_match :])
        while (node := self._nodes.get(key)) is not None:
            length, ends = self._lengths[node], self._ends[node]
            shared = self._num_shared(tail, ends[0], length)
            found = shared, ends
            if shared < length or shared == len(tail):
                break
            key = _key_below(node, tail[-shared - 1])
        return found

    def _link(self, end: int) -> None:
        """Enter the n-grams that end at ``end``: follow those that occurred before, and add a node
        where they stop."""
        tail = self.tokens[max(0, end + 1 - self._max_match) : end + 1]
        if len(tail) < self._min_match:
            return
        key: tuple[int, ...] | int = tuple(tail[-self._min_match :])
        while (node := self._nodes.get(key)) is not None:
            length, ends = self._lengths[node], self._ends[node]
            shared = self._num_shared(tail, ends[0], length)
            if shared < length:
                node = self._nodes[key] = self._put_above(node, shared)
            self._ends[node] = (end, *ends[: MAX_VOTES - 1])
            if shared == len(tail):
                return
            key = _key_below(node, tail[-shared - 1])
        self._nodes[key] = self._new_node(len(tail), (end,))

    def _num_shared(self, tail: list[int], end: int, most: int) -> int:
        """Number of tokens up to ``end`` that equal the last ones of ``tail``; 0..most."""
        gram = self.tokens[end + 1 - most : end + 1]
        if gram == tail[-most:]:
            return most
        num = 0
        while gram[-num - 1] == tail[-num - 1]:
            num += 1
        return num

    def _put_above(self, node: int, length: int) -> int:
        """New parent of ``node`` that takes its n-grams up to ``length``."""
        ends = self._ends[node]
        above = self._new_node(length, ends)
        self._nodes[_key_below(above, self.tokens[ends[0] - length])] = node
        return above

    def _new_node(self, length: int, ends: tuple[int, ...]) -> int:
        self._lengths.append(length)
        self._ends.append(ends)
        return len(self._ends) - 1


def _key_below(node: int, token: int) -> int:
    """Key of the node that ``token`` leads to from ``node``."""
    return node << 32 | token
