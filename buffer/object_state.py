"""What is known of the versions in an object store, and how it changes.

    <url>/state/<number>    the state after so many changes, JSON

Object stores have no transactions, but a name can be created once. So a change creates the state
with the next number, and whoever is too late begins again from the state that was faster; what is
in force is the highest number. The newest states stay, so that a number is not created again by
somebody who slept, and each knows who made those before it: whoever finds another's mark under
his number was not in time after all.
"""

from __future__ import annotations

import errno
import json
import random
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from buffer.interface import ServiceAwayError
from buffer.objects import Objects
from buffer.tensors import parse_json

_JITTER = random.Random()  # of its own: the one of the module belongs to the caller
SCHEMA = "slipstream.weights"
SCHEMA_VERSION = 1
MAX_BYTES = 8 << 20
KEEP = 256
"""States that stay, and changes whose makers are known."""
_TIDY_EVERY = 32
_LIST_EVERY_S = 30.0
"""After so long without a look, the next number alone does not tell: it may have been removed."""
_TRIES = 100
_NUM_DIGITS = 20
_NAME = re.compile(r"[0-9]{20}")


@dataclass(frozen=True, slots=True)
class Stored:
    """One version."""

    token: str
    """Name of the folder with its files."""
    parent: int | None
    sha256: str
    """Of its manifest."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What a server said that it uses."""

    versions: tuple[int, ...]
    unix_s: float


@dataclass(frozen=True, slots=True)
class State:
    """All that is known of the versions."""

    number: int = 0
    """Changes so far."""
    highest: int = -1
    """Highest version ever published."""
    epoch: int = 0
    """How often a trainer has taken over."""
    published: dict[int, Stored] = field(default_factory=dict)
    denied: tuple[int, ...] = ()
    in_use: dict[str, Mark] = field(default_factory=dict)
    makers: dict[int, str] = field(default_factory=dict)
    """Number of a change -> mark of who made it."""

    def to_json(self) -> bytes:
        body = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(self)}
        return json.dumps(body).encode()

    @classmethod
    def from_json(cls, text: bytes) -> State:
        """Inverse of ``to_json``.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is no state.
        """
        body = parse_json(text)
        if (body["schema"], body["schema_version"]) != (SCHEMA, SCHEMA_VERSION):
            raise ValueError(f"it is {body['schema']!r} {body['schema_version']!r}")
        return cls(
            number=_count(body["number"]),
            highest=_count(body["highest"] + 1) - 1,
            epoch=_count(body["epoch"]),
            published={int(v): _stored(one) for v, one in body["published"].items()},
            denied=tuple(map(_count, body["denied"])),
            in_use={str(who): _mark(one) for who, one in body["in_use"].items()},
            makers={int(number): str(maker) for number, maker in body["makers"].items()},
        )


class StateLog:
    """The states of one store. May be used by several threads."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._known: State | None = None
        self._listed_s = 0.0
        self._lock = threading.RLock()

    def newest(self, from_list: bool = False) -> State:
        """The state in force.

        Args:
            from_list: list all names, even if the last list is not old.

        Raises:
            ServiceAwayError: the store cannot be used, or the newest state is damaged.
        """
        with self._lock:
            is_old = time.monotonic() - self._listed_s >= _LIST_EVERY_S
            if self._known is None or from_list or is_old:
                numbers = self._numbers()
                self._listed_s = time.monotonic()
                top = max(numbers, default=0)
                if self._known is None or top != self._known.number:
                    self._known = self._listed(top)
            while (following := self._read(self._known.number + 1)) is not None:
                self._known = following
            return self._known

    def change(self, transition: Callable[[State], State | None]) -> State:
        """Replace the state in force.

        Args:
            transition: given that state, returns the next one; ``None``: nothing to change. It may
                be called again, with what somebody else has made of it.

        Returns:
            The state that is in force with this change.

        Raises:
            ServiceAwayError: the store cannot be used; whether the change was made is unknown.
        """
        with self._lock:
            for _ in range(_TRIES):
                before = self.newest(from_list=True)
                wanted = transition(before)
                if wanted is None:
                    return before
                number, maker = before.number + 1, secrets.token_hex(8)
                makers = {n: m for n, m in before.makers.items() if n > number - KEEP}
                wanted = replace(wanted, number=number, makers={**makers, number: maker})
                failure = self._create(number, wanted)
                # Whatever the answer was: it may have been lost, or another's number removed.
                after = self.newest(from_list=True)
                if after.makers.get(number) == maker:
                    if number % _TIDY_EVERY == 0:
                        self._tidy(number)
                    return after
                if failure is not None:
                    raise failure
                time.sleep(_JITTER.uniform(0, 0.02))
        raise ServiceAwayError(
            errno.EAGAIN, f"{self._objects.location}: others change it all the time"
        )

    def _create(self, number: int, state: State) -> ServiceAwayError | None:
        """Try to create a state; returns why it is unknown whether that succeeded."""
        try:
            self._objects.create(_name(number), state.to_json())
        except ServiceAwayError as error:
            return error
        return None

    def _numbers(self) -> list[int]:
        return [int(name) for name in self._objects.names("state") if _NAME.fullmatch(name)]

    def _listed(self, number: int) -> State:
        """A state whose name was listed; the first one of all has none."""
        found = State() if number == 0 else self._read(number)
        if found is None:
            raise ServiceAwayError(
                errno.EAGAIN, f"{self._objects.location}/{_name(number)} was listed, and is gone"
            )
        return found

    def _read(self, number: int) -> State | None:
        """A state; ``None`` if there is none of this number."""
        text = self._objects.read(_name(number), MAX_BYTES + 1)
        if text is None:
            return None
        try:
            if len(text) > MAX_BYTES:
                raise ValueError(f"it has over {MAX_BYTES} bytes")
            state = State.from_json(text)
            if state.number != number:
                raise ValueError(f"it says that it is state {state.number}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ServiceAwayError(
                errno.EBADMSG,
                f"{self._objects.location}/{_name(number)} is damaged ({error}): which versions "
                f"there are is unknown. Remove it, and the state before it is in force",
            ) from None
        return state

    def _tidy(self, number: int) -> None:
        """Remove states that are too old for anybody to create their successors."""
        for name in self._objects.names("state"):
            found = _NAME.match(
                name
            )  # a name that a killed writer had not given yet begins so, too
            if found and int(found[0]) <= number - KEEP:
                self._objects.remove(f"state/{name}")


def _name(number: int) -> str:
    return f"state/{number:0{_NUM_DIGITS}d}"


def _count(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is no count")
    return number


def _stored(body: Any) -> Stored:
    token, parent = str(body["token"]), body["parent"]
    if not token.replace("-", "").isalnum():
        raise ValueError(f"{token!r} is no token")
    return Stored(token, None if parent is None else _count(parent), str(body["sha256"]))


def _mark(body: Any) -> Mark:
    return Mark(tuple(map(_count, body["versions"])), float(body["unix_s"]))
