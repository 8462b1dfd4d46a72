"""What a batch is drawn by: the training samples held, their visits and what else a rule of drawing
sees of them, in columns. New samples cost no look at those held before, of which there may be
thousands.

Shapes: N samples with P pieces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from drafters.samples import Sample
from trainer.packing import HeldPiece
from trainer.rows import HeldSample, pages_of


@dataclass(frozen=True, eq=False)
class Turns:
    """Training samples held, and how many batches each was in."""

    samples: tuple[HeldSample, ...] = ()
    """Recent ones first."""
    facts: npt.NDArray[np.int64] = field(default_factory=lambda: _facts_of([], {}, {}))
    """[8, N], see ``_Fact``."""
    surprise: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """[N]; NaN if unknown."""

    @classmethod
    def of(
        cls, samples: Iterable[HeldSample], visits: dict[str, int], arrived: dict[str, int]
    ) -> Turns:
        """Turns of these samples, whose visits and arrivals are known by key."""
        held = tuple(samples)
        return cls(held, _facts_of(held, visits, arrived), _surprise_of(held))

    def chosen(
        self, places: npt.NDArray[np.int64], new: Sequence[HeldSample | Sample], arrived: int
    ) -> Turns:
        """Those at some places of these and of new samples behind them.

        Args:
            new: of those that are chosen, the rows are in the store.
            arrived: training samples that had arrived before the first new one.
        """
        numbers = {x.key: arrived + at for at, x in enumerate(new)}
        every: tuple[Any, ...] = (*self.samples, *new)
        facts = np.concatenate((self.facts, _facts_of(new, {}, numbers)), axis=1)
        surprise = np.concatenate((self.surprise, _surprise_of(new)))
        samples = tuple(map(every.__getitem__, places.tolist()))
        return Turns(samples, facts[:, places], surprise[places])

    @property
    def visits(self) -> npt.NDArray[np.int64]:
        """[N] batches that each was in; ``Memory.draw`` counts in it."""
        return self._fact(_Fact.VISITS)

    @property
    def arrived(self) -> npt.NDArray[np.int64]:
        """[N] how many training samples had arrived before each."""
        return self._fact(_Fact.ARRIVED)

    @property
    def num_pieces(self) -> npt.NDArray[np.int64]:
        """[N]."""
        return self._fact(_Fact.NUM_PIECES)

    @property
    def num_pages(self) -> npt.NDArray[np.int64]:
        """[N]."""
        return self._fact(_Fact.NUM_PAGES)

    @property
    def versions(self) -> npt.NDArray[np.int64]:
        """[N] version of the newest draft; -1: there is none."""
        return self._fact(_Fact.VERSION)

    def _fact(self, which: _Fact) -> npt.NDArray[np.int64]:
        row: npt.NDArray[np.int64] = self.facts[which]
        return row

    def most_within(self, num_tokens: int) -> int:
        """More samples than this, one piece of each, have more positions than these, but for the
        last one."""
        return int(np.searchsorted(self._shortest_sums, num_tokens, "right")) + 1

    @cached_property
    def _shortest_sums(self) -> npt.NDArray[np.int64]:
        """[N] positions of so many shortest pieces."""
        sums: npt.NDArray[np.int64] = np.sort(self.facts[_Fact.SHORTEST]).cumsum()
        return sums

    def arrivals(self) -> dict[str, int]:
        """``arrived`` by key."""
        return dict(zip((x.key for x in self.samples), self.arrived.tolist(), strict=True))

    def by_key(self) -> dict[str, int]:
        """Visits of the samples that had any."""
        pairs = zip(self.samples, self.visits.tolist(), strict=True)
        return {sample.key: n for sample, n in pairs if n}

    @cached_property
    def tenants(self) -> npt.NDArray[np.int64]:
        """[N] number of each sample's tenant."""
        return _numbered(self.facts[_Fact.TENANT])

    @cached_property
    def domains(self) -> npt.NDArray[np.int64]:
        """[N] number of each sample's domain."""
        return _numbered(self.facts[_Fact.DOMAIN])

    @cached_property
    def pieces(self) -> tuple[HeldPiece, ...]:
        """[P] pieces of one sample after another."""
        return tuple(piece for sample in self.samples for piece in sample.pieces)

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """[2, P] rows with a loss, and positions, of ``pieces``."""
        sizes = [(len(piece.rows), len(piece.slots)) for piece in self.pieces]
        return np.array(sizes, dtype=np.int64).reshape(-1, 2).T


class _Fact(IntEnum):
    """Rows of ``Turns.facts``."""

    VISITS = 0
    ARRIVED = 1
    NUM_PIECES = 2
    NUM_PAGES = 3
    VERSION = 4
    TENANT = 5
    """A digest of its name, as ``DOMAIN``."""
    DOMAIN = 6
    SHORTEST = 7
    """Positions of its shortest piece."""


def _facts_of(
    samples: Sequence[HeldSample | Sample], visits: dict[str, int], arrived: dict[str, int]
) -> npt.NDArray[np.int64]:
    """[8, N]."""
    rows = [
        (
            visits.get(x.key, 0),
            arrived.get(x.key, 0),
            len(x.pieces),
            num_pages_of(x),
            -1 if x.version is None else x.version,
            _digest_of(x.tenant),
            _digest_of(x.domain),
            _shortest(x),
        )
        for x in samples
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, len(_Fact)).T


def _surprise_of(samples: Sequence[HeldSample | Sample]) -> npt.NDArray[np.float64]:
    return np.array([x.surprise for x in samples], dtype=np.float64)


def num_pages_of(sample: HeldSample | Sample) -> int:
    """Pages that a sample takes in the store, or will."""
    return len(sample.pages) if isinstance(sample, HeldSample) else pages_of(sample)


def _shortest(sample: HeldSample | Sample) -> int:
    if isinstance(sample, HeldSample):
        return min(len(piece.slots) for piece in sample.pieces)
    return min(piece.stop - piece.start for piece in sample.pieces)


@lru_cache(maxsize=1024)
def _digest_of(name: str) -> int:
    """An int64 that stands for a name."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _numbered(digests_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Numbers from 0 instead of digests, in the order in which these appear."""
    _, first, which_N = np.unique(digests_N, return_index=True, return_inverse=True)
    numbers = np.empty_like(first)
    numbers[np.argsort(first)] = np.arange(len(first))
    return numbers[which_N]
