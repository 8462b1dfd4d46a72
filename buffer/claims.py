"""Which record of a group is to be learnt from, where several hold one trace.

The first record that is claimed with a trace is the trace's. Because a record and not a member has
the claim, nobody needs to know who is alive: whoever gets the record later has its claim, too. Once
the record is committed, its trace is learnt for good, and only that is remembered: a bit at most.

Members that share no memory append messages to a log that all of them read, so they come to the
same claims. Messages are JSON arrays:

    ["claimed", member, [[writer, location, producer, epoch, seq], ...]]
    ["gone", [[writer, location], ...]]    nobody has these records, or can read them, any more
    ["done", member, {writer: place}, all] records before the place are committed, see ``done``
    ["seen", traces]                       in a log that was shortened: some of what is learnt
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from buffer.interface import Location, Record
from buffer.plain_values import is_count
from buffer.seen import Identity, SeenTraces

Place = tuple[int, int] | None
"""One past a record, in the numbers of its location; ``None``: behind all of a writer."""

_CLAIMS_PER_MESSAGE = 1000


@dataclass(slots=True)
class Claims:
    """Claims of one group."""

    learnt: SeenTraces = field(default_factory=SeenTraces)
    """Traces whose record is committed."""
    holders: dict[Identity, Location] = field(default_factory=dict)
    """The record of each trace that is claimed and not committed."""
    claimed: dict[str, dict[str, tuple[Identity, str]]] = field(default_factory=dict)
    """Inverse of ``holders``: writer -> location -> trace, and the member that claimed it last."""

    def claim(self, location: Location, trace: Identity, member: str = "") -> bool:
        """Whether the record is its trace's, which it becomes if none is."""
        if trace in self.learnt or self.holders.setdefault(trace, location) != location:
            return False
        self.claimed.setdefault(location[0], {})[location[1]] = trace, member
        return True

    def rival_of(self, location: Location, trace: Identity) -> Location | None:
        """Another record that is the trace's."""
        holder = self.holders.get(trace)
        return None if holder == location else holder

    def member_of(self, location: Location) -> str | None:
        """Who has claimed a record last; ``None``: it has no claim."""
        found = self.claimed.get(location[0], {}).get(location[1])
        return None if found is None else found[1]

    def writers_of(self, member: str) -> set[str]:
        """Writers of which a member has claimed records that are not committed."""
        return {
            writer
            for writer, records in self.claimed.items()
            if any(who == member for _, who in records.values())
        }

    def commit(self, location: Location) -> None:
        """The record's trace, if it has one, is learnt."""
        if (trace := self._let_go(location)) is not None:
            self.learnt.add(*trace)

    def drop(self, location: Location) -> None:
        """The record is gone and was not learnt: its trace is free."""
        self._let_go(location)

    def done(self, member: str, ends: Mapping[str, Place], are_learnt: bool) -> None:
        """A member has committed the records before these places.

        What it has claimed of them is learnt. What others had claimed and it has not, though it has
        read past them, was evicted in between: it is free.

        Args:
            are_learnt: what others had claimed is learnt, too, for it succeeds them.
        """
        for writer, end in ends.items():
            for where, (_, who) in list(self.claimed.get(writer, {}).items()):
                if end is None and who != member:
                    continue
                if end is None or _place_of(where) < end:
                    is_learnt = are_learnt or who == member
                    (self.commit if is_learnt else self.drop)((writer, where))

    def _let_go(self, location: Location) -> Identity | None:
        writer, where = location
        records = self.claimed.get(writer, {})
        found = records.pop(where, None)
        if found is None:
            return None
        if not records:
            del self.claimed[writer]
        self.holders.pop(found[0], None)
        return found[0]

    # ---- messages ------------------------------------------------------------------------------

    def take(self, message: Any) -> None:
        """Follow one message.

        Raises:
            ValueError: no member writes such a message; it may have been followed in part.
        """
        match message:
            case ["claimed", str(member), [*taken]]:
                for one in taken:
                    self.claim(*_claim_of(one), member)
            case ["gone", [*locations]]:
                for writer, where in locations:
                    self.drop((str(writer), str(where)))
            case ["done", str(member), dict(ends), bool(are_learnt)]:
                self.done(member, {name: _end_of(end) for name, end in ends.items()}, are_learnt)
            case ["seen", traces]:
                self.learnt.add_json(traces)
            case _:
                raise ValueError("it is of no known kind")

    def messages(self) -> Iterator[list[Any]]:
        """Those that lead from nothing to these claims; none is longer than some 64 KiB."""
        yield from (["seen", [one]] for one in self.learnt.to_json())
        for writer, records in self.claimed.items():
            for where, (trace, member) in records.items():
                yield ["claimed", member, [[writer, where, *trace]]]


