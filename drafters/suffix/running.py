"""Texts of the running requests: rows of one table, which grows with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drafters.suffix.lookups import MAX_VOTES, Counts, Matches, Texts

_ROWS, _LENGTH = 8, 1024
"""Rows and tokens of a row that the table begins with; both double when they do not suffice."""


class RunningTexts:
    """A row for each request that is followed."""

    def __init__(self) -> None:
        self.texts = _new_texts(_ROWS, _LENGTH)
        self.matches = _new_matches(_ROWS)
        self._free = list(range(_ROWS - 1, -1, -1))

    def take(self, tokens: Sequence[int], seed: int, namespace: int) -> int:
        """Store the text of a new request; returns its row."""
        if not self._free:
            self._add_rows()
        row = self._free.pop()
        texts = self.texts
        texts.lengths_S[row] = texts.linked_S[row] = 0
        texts.heads_SH[row] = -1
        texts.seeds_S[row], texts.namespaces_S[row] = seed, namespace
        self.matches.at_S[row] = -1
        self.extend([row], [tokens])
        return row

    def give_back(self, row: int) -> None:
        """Forget a text."""
        self._free.append(row)

    def extend(self, rows: Sequence[int], news: Sequence[Sequence[int]]) -> None:
        """Append tokens to some texts, each of them named once."""
        rows_R = np.array(rows, np.int64)
        counts_R = np.fromiter(map(len, news), np.int64, len(news))
        starts_R = self.texts.lengths_S[rows_R]
        ends_R = starts_R + counts_R
        if not counts_R.any():
            return
        if ends_R.max() > self.texts.tokens_SL.shape[1]:
            self._lengthen(int(ends_R.max()))
        flat = np.fromiter(chain.from_iterable(news), np.int32)
        before_R = np.cumsum(counts_R) - counts_R
        at = np.arange(len(flat)) + np.repeat(starts_R - before_R, counts_R)
        self.texts.tokens_SL[np.repeat(rows_R, counts_R), at] = flat
        self.texts.lengths_S[rows_R] = ends_R

    def tokens(self, row: int) -> list[int]:
        """A whole text."""
        tokens: list[int] = self.texts.tokens_SL[row, : self.texts.lengths_S[row]].tolist()
        return tokens

    def _add_rows(self) -> None:
        num_rows, length = self.texts.tokens_SL.shape
        texts, matches = _new_texts(2 * num_rows, length), _new_matches(2 * num_rows)
        _copy([*self.texts, *self.matches], [*texts, *matches])
        self.texts, self.matches = texts, matches
        self._free = list(range(2 * num_rows - 1, num_rows - 1, -1))

    def _lengthen(self, least: int) -> None:
        """Make room for longer texts. The chains are too few now, so the next lookup links anew."""
        num_rows, length = self.texts.tokens_SL.shape
        while length < least:
            length *= 2
        former, self.texts = self.texts, _new_texts(num_rows, length)
        for name in ("tokens_SL", "lengths_S", "seeds_S", "namespaces_S"):
            old = getattr(former, name)
            getattr(self.texts, name)[tuple(map(slice, old.shape))] = old


def _new_texts(num_rows: int, length: int) -> Texts:
    def zeros() -> Counts:
        return np.zeros(num_rows, np.int64)

    return Texts(
        tokens_SL=np.zeros((num_rows, length), np.int32),
        lengths_S=zeros(),
        linked_S=zeros(),
        heads_SH=np.full((num_rows, length // 2), -1, np.int32),
        before_SL=np.zeros((num_rows, length), np.int32),
        seeds_S=zeros(),
        namespaces_S=zeros(),
    )


def _new_matches(num_rows: int) -> Matches:
    def zeros() -> Counts:
        return np.zeros(num_rows, np.int64)

    return Matches(
        lengths_S=zeros(),
        are_own_S=np.zeros(num_rows, np.bool_),
        counts_S=zeros(),
        slots_SV=np.zeros((num_rows, MAX_VOTES), np.int64),
        at_S=np.full(num_rows, -1, np.int64),
        generations_S=zeros(),
    )


def _copy(old: Iterable[NDArray[Any]], new: Iterable[NDArray[Any]]) -> None:
    """Copy rows to tables with more of them."""
    for source, table in zip(old, new, strict=True):
        table[: len(source)] = source
