"""Which record of a group is to be learnt from, where several hold one trace.

The first record that is claimed with a trace is the trace's. Because a record and not a member has
the claim, nobody needs to know who is alive: whoever gets the record later has its claim, too. Once
the record is committed, its trace is learnt for good, and only that is remembered: a bit at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from buffer.seen import Identity, SeenTraces

Location = tuple[str, str]
"""Writer and location of a record, see ``interface.Record``."""


@dataclass(slots=True)
class Claims:
    """Claims of one group."""

    learnt: SeenTraces = field(default_factory=SeenTraces)
    """Traces whose record is committed."""
    holders: dict[Identity, Location] = field(default_factory=dict)
    """The record of each trace that is claimed and not committed."""
    claimed: dict[str, dict[str, Identity]] = field(default_factory=dict)
    """Inverse of ``holders``: writer -> location -> trace."""

    def may_take(
        self, location: Location, trace: Identity, is_gone: Callable[[Location], bool]
    ) -> bool:
        """Whether ``take`` would give the record its trace, or has done so.

        Args:
            is_gone: whether a record that is not committed will never be: it was evicted, and
                nobody has it.
        """
        if trace in self.learnt:
            return False
        holder = self.holders.get(trace)
        return holder is None or holder == location or is_gone(holder)

    def take(self, location: Location, trace: Identity) -> None:
        """The record is its trace's from now on."""
        if (holder := self.holders.get(trace)) is not None:
            self.claimed[holder[0]].pop(holder[1], None)
        self.holders[trace] = location
        writer, where = location
        self.claimed.setdefault(writer, {})[where] = trace

    def commit(self, location: Location) -> None:
        """The record's trace, if it has one, is learnt."""
        if (trace := self._let_go(location)) is not None:
            self.learnt.add(*trace)

    def drop(self, location: Location) -> None:
        """The record is gone and was not learnt: its trace is free."""
        self._let_go(location)

    def _let_go(self, location: Location) -> Identity | None:
        writer, where = location
        records = self.claimed.get(writer, {})
        trace = records.pop(where, None)
        if trace is not None:
            del self.holders[trace]
            if not records:
                del self.claimed[writer]
        return trace
