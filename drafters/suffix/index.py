"""The training-free drafter: proposes what followed the last few tokens when they occurred before.

Two texts are searched: the request itself, and recent finished traffic. The longest match wins, the
request's own on ties. Among the latest occurrences of that match, the most frequent next token is
proposed (the latest on ties), and so on, token by token.

``suffix`` searches both, ``suffix_request`` the request alone.

Privacy: finished traffic is shared by all requests of one *namespace*, so a draft may follow text
of another user. Only a token that the target itself chose is ever committed, so no text leaks into
outputs, but acceptance, hence timing, depends on it. ``recent_tokens=0`` keeps every request to
itself; a namespace per tenant keeps tenants apart; ``finish(key, keep=False)`` leaves no trace.

How: the texts of running requests are rows of one table (``running.py``), in which positions behind
the same min_match tokens form a chain; a lookup follows the chain of the last tokens and compares
what lies before them. Finished traffic is in hash chains, as in zlib: for every length n in
min_match..max_match a table maps the hash of an n-gram to its latest position, and every position
to the one before it with the same hash (``recent.py``). Positions only increase and index a ring,
so an evicted position is one that is too old: nothing is ever deleted, and memory is fixed, about
100 bytes per token (40 MB at the default recent_tokens).

All lookups of a batch are one call (``lookups.py``), which numba compiles if it is installed.

Lazy: following a request only stores its tokens, and a finished one only waits. A lookup first
indexes what waits and links the tokens of its own request, so an index that nobody asks costs next
to nothing, and the first lookup after a rest pays for the rest. Where nobody asks for long, older
finished sequences are skipped (``recent.py``). Answers depend on the text alone, not on when they
were asked for, unless sequences were skipped.

Source: Saxena 2023, prompt lookup decoding; Oliaro et al. 2024, SuffixDecoding, arXiv:2411.04975.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from drafters.protocol import DrafterContext, DrafterKind, Traits
from drafters.suffix import lookups
from drafters.suffix.lookups import MASK
from drafters.suffix.recent import RecentText, number_of
from drafters.suffix.running import RunningTexts

log = logging.getLogger(__name__)

TRAITS = Traits(
    is_neural=False,
    learns=False,
    needs_match=True,
    draws=False,
    shares_text=True,
    prior_acceptance=(0.0, 0.35, 0.45, 0.55, 0.7, 0.8),
    prior_draft_cost=0.005,
)
REQUEST_TRAITS = replace(TRAITS, shares_text=False)


class SuffixIndex:
    """Suffix lookup for running requests over themselves and over recent finished ones. A
    ``HostDrafter``."""

    version = 0

    def __init__(
        self,
        min_match: int,
        max_match: int,
        recent_tokens: int,
        kind: str = "suffix",
        traits: Traits = TRAITS,
    ) -> None:
        """
        Args:
            min_match: shortest suffix looked up, >= 1.
            max_match: longest suffix looked up, >= min_match.
            recent_tokens: maximum number of tokens of finished sequences, including a separator for
                each; 0 shares nothing between requests.
            kind: its name in the catalog.
        """
        if not 1 <= min_match <= max_match:
            raise ValueError(f"need 1 <= min_match <= max_match, got {min_match} and {max_match}")
        if recent_tokens < 0:
            raise ValueError(f"recent_tokens must be >= 0, got {recent_tokens}")
        self.kind = kind
        self.traits = traits
        self._min_match = min_match
        self._max_match = max_match
        self._recent = RecentText(recent_tokens, min_match, max_match)
        self._texts = RunningTexts()
        self._running: dict[str, tuple[int, str]] = {}
        """Key of a running request -> its row and namespace."""
        self.num_searched = 0
        """Lookups that found something new to search, since the start."""

    @property
    def num_recent_tokens(self) -> int:
        """Tokens of finished sequences that are indexed."""
        return self._recent.num_tokens

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens of finished sequences that the next lookup, or ``catch_up``, will index."""
        return self._recent.num_waiting_tokens

    @property
    def num_skipped_sequences(self) -> int:
        """Finished sequences that were never indexed, because newer ones took their place before
        anybody asked, since the start."""
        return self._recent.num_skipped_sequences

    @property
    def num_skipped_tokens(self) -> int:
        return self._recent.num_skipped_tokens

    @property
    def num_recent_sequences(self) -> int:
        """Finished sequences that are indexed."""
        return self._recent.num_sequences

    @property
    def num_evicted_sequences(self) -> int:
        """Indexed sequences evicted to make room for newer ones, since the start."""
        return self._recent.num_evicted_sequences

    @property
    def num_evicted_tokens(self) -> int:
        return self._recent.num_evicted_tokens

    @property
    def num_running(self) -> int:
        return len(self._running)

    def begin(self, key: str, tokens: Sequence[int], namespace: str = "") -> None:
        """Start following a request. Its prompt is stored, and indexed when it is looked up.

        Args:
            key: id of the request among the running ones.
            tokens: token ids of the prompt, each >= 0.
            namespace: only finished sequences of the same namespace are searched.
        """
        if key in self._running:
            raise ValueError(f"sequence {key!r} has begun already")
        row = self._texts.take(tokens, _seed_of(namespace), number_of(namespace))
        self._running[key] = row, namespace

    def extend(self, keys: Sequence[str], news: Sequence[Sequence[int]]) -> None:
        """Append committed tokens to some requests. They are stored, and indexed when the request
        is looked up."""
        self._texts.extend(self._rows(keys), news)

    def finish(self, key: str, keep: bool, num_tokens: int | None = None) -> None:
        """Stop following a request.

        Args:
            keep: its tokens wait to be indexed with the recent traffic; otherwise they are dropped.
            num_tokens: its length, if it ended before the last tokens that were appended.
        """
        [row] = self._rows([key])
        _, namespace = self._running.pop(key)
        if keep:
            tokens = self._texts.tokens(row)[:num_tokens]
            self._recent.add(tokens, namespace, _seed_of(namespace))
        self._texts.give_back(row)

    def catch_up(self) -> None:
        """Index the finished sequences that wait. Every lookup does that first."""
        self._recent.catch_up()

    def observe(self, keys: Sequence[str]) -> list[int]:
        """Tokens of the longest suffix of each request that occurred before, 0 if shorter than
        min_match."""
        lengths: list[int] = self._texts.matches.lengths_S[self._matched(keys)].tolist()
        return lengths

    def propose(self, keys: Sequence[str], most: Sequence[int]) -> list[list[int]]:
        """Token ids that followed the longest match of each request; empty without a match.

        Args:
            most: largest number of tokens for each request.
        """
        if not keys:
            return []
        rows, recent, running = self._matched(keys), self._recent, self._texts
        most_R = np.array(most, np.int64)
        drafts_RK = np.zeros((len(rows), max(1, most_R.max())), np.int64)
        lens = lookups.propose(
            rows, most_R, running.texts, recent.ring, running.matches, recent.oldest,
            self._min_match, self._max_match, drafts_RK,
        )  # fmt: skip
        return [row[:num] for row, num in zip(drafts_RK.tolist(), lens.tolist(), strict=True)]

    def _rows(self, keys: Sequence[str]) -> list[int]:
        try:
            return [self._running[key][0] for key in keys]
        except KeyError as error:
            raise ValueError(f"no sequence {error} is running; begin it first") from None

    def _matched(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Rows of some requests, whose matches are now known."""
        recent, running = self._recent, self._texts
        recent.catch_up()
        rows = np.array(self._rows(keys), np.int64)
        self.num_searched += lookups.find(
            rows, running.texts, recent.ring, running.matches, recent.oldest, recent.generation,
            self._min_match, self._max_match,
        )  # fmt: skip
        return rows


def _seed_of(namespace: str) -> int:
    """First value of the hashes of a namespace, so that its n-grams have chains of their own."""
    return zlib.crc32(namespace.encode()) & MASK


def build(context: DrafterContext) -> SuffixIndex:
    """An empty index with the bounds of ``drafter.suffix``."""
    s = context.settings.suffix
    return _ready(SuffixIndex(s.min_match, s.max_match, s.recent_tokens))


def build_for_request(context: DrafterContext) -> SuffixIndex:
    """An index that searches each request alone, whatever ``recent_tokens`` is."""
    s = context.settings.suffix
    return _ready(SuffixIndex(s.min_match, s.max_match, 0, "suffix_request", REQUEST_TRAITS))


def _ready(index: SuffixIndex) -> SuffixIndex:
    """Look something up, so that lookups are compiled before anybody waits for them."""
    if not lookups.ARE_COMPILED:
        log.info(
            "numba is not installed, so drafter %r looks matches up in plain Python; "
            "pip install 'slipstream-serving[lookup]' makes that several times as fast",
            index.kind,
        )
        return index
    started = time.perf_counter()
    index.begin("", [0])
    index.propose([""], [1])
    index.finish("", keep=False)
    log.info(
        "compiled the lookups of drafter %r in %.1f s", index.kind, time.perf_counter() - started
    )
    return index


KIND = DrafterKind(TRAITS, build)
REQUEST_KIND = DrafterKind(REQUEST_TRAITS, build_for_request)
