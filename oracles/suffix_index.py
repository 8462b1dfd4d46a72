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

How: a request's own text is a suffix tree, which grows with it and finds the longest match in one
descent of at most max_match nodes. It takes 16 to 230 bytes per token for min_match=2 and
max_match=12, least where the text repeats itself. Finished traffic is in hash chains, as in zlib:
for every length n in min_match..max_match a table maps the hash of an n-gram to its latest
position, and every position to the one before it with the same hash. Positions only increase and
index a ring, so an evicted position is one that is too old: nothing is ever deleted, and memory is
fixed, about 100 bytes per token (40 MB at the default recent_tokens).

Lazy: following a request only stores its tokens, and a finished one only waits. A lookup first
indexes what waits and links the tokens of its own request, so an index that nobody asks costs next
to nothing, and the first lookup after a rest pays for the rest. Where nobody asks for long, older
finished sequences are skipped (``recent.py``). Answers depend on the text and on what kinds are
worth, not on when they were asked for, unless sequences were skipped.

Measured in CPython 3.11 on one of two busy cores, lengths 2..12, source code in pieces of 800
tokens, thread time, median of 5, where other work doubles any figure: 0.5 us to commit a token that
nobody asks for, in calls of two, and 0.03 us per token of a prompt; 3 us to link a token, and 7 us
where all tokens are the same; 10 us to match in the request alone, 25 us with 80,000 recent tokens;
12 us to propose 8 tokens from the request alone, 20 us from recent ones; 0.01 us per token to
finish, and 1 to 1.6 us to index it (vectorised, all that waits at once).

Source: Saxena 2023, prompt lookup decoding; Oliaro et al. 2024, SuffixDecoding, arXiv:2411.04975.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from drafters.protocol import Traits
from drafters.suffix.kinds import PRIOR_ACCEPTANCE, least_better, number_of
from drafters.suffix.traits import TRAITS
from oracles.suffix_recent import END, MASK, RecentText
from oracles.suffix_running import RunningText


@dataclass(frozen=True, slots=True)
class _Match:
    """Where a suffix occurred."""

    kind: int
    """Number of its kind; 0: it occurred nowhere."""
    is_own: bool
    """In the request itself, else in finished traffic."""
    slots: Sequence[int]
    """Indices of its last token, latest first."""


_NO_MATCH = _Match(0, is_own=True, slots=())


class _Own:
    """One running request."""

    def __init__(self, tokens: Sequence[int], namespace: str, min_match: int, max_match: int):
        self.namespace = namespace
        self.seed = zlib.crc32(namespace.encode()) & MASK
        self.text = RunningText(tokens, min_match, max_match)
        self.match = _NO_MATCH
        self.num_matched = 0
        """Number of tokens when ``match`` was found."""
        self.most_recent = 0
        """No match in finished traffic was longer then."""
        self.generation: int | None = None
        """Generation of the finished traffic at that time,"""
        self.values: list[float] | None = None
        """and the values of kinds."""


