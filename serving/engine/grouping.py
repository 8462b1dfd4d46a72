"""What a batch is made of, for the policy: the group of each request, and how long its text is.

A request's group is worked out when it is admitted, from its temperature and from whose it is. What
is told of a batch is kept as long as the batch stays the same, so that a step looks at no request.

There are more tenants than numbers. Those that send most requests lately have one of their own;
all others, and requests that name neither a tenant nor a domain, share number 0.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence as Several
from typing import NamedTuple

from policies.groups import NUM_TENANTS, group_of
from serving.engine.sequence import Sequence
from serving.requests import Request

_MOST = 16
"""Tenants with a number of their own at a time. A number that is taken away is given to another
one after all those that are free, so that nothing is known of the former by then."""
_HALVED_AFTER = 1024
"""Requests after which all counts are halved."""
_LEAD = 4
"""Requests that a tenant must be ahead of another to take its place."""
_MOST_CANDIDATES = 256
_MOST_TOLD = 16
"""Requests of a batch whose groups are told. In larger ones K suits all of them equally badly, and
what their groups keep would take a policy 0.1 ms a step to learn."""
_CONTEXT_STEPS = 16
"""Steps for which the length of the texts of a batch holds."""


class Composition(NamedTuple):
    """See ``policies.interface.StepObs``."""

    groups: bytes | None
    context: int


_EMPTY = Composition(b"", 0)


class Tenants:
    """Gives numbers, 1 to 63, to tenants and domains that send many requests."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._free = deque(range(1, NUM_TENANTS))
        self._counts: Counter[str] = Counter()
        """Requests of those that have a number, and of some that have none."""
        self._num_requests = 0

    def number(self, label: str) -> int:
        """Count a request; returns the number of its tenant, 0 if it has none of its own."""
        self._num_requests += 1
        if self._num_requests % _HALVED_AFTER == 0:
            self._forget()
        self._counts[label] += 1
        if label not in self._numbers:
            self._give(label)
        return self._numbers.get(label, 0)

    def _give(self, label: str) -> None:
        if len(self._numbers) >= _MOST:
            least = min(self._numbers, key=self._counts.__getitem__)
            if self._counts[label] < self._counts[least] + _LEAD:
                return
            self._free.append(self._numbers.pop(least))
        self._numbers[label] = self._free.popleft()

    def _forget(self) -> None:
        halved = {label: count // 2 for label, count in self._counts.most_common(_MOST_CANDIDATES)}
        self._counts = Counter(
            {label: n for label, n in halved.items() if n or label in self._numbers}
        )


class Grouping:
    """Of one engine."""

    def __init__(self) -> None:
        self._tenants = Tenants()
        self._batch: list[Sequence] = []
        self._known, self._left = _EMPTY, 0

    def group(self, request: Request) -> int:
        """Group of a request that was admitted."""
        label = _label(request)
        tenant = 0 if label is None else self._tenants.number(label)
        return group_of(tenant, request.sampling.temperature)

    def of(self, batch: Several[Sequence]) -> Composition:
        """What a batch is made of: the same record while it is the same, and for some steps."""
        if batch != self._batch:  # compares identities: 0.2 µs for 256 requests
            self._batch = list(batch)
            groups = None
            if len(batch) <= _MOST_TOLD:
                groups = bytes([sequence.group for sequence in batch])
        elif self._left:
            self._left -= 1
            return self._known
        else:
            groups = self._known.groups
        num_tokens = sum([len(sequence.tokens) for sequence in batch])
        self._known = Composition(groups, num_tokens // max(len(batch), 1))
        self._left = _CONTEXT_STEPS
        return self._known


def _label(request: Request) -> str | None:
    """Whose a request is: its tenant, and the domain it names; ``None`` if it says neither."""
    domain = request.sampling.domain
    if request.tenant == "default" and domain is None:
        return None
    return f"{len(request.tenant)}:{request.tenant}{domain or ''}"
