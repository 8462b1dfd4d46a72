"""Text of a running request: a suffix tree that grows with it."""

from __future__ import annotations

from collections.abc import Sequence

from oracles.suffix_recent import MAX_VOTES


class RunningText:
    """A running request's tokens, and where its n-grams have occurred: the suffix tree of the text
    read backwards, ``max_match`` tokens deep.

    A node stands for n-grams that end at the same positions, and keeps the latest of those.
    Its longest n-gram is as long as ``_lengths`` says; its shortest is one token longer than the
    longest of its parent, and that one token leads from the parent to it. The last token of the
    text is stored but not yet linked: it has no continuation.

    The tree lags behind the text until ``find`` asks for it: storing a token costs next to nothing.
    """

    def __init__(self, tokens: Sequence[int], min_match: int, max_match: int) -> None:
        self.tokens = list(tokens)
        self._num_linked = 0
        self._min_match = min_match
        self._max_match = max_match
        # Nodes are numbers, not objects, so that garbage collection has nothing to visit.
        self._nodes: dict[tuple[int, ...] | int, int] = {}
        self._lengths: list[int] = []
        self._ends: list[tuple[int, ...]] = []

    @property
    def num_nodes(self) -> int:
        """Nodes of the tree: at most two for every linked token."""
        return len(self._ends)

    def find(self, tail: list[int]) -> tuple[int, tuple[int, ...]]:
        """Length of the longest suffix of ``tail`` that has occurred, and where it ends, latest
        first. Links the tokens stored since the last call.

        Args:
            tail: the last ``max_match`` tokens (or all) of the text, or of the text and a draft.
        """
        self._catch_up()
        found: tuple[int, tuple[int, ...]] = (0, ())
        key: tuple[int, ...] | int = tuple(tail[-self._min_match :])
        known = self._min_match
        while (node := self._nodes.get(key)) is not None:
            length, ends = self._lengths[node], self._ends[node]
            shared = self._num_shared(tail, len(tail), ends[0] + 1, known, length)
            found = shared, ends
            if shared < length or shared == len(tail):
                break
            key, known = _key_below(node, tail[-shared - 1]), shared + 1
        return found

    def _catch_up(self) -> None:
        """Link all tokens that have a continuation."""
        linked = max(len(self.tokens) - 1, 0)
        for end in range(max(self._num_linked, self._min_match - 1), linked):
            self._link(end)
        self._num_linked = linked

    def _link(self, end: int) -> None:
        """Enter the n-grams that end at ``end``: follow those that occurred before, and add a node
        where they stop."""
        tokens, nodes = self.tokens, self._nodes
        stop, known = end + 1, self._min_match
        deepest = min(self._max_match, stop)
        key: tuple[int, ...] | int = tuple(tokens[stop - known : stop])
        while (node := nodes.get(key)) is not None:
            length, ends = self._lengths[node], self._ends[node]
            if known < length:  # else the token of the key is all that the node adds
                shared = self._num_shared(tokens, stop, ends[0] + 1, known, length)
                if shared < length:
                    node = nodes[key] = self._put_above(node, shared)
                known = shared
            if len(ends) < MAX_VOTES:
                self._ends[node] = (end, *ends)
            else:  # spelled out, because slicing takes 180 ns more
                latest, second, third, _ = ends
                self._ends[node] = (end, latest, second, third)
            if known == deepest:
                return
            key = _key_below(node, tokens[end - known])
            known += 1
        nodes[key] = self._new_node(deepest, (end,))

    def _num_shared(self, tail: list[int], size: int, stop: int, known: int, most: int) -> int:
        """Number of tokens before ``stop`` that equal the last ones of ``tail[:size]``.

        Args:
            known: number known to be equal.
            most: number to compare at most.
        """
        tokens = self.tokens
        while known < most and tokens[stop - known - 1] == tail[size - known - 1]:
            known += 1
        return known

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