class PlainSuffixIndex:
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
        self._running: dict[str, _Own] = {}
        self._values = list(PRIOR_ACCEPTANCE)
        self._least: dict[int, int | None] = {}
        """``least_better`` of these values, by kind."""

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
        self._running[key] = _Own(tokens, namespace, self._min_match, self._max_match)

    def extend(self, keys: Sequence[str], news: Sequence[Sequence[int]]) -> None:
        """Append committed tokens to some requests. They are stored, and indexed when the request
        is looked up."""
        for key, tokens in zip(keys, news, strict=True):
            self._own(key).text.tokens += tokens

    def finish(self, key: str, keep: bool, num_tokens: int | None = None) -> None:
        """Stop following a request.

        Args:
            keep: its tokens wait to be indexed with the recent traffic; otherwise they are dropped.
            num_tokens: its length, if it ended before the last tokens that were appended.
        """
        own = self._own(key)
        del self._running[key]
        if keep:
            self._recent.add(own.text.tokens[:num_tokens], own.namespace, own.seed)

    def catch_up(self) -> None:
        """Index the finished sequences that wait. Every lookup does that first."""
        self._recent.catch_up()

    def rank(self, values: Sequence[float] | None) -> None:
        """Of two matches of a request, continue the one whose kind has the higher value from now
        on.

        Args:
            values: by number of the kind; ``None``: the prior acceptance of each.
        """
        self._values = list(PRIOR_ACCEPTANCE if values is None else values)
        self._least.clear()

    def observe(self, keys: Sequence[str]) -> list[int]:
        """Kind of the match of each request that is to be continued: the number in ``kinds.KINDS``,
        0 if nothing of min_match tokens or more occurred before."""
        return [self._current_match(self._own(key)).kind for key in keys]

    def propose(self, keys: Sequence[str], most: Sequence[int]) -> list[list[int]]:
        """Token ids that followed the best match of each request; empty without a match.

        Args:
            most: largest number of tokens for each request.
        """
        return [self._propose(self._own(key), k) for key, k in zip(keys, most, strict=True)]

    def _propose(self, own: _Own, k: int) -> list[int]:
        draft: list[int] = []
        if k == 0:
            return draft
        match = self._current_match(own)
        while len(draft) < k and match.kind:
            self._continue(own, match, draft, k)
            if len(draft) < k:  # finished sequences ended here: look up the proposal itself
                tail = (own.text.tokens[-self._max_match :] + draft)[-self._max_match :]
                match, _ = self._search(own, tail, self._max_match)
        return draft

    def _own(self, key: str) -> _Own:
        own = self._running.get(key)
        if own is None:
            raise ValueError(f"no sequence {key!r} is running; begin it first")
        return own

    def _current_match(self, own: _Own) -> _Match:
        """The best match, cached so that ``observe`` and ``propose`` of a step search once."""
        self._recent.catch_up()
        tokens, generation = own.text.tokens, self._recent.generation
        most_recent = self._max_match
        if own.generation == generation:
            # A match grows by at most one token per new token.
            new = len(tokens) - own.num_matched
            if not new and own.values is self._values:
                return own.match
            most_recent = max(own.most_recent, self._min_match - 1) + new
        own.match, own.most_recent = self._search(own, tokens[-self._max_match :], most_recent)
        own.num_matched, own.generation, own.values = len(tokens), generation, self._values
        return own.match

    def _search(self, own: _Own, tail: list[int], most_recent: int) -> tuple[_Match, int]:
        """The better one of the longest match in the request and the longest in finished traffic,
        the request's own on ties; and a length that no match in finished traffic exceeds.

        Args:
            most_recent: no match in finished traffic is longer.
        """
        best = _NO_MATCH
        length, slots = own.text.find(tail)
        if length:
            tokens = own.text.tokens
            kind = number_of(length, True, [tokens[slot + 1] for slot in slots])
            best = _Match(kind, is_own=True, slots=slots)
        least = self._least_better(best.kind)
        if least is None or least > most_recent:
            return best, most_recent
        length, ends = self._recent.find(tail, own.seed, (least, most_recent), own.namespace)
        if not length:
            return best, max(least, self._min_match) - 1
        ends = [self._recent.slot(end) for end in ends]
        view = self._recent.token_view
        kind = number_of(length, False, [view[end + 1] for end in ends])
        if not best.kind or self._values[kind] > self._values[best.kind]:
            best = _Match(kind, is_own=False, slots=ends)
        return best, length

    def _least_better(self, kind: int) -> int | None:
        if kind not in self._least:
            self._least[kind] = least_better(self._values, kind)
        return self._least[kind]

    def _continue(self, own: _Own, match: _Match, draft: list[int], k: int) -> None:
        """Append to ``draft`` what followed the match, until k or until every occurrence ended.

        The request's own occurrences never end: they run on into the draft itself, as in LZ77.
        """
        view = own.text.tokens if match.is_own else self._recent.token_view
        slots, offset = match.slots, 0
        if run := _agreed(view, slots, k - len(draft)):
            draft += run
            return
        while len(draft) < k:
            offset += 1
            if match.is_own:
                over = offset - len(view)
                tokens = [
                    view[slot + offset] if slot + over < 0 else draft[slot + over] for slot in slots
                ]
            else:
                tokens = [view[slot + offset] for slot in slots]
            chosen = _most_frequent(tokens)
            if chosen is None:
                return
            draft.append(chosen)
            slots = [slot for slot, token in zip(slots, tokens, strict=True) if token == chosen]


def _agreed(view: Sequence[int], slots: Sequence[int], num: int) -> list[int]:
    """The ``num`` tokens that follow every slot; empty if they differ or a sequence ends."""
    run = view[slots[0] + 1 : slots[0] + 1 + num]
    if len(run) < num or any(view[slot + 1 : slot + 1 + num] != run for slot in slots[1:]):
        return []
    return [] if END in run else list(run)


def _most_frequent(tokens: list[int]) -> int | None:
    """The most frequent token, the first on ties; ``None`` if all sequences ended."""
    if tokens[0] != END and tokens.count(tokens[0]) * 2 >= len(tokens):
        return tokens[0]
    counts = Counter(token for token in tokens if token != END)
    return counts.most_common(1)[0][0] if counts else None
