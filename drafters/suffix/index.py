"""The training-free drafter: proposes what followed the last few tokens when they occurred before.

Two texts are searched: the request itself, and recent finished traffic. Each gives its longest
match, and the one of the better *kind* wins, the request's own on ties. The kind of a match is
where it was found, how long it is, and whether its occurrences agree (``kinds.py``). The policy
learns what each kind is worth and says so (``rank``); until then their prior acceptance decides.
Among the latest occurrences of the match that wins, the most frequent next token is proposed (the
latest on ties), and so on, token by token.

``suffix`` searches both, ``suffix_request`` the request alone.

Privacy: finished traffic is shared by all requests of one *namespace*, so a draft may follow text
of another user. Only a token that the target itself chose is ever committed, so no text leaks into
outputs, but acceptance, hence timing, depends on it. ``recent_tokens=0`` keeps every request to
itself; a namespace per tenant keeps tenants apart; ``finish(key, keep=False)`` leaves no trace.

How: everything lies in flat arrays, and one compiled call searches for a whole batch (``native``).
Both texts are in hash chains: for a length n in min_match..max_match a table maps the hash of an
n-gram to its latest position, and every position to the one before it with the same hash. A request
takes 36 to 110 bytes per token, in blocks that are used again. Finished traffic is a ring, so an
evicted position is one that is too old: nothing is ever deleted, and memory is fixed, about 126
bytes per token (50 MB for 400,000 tokens).

Lazy: following a request only stores its tokens, and a finished one only waits. A lookup first
indexes what waits and links the tokens of its own request, so an index that nobody asks costs next
to nothing, and the first lookup after a rest pays for the rest. Where somebody does ask, a finished
sequence is indexed at once: a server finishes requests while the device works. Where nobody asks
for long, older finished sequences are skipped (``recent.py``). Answers depend on the text and on
what kinds are worth, not on when they were asked for, unless sequences were skipped.

Before the compiled code is there, in the first second of a process, and in the first ten of the
first one on a machine, the index only stores text and finds no match (``compiled``).

Figures: docs/performance.md, by ``benchmarks/index.py``.

Source: Saxena 2023, prompt lookup decoding; Oliaro et al. 2024, SuffixDecoding, arXiv:2411.04975.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from drafters.protocol import DrafterContext, DrafterKind, Traits
from drafters.suffix import compiled, on_device
from drafters.suffix.kinds import PRIOR_ACCEPTANCE, table
from drafters.suffix.layout import (
    LAP,
    LONGEST,
    MASK,
    NOW,
    NUM_ENTRIES,
    OLDEST,
    RING_SHIFT,
    SECRET,
    SEED,
    SHORTEST,
    SPACE,
    VERSION,
    shift_of,
)
from drafters.suffix.recent import Finished, Namespaces, RecentText
from drafters.suffix.running import RunningTexts
from drafters.suffix.traits import (
    DEVICE_REQUEST_TRAITS,
    DEVICE_TRAITS,
    REQUEST_TRAITS,
    TRAITS,
)

_MOST_EAGER = 16
"""Sequences that may finish after a lookup and are indexed at once."""


class SuffixIndex:
    """Suffix lookup for running requests over themselves and over recent finished ones. A
    ``HostDrafter`` that ``RanksMatches``."""

    version = 0

    def __init__(
        self,
        min_match: int,
        max_match: int,
        recent_tokens: int,
        kind: str = "suffix",
        traits: Traits = TRAITS,
        load: Callable[[], ModuleType | None] = compiled.wait,
    ) -> None:
        """
        Args:
            min_match: shortest suffix looked up, >= 1.
            max_match: longest suffix looked up, >= min_match.
            recent_tokens: maximum number of tokens of finished sequences, including a separator for
                each; 0 shares nothing between requests.
            kind: its name in the catalog.
            load: returns the compiled search, or ``None`` as long as it is not there.
        """
        if not 1 <= min_match <= max_match:
            raise ValueError(f"need 1 <= min_match <= max_match, got {min_match} and {max_match}")
        if recent_tokens < 0:
            raise ValueError(f"recent_tokens must be >= 0, got {recent_tokens}")
        self.kind = kind
        self.traits = traits
        self._load = load
        self._native: Any = load()
        self._namespaces = Namespaces()
        self._texts = RunningTexts(min_match, max_match)
        self._recent = RecentText(recent_tokens, max_match - min_match + 1, self._namespaces)
        self._names: dict[str, str] = {}
        """Namespace of each running request."""
        self._state = np.zeros(NUM_ENTRIES, np.int64)
        self._state[[SHORTEST, LONGEST, SECRET]] = min_match, max_match, self._texts.secret
        self._state[RING_SHIFT] = shift_of(self._recent.ring.heads.shape[1])
        self._values, self._kinds = np.array(PRIOR_ACCEPTANCE), np.array(table())
        self._out = np.zeros((2, 0), np.int64), np.zeros((0, 0), np.int64)
        """Kinds or lengths, largest lengths, and drafts of a batch."""
        self._num_unasked = _MOST_EAGER
        """Sequences that finished since the last lookup, or as many as suffice."""

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
        return len(self._texts)

    def begin(self, key: str, tokens: Sequence[int], namespace: str = "") -> None:
        """Start following a request. Its prompt is stored, and indexed when it is looked up.

        Args:
            key: id of the request among the running ones.
            tokens: token ids of the prompt, each >= 0.
            namespace: only finished sequences of the same namespace are searched.
        """
        space = self._namespaces.take(namespace)
        try:
            self._texts.begin(key, tokens, zlib.crc32(namespace.encode()) & MASK, space)
        except ValueError:
            self._namespaces.give_back(namespace)
            raise
        self._names[key] = namespace

    def extend(self, keys: Sequence[str], news: Sequence[Sequence[int]]) -> None:
        """Append committed tokens to some requests. They are stored, and indexed when the request
        is looked up."""
        self._texts.extend(keys, news, self._native)

    def finish(self, key: str, keep: bool, num_tokens: int | None = None) -> None:
        """Stop following a request.

        Args:
            keep: its tokens are indexed with the recent traffic, at once if somebody looked for
                matches of late; otherwise they are dropped.
            num_tokens: its length, if it ended before the last tokens that were appended.
        """
        row = self._texts.row(key)
        namespace = self._names.pop(key)
        if keep:
            tokens = self._texts.tokens(row)[:num_tokens].copy()
            space, seed = self._texts.table[row, [SPACE, SEED]].tolist()
            self._recent.add(Finished(tokens, namespace, space, seed))
        else:
            self._namespaces.give_back(namespace)
        self._texts.finish(key)
        self._num_unasked += 1
        if self._num_unasked <= _MOST_EAGER:
            self.catch_up()

    def catch_up(self) -> None:
        """Index the finished sequences that wait. Every lookup does that first."""
        if self._native is not None and self._recent.num_waiting_tokens:
            self._recent.catch_up(self._native, self._state)
            self._state[[OLDEST, NOW, LAP]] = (
                self._recent.oldest, self._recent.generation, self._recent.lap,
            )  # fmt: skip

    def rank(self, values: Sequence[float] | None) -> None:
        """Of two matches of a request, continue the one whose kind has the higher value from now
        on.

        Args:
            values: by number of the kind; ``None``: the prior acceptance of each.
        """
        self._values[:] = PRIOR_ACCEPTANCE if values is None else values
        self._state[VERSION] += 1

    def observe(self, keys: Sequence[str]) -> list[int]:
        """Kind of the match of each request that is to be continued: the number in ``kinds.KINDS``,
        0 if nothing of min_match tokens or more occurred before."""
        rows, num = self._texts.rows(keys), len(keys)
        if not self._is_ready():
            return [0] * num
        (kinds, _), _ = self._buffers(num, 0)
        self._native.look(
            self._texts.arena, self._texts.table, rows, *self._recent.ring, self._state,
            self._values, self._kinds, kinds,
        )  # fmt: skip
        found: list[int] = kinds[:num].tolist()
        return found

    def propose(self, keys: Sequence[str], most: Sequence[int]) -> list[list[int]]:
        """Token ids that followed the best match of each request; empty without a match.

        Args:
            most: largest number of tokens for each request.
        """
        if len(keys) != len(most):
            raise ValueError(f"{len(keys)} sequences, but {len(most)} largest numbers")
        rows, num = self._texts.rows(keys), len(keys)
        k = max(most, default=0)
        if not k or not self._is_ready():
            return [[] for _ in keys]
        (lens, largest), drafts = self._buffers(num, k)
        largest[:num] = k if most.count(k) == num else most
        self._native.draft(
            self._texts.arena, self._texts.table, rows, *self._recent.ring, self._state,
            self._values, self._kinds, largest, lens, drafts,
        )  # fmt: skip
        # One list, then its parts: half the time of making a list of each row.
        flat = drafts[:num, :k].ravel().tolist()
        starts = range(0, num * k, k)
        return [flat[at : at + n] for at, n in zip(starts, lens[:num].tolist(), strict=True)]

    def _is_ready(self) -> bool:
        """Whether the search is there; what waits is indexed then."""
        if self._native is None:
            self._native = self._load()
            if self._native is None:
                return False
        self._num_unasked = 0
        self.catch_up()
        return True

    def _buffers(self, num: int, k: int) -> tuple[Any, Any]:
        """Room for the answers for so many requests, and drafts of so many tokens."""
        pairs, drafts = self._out
        if pairs.shape[1] < num or drafts.shape[1] < k:
            num, k = max(num, pairs.shape[1]), max(k, drafts.shape[1])
            self._out = np.zeros((2, num), np.int64), np.zeros((num, k), np.int64)
        return self._out


def build(context: DrafterContext) -> SuffixIndex:
    """An empty index with the bounds of ``drafter.suffix``. Its search is loaded in the
    background."""
    s = context.settings.suffix
    return SuffixIndex(s.min_match, s.max_match, s.recent_tokens, load=compiled.now)


def build_for_request(context: DrafterContext) -> SuffixIndex:
    """An index that searches each request alone, whatever ``recent_tokens`` is."""
    s = context.settings.suffix
    return SuffixIndex(
        s.min_match, s.max_match, 0, "suffix_request", REQUEST_TRAITS, load=compiled.now
    )


KIND = DrafterKind(TRAITS, build, on_device=DrafterKind(DEVICE_TRAITS, on_device.build))
REQUEST_KIND = DrafterKind(
    REQUEST_TRAITS,
    build_for_request,
    on_device=DrafterKind(DEVICE_REQUEST_TRAITS, on_device.build_for_request),
)
