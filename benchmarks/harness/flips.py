"""Counts seeded answers that change with the way they are decoded.

Each request is answered once by plain decoding; that is its first answer. Every other answer to it
is compared with the first one, token by token. An answer that was cut short, because time ran out
or the batch was cancelled, is the beginning of an answer: its tokens are compared, and its length
is not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.arms import LEARNED
from benchmarks.harness.loops import Feed, clear
from benchmarks.harness.policy import PolicySwitch
from benchmarks.harness.results import say
from policies.fixed import FixedPolicy
from serving.requests import Output, Request
from serving.service import Service

MOST_EXAMPLES = 20
"""Flips that are described one by one."""
SLOW_SHARE = 0.05
"""Of the time, for each way whose batch is too small to make many tokens."""
PASSES = 12
"""Answers to each request that ``count`` compares with the first one, at least."""


# Ways and answers


@dataclass(frozen=True, slots=True)
class Way:
    """One way to decode the same requests."""

    name: str
    batch: int
    draft_k: int | None
    """``None``: the policy chooses."""
    is_slow: bool = False
    """It gets a small part of the time, whatever it reaches in it."""


def ways(batch: int) -> list[Way]:
    """All ways; the first one is plain decoding with ``batch`` requests at a time."""
    return [
        Way("plain", batch, 0),
        Way("batch 1, plain", 1, 0, is_slow=True),
        Way("batch 8, K = 4", 8, 4, is_slow=True),
        *(Way(f"K = {k}", batch, k) for k in (1, 2, 4, 7)),
        Way("the policy's choice", batch, None),
        Way("batch 128, K = 4", 128, 4),
    ]


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens of one answer, or of its beginning."""

    tokens: tuple[int, ...]
    is_over: bool
    """It ended by itself; false if it was cut short."""


def differs_at(first: Answer, other: Answer) -> int | None:
    """Index of the first token that differs, where an end counts as a token; ``None``: nothing does
    as far as both go."""
    for place, (ours, theirs) in enumerate(zip(first.tokens, other.tokens, strict=False)):
        if ours != theirs:
            return place
    shorter, longer = sorted((first, other), key=lambda answer: len(answer.tokens))
    has_gone_on = len(longer.tokens) > len(shorter.tokens)
    return len(shorter.tokens) if shorter.is_over and has_gone_on else None


@dataclass(frozen=True, slots=True)
class Count:
    """Answers of one way beside the first ones. Join with ``+``."""

    answers: int = 0
    """Answers that were compared."""
    cut_short: int = 0
    """Of these, those of which only a beginning was compared."""
    tokens: int = 0
    """Tokens compared: up to the first difference of an answer, that one included, since all that
    follow have another prefix."""
    flips: int = 0
    """Answers that differ from the first one."""
    decoded: int = 0
    """Tokens decoded."""
    seconds: float = 0.0
    """Time of decoding."""
    accepted: int = 0
    """Draft tokens kept; none of them, and nothing was learnt about drafts."""

    def __add__(self, other: Count) -> Count:
        mine, theirs = asdict(self), asdict(other)
        return Count(**{name: mine[name] + theirs[name] for name in mine})

    @property
    def tokens_per_s(self) -> float | None:
        return self.decoded / self.seconds if self.seconds else None

    @property
    def flips_per_million(self) -> float | None:
        """Changed answers per million tokens compared."""
        return 1e6 * self.flips / self.tokens if self.tokens else None

    @property
    def flips_per_million_below(self) -> float | None:
        """Upper bound of ``flips_per_million`` at 95 % confidence, if flips are independent: 3 by
        the number of millions when there was none (Poisson)."""
        if not self.tokens:
            return None
        return 1e6 * _poisson_bound(self.flips) / self.tokens