class SharedClaims(ABC):
    """One member's end of the log of its group's claims."""

    def __init__(self, member: str) -> None:
        self.member = member
        """Name of this member; no other has had it."""
        self.claims = Claims()
        """As far as the log is known."""

    @abstractmethod
    def latest(self) -> contextlib.AbstractContextManager[None]:
        """Follow the log, and hold what ``append`` needs. Raises OSError."""

    def refresh(self) -> None:
        """Follow the log to its end, where ``latest`` need not do so. Raises OSError."""
        return None

    @abstractmethod
    def append(self, messages: Sequence[list[Any]], *, is_durable: bool) -> None:
        """Append messages, all or none, and follow the log up to them. Raises OSError.

        Args:
            is_durable: return only once a power cut cannot undo it.
        """

    def claim(
        self, found: Sequence[tuple[Record, Identity]], is_gone: Callable[[Location, str], bool]
    ) -> list[bool]:
        """See ``RecordReader.claim``.

        Args:
            is_gone: whether nobody has a record, or can read it, any more; given the member that
                claimed it.
        """
        locations = [(one.writer, one.location) for one, _ in found]
        pairs = [(where, of) for where, (_, of) in zip(locations, found, strict=True)]
        with self.latest():
            if any(self.claims.rival_of(*pair) for pair in pairs):
                self.refresh()  # they may have given up
            rivals = {self.claims.rival_of(*pair) for pair in pairs} - {None}
            gone = [one for one in rivals if one is not None and self._is_gone(one, is_gone)]
            hopeful = [
                [*where, *of]
                for where, of in pairs
                if of not in self.claims.learnt and self.claims.rival_of(where, of) in (None, *gone)
            ]
            messages: list[list[Any]] = [["gone", gone]] if gone else []
            for at in range(0, len(hopeful), _CLAIMS_PER_MESSAGE):
                some = hopeful[at : at + _CLAIMS_PER_MESSAGE]
                messages.append(["claimed", self.member, some])
            if messages:
                self.append(messages, is_durable=False)
            return [self.claims.holders.get(of) == where for where, of in pairs]

    def settle(self, ends: Mapping[str, Place], *, are_learnt: bool = False) -> None:
        """Say that the group is done with records, before it is told to commit them; see ``done``.
        It is safe from a power cut, and so are the claims, once this returns. Raises OSError."""
        with self.latest():
            if any(name in self.claims.claimed for name in ends):
                done: list[Any] = ["done", self.member, dict(ends), are_learnt]
                self.append([done], is_durable=True)

    def _is_gone(self, location: Location, is_gone: Callable[[Location, str], bool]) -> bool:
        member = self.claims.member_of(location)
        return member is not None and member != self.member and is_gone(location, member)


def _claim_of(stored: Any) -> tuple[Location, Identity]:
    match stored:
        case [str(writer), str(where), str(producer), int(epoch), int(seq)]:
            if is_count(epoch) and is_count(seq) and _place_of(where):
                return (writer, where), (producer, epoch, seq)
    raise ValueError("a claim that no member makes")


def _place_of(location: str) -> tuple[int, int]:
    """The two numbers of a record's location."""
    first, _, second = location.partition("-")
    return int(first), int(second)


def _end_of(stored: Any) -> Place:
    match stored:
        case None:
            return None
        case [int(first), int(second)]:
            return first, second
    raise ValueError("a place that no member is at")