def _poisson_bound(num: int) -> float:
    """The mean at which ``num`` events or fewer are seen in one case of twenty."""
    low, high = 0.0, 20.0 + 4.0 * num
    shape = torch.tensor(num + 1.0, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        chance = torch.special.gammaincc(shape, torch.tensor(middle, dtype=torch.float64))
        low, high = (middle, high) if chance > 0.05 else (low, middle)
    return high


def compare(first: Mapping[str, Answer], other: Mapping[str, Answer]) -> tuple[Count, list[Any]]:
    """Count over the answers that both have, and describe each flip."""
    done, flips = Count(), []
    for name in first.keys() & other.keys():
        ours, theirs = first[name], other[name]
        place = differs_at(ours, theirs)
        shared = min(len(ours.tokens), len(theirs.tokens))
        is_cut = not (ours.is_over and theirs.is_over)
        num = shared if place is None else place + 1
        done += Count(1, int(is_cut), num, int(place is not None))
        if place is not None:
            flips.append(
                {
                    "request": name,
                    "at": place,
                    "first": ours.tokens[place : place + 1],
                    "other": theirs.tokens[place : place + 1],
                }
            )
    return done, flips


# Decoding


@dataclass(slots=True)
class Side:
    """An engine that plays a fixed K, or its settings' own policy."""

    service: Service
    policy: PolicySwitch

    def play(self, draft_k: int | None) -> frozenset[str] | None:
        """Returns the drafters that a request may use; ``None``: any."""
        if draft_k is None:
            self.policy.play(None)
            return None
        kind = LEARNED if draft_k else "none"
        self.policy.play(FixedPolicy(kind, draft_k, needs_match=False))
        return frozenset({LEARNED}) if draft_k else frozenset()


@dataclass(slots=True)
class _Taken:
    """Outputs of one way as they come."""

    num_tokens: int = 0
    tokens: dict[str, list[int]] = field(default_factory=dict)
    over: set[str] = field(default_factory=set)
    accepted: dict[str, int] = field(default_factory=dict)

    def take(self, request: Request, output: Output) -> None:
        self.tokens.setdefault(request.id, []).extend(output.token_ids)
        self.num_tokens += len(output.token_ids)
        self.accepted[request.id] = output.stats.accepted
        if output.finish_reason in ("stop", "length"):
            self.over.add(request.id)

    def answers(self) -> dict[str, Answer]:
        return {name: Answer(tuple(t), name in self.over) for name, t in self.tokens.items()}


@torch.inference_mode()
def decode(
    side: Side, requests: Iterable[Request], way: Way, seconds: float, most: float = math.inf
) -> tuple[dict[str, Answer], Count]:
    """Answers by request id, and what was decoded in which time.

    Args:
        requests: each with an id of its own; begun until there are ``most`` tokens.
        seconds: afterwards, answers in flight are cut short.
    """
    drafters = side.play(way.draft_k)
    taken = _Taken()

    def begun() -> Iterator[Request]:
        for request in requests:
            if taken.num_tokens >= most:
                return
            yield replace(request, drafters=drafters, tenant=way.name)

    engine = side.service.engine
    clear(engine)
    began = time.monotonic()
    feed = Feed(engine, begun(), way.batch, each=taken.take)
    while engine.inbox.num_inflight() and (left := began + seconds - time.monotonic()) > 0:
        feed.run(left)
    took = time.monotonic() - began
    feed.stop()
    spent = Count(decoded=taken.num_tokens, seconds=took, accepted=sum(taken.accepted.values()))
    return taken.answers(), spent


# What is kept from run to run


@dataclass(slots=True)
class Kept:
    """First answers, and the counts of each way so far."""

    made_with: dict[str, Any]
    """All that answers depend on."""
    first: dict[str, Answer] = field(default_factory=dict)
    counts: dict[tuple[str, bool], Count] = field(default_factory=dict)
    """By way, and whether the engine was built after the first answers were given."""
    examples: list[Any] = field(default_factory=list)

    @property
    def total(self) -> Count:
        return sum(self.counts.values(), Count())

    def add(self, way: str, restarted: bool, found: Mapping[str, Answer], spent: Count) -> Count:
        """Compare answers with the first ones, and count them."""
        done, flips = compare(self.first, found)
        done += spent
        self.counts[way, restarted] = self.counts.get((way, restarted), Count()) + done
        named = [{"way": way, "after_restart": restarted, **flip} for flip in flips]
        self.examples = (self.examples + named)[:MOST_EXAMPLES]
        return done

    def rows(self) -> list[dict[str, Any]]:
        """One row for each way."""
        return [
            {
                "way": way,
                "after_restart": restarted,
                **asdict(count),
                "tokens_per_s": count.tokens_per_s,
            }
            for (way, restarted), count in self.counts.items()
        ]


def save(path: Path, kept: Kept) -> None:
    """Write to a file from which ``load`` goes on."""
    state = {
        "made_with": kept.made_with,
        "first": {name: [answer.is_over, answer.tokens] for name, answer in kept.first.items()},
        "counts": [[*key, asdict(count)] for key, count in kept.counts.items()],
        "examples": kept.examples,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(state))
    os.replace(aside, path)


def load(path: Path, made_with: dict[str, Any]) -> Kept:
    """What an earlier run has kept; nothing if there was none.

    Raises:
        ValueError: it was made with something else, so that its answers cannot be compared.
    """
    if not path.exists():
        return Kept(made_with)
    state = json.loads(path.read_text())
    former = state["made_with"]
    if former != made_with:
        names = sorted(former.keys() | made_with.keys())
        other = [name for name in names if former.get(name) != made_with.get(name)]
        raise ValueError(
            f"{path} holds answers made with another {', '.join(other)}: "
            f"{ {name: former.get(name) for name in other} }; here "
            f"{ {name: made_with.get(name) for name in other} }; name another file"
        )
    first = {name: Answer(tuple(tokens), over) for name, (over, tokens) in state["first"].items()}
    counts = {(way, restarted): Count(**count) for way, restarted, count in state["counts"]}
    return Kept(former, first, counts, state["examples"])


def name_of(prompt_ids: Sequence[int], seed: int) -> str:
    """A request's name in every run, whatever other prompts there are."""
    return hashlib.sha256(json.dumps([list(prompt_ids), seed]).encode()).hexdigest()[:20]


# Counting


def count(
    kept: Kept,
    make: Callable[[], Side],
    requests: Sequence[Request],
    batch: int,
    num_tokens: int,
    seconds: float,
    saved: Callable[[], None] = lambda: None,
) -> None:
    """Compare until ``num_tokens`` tokens are counted in all, or ``seconds`` are over.

    A first engine gives first answers to requests that have none, and answers them in all other
    ways. A second one, built when the first is gone, answers in every way all requests that have a
    first answer, those of earlier runs included.

    Args:
        make: builds an engine.
        requests: named by ``name_of``, seeded; more than can be answered in the time.
        saved: called after every way.
    """
    until = time.monotonic() + seconds
    share = max(0, num_tokens - kept.total.tokens) // PASSES
    if not share:
        return
    began = time.monotonic()
    side = make()
    build_s = time.monotonic() - began
    all_ways = ways(batch)
    half = (until - time.monotonic() - build_s) / 2
    new = [request for request in requests if request.id not in kept.first]
    found, spent = decode(side, new, all_ways[0], half / len(all_ways), share)
    say(f"{len(found)} first answers, {spent.decoded} tokens, {spent.tokens_per_s or 0:.0f}/s")
    kept.first |= found
    asked = [request for request in new if request.id in found]
    _pass(kept, side, asked, all_ways[1:], until - half - build_s, False, num_tokens, saved)
    side.service.engine.stop()
    del side
    side = make()
    asked = [request for request in requests if request.id in kept.first]
    _pass(kept, side, asked, all_ways, until, True, num_tokens, saved)
    side.service.engine.stop()


def _pass(
    kept: Kept,
    side: Side,
    requests: Sequence[Request],
    all_ways: Sequence[Way],
    until: float,
    restarted: bool,
    num_tokens: int,
    saved: Callable[[], None],
) -> None:
    """Answer the requests in all ways, each in an order of its own and with its part of the time
    and of the tokens that are missing."""
    whole = until - time.monotonic()
    for number, way in enumerate(all_ways):
        left, missing = until - time.monotonic(), num_tokens - kept.total.tokens
        if left <= 0 or (missing <= 0 and not restarted):
            return
        part = SLOW_SHARE * whole if way.is_slow else left / (len(all_ways) - number)
        shuffled = list(requests)
        random.Random(f"{way.name} {restarted} {len(kept.first)}").shuffle(shuffled)
        most = max(1.0, missing / (len(all_ways) - number)) if restarted else missing
        found, spent = decode(side, shuffled, way, part, most)
        done = kept.add(way.name, restarted, found, spent)
        saved()
        say(
            f"{way.name}{', after a restart' if restarted else ''}: {done.answers} answers "
            f"({done.cut_short} cut short), {done.tokens} tokens, {done.flips} flips, "
            f"{done.tokens_per_s or 0:.0f} tokens/s; {kept.total.tokens} in all"
        )
