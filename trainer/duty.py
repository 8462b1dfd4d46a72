"""When a trainer rests, so that a server on the same device keeps its speed.

With a number, it rests in proportion to its work. With ``auto`` it looks at what the server shows
of its load (``buffer.load``): while no request is decoding it works without a rest, and else as
``policies.sharing`` allows. It looks after each update and between the pieces of a judgement, so it
gives way within one of them when load rises. With ``trainer.burst``, how much serving may lose at
present follows from ``trainer.allowance``.

A step that was delayed by an update often ends after it. So a few steps after the work count as if
they were beside it, and only what follows as undisturbed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from buffer.load import Load, LoadReader
from configs.choices import SettingsError
from configs.schema import TrainerSettings
from policies.sharing import FIRST_SLOWDOWN, Sharing
from targets.device import hardware_of
from trainer.allowance import Allowance

_BURST_S = 1.0
"""Longest work between two rests."""
_SPILL_PASSES = 2
"""Passes of the server after which work delays none any more."""
_REST_PASSES = 4
"""Passes of the shortest rest, in which the server's speed is measured."""
_PASS_S = 0.005
"""Of a pass, while no passes were seen."""
_LONGEST_PASS_S = 0.5
"""A longer one, such as of a long prompt, is not waited for."""
_SLICE_S = 0.05
"""Of a long rest, which ends once the server is idle."""


class Reads(Protocol):
    """A ``LoadReader``."""

    def read(self) -> Load | None: ...


@dataclass(frozen=True, slots=True)
class _Seen:
    """The server's load at some time."""

    load: Load
    at_s: float
    num_suspended: int
    """How often the trainer had been suspended by then."""


@dataclass(slots=True)
class Duty:
    """The rests of one trainer process."""

    share: float = 1.0
    """Fixed share of time for work; without meaning where ``sharing`` is set."""
    sharing: Sharing | None = None
    """``None``: the share is fixed."""
    allowance: Allowance | None = None
    """Says what ``sharing`` holds serving's loss at; ``None``: always the same."""
    server: Reads | None = None
    """Shows the server's load; ``None``: there is none to look at."""
    device: str = ""
    """The trainer's; a server on another one is left alone. See ``targets.device.hardware_of``."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Ends every rest."""
    rested_s: float = 0.0
    """Sum of all rests."""
    num_suspended: int = 0
    """How often a signal has stopped the process for a while, which is neither work nor rest."""
    clock: Callable[[], float] = time.monotonic
    began: _Seen | None = None
    """Where the present work began; ``None`` if that is unknown."""

    @property
    def waits(self) -> bool:
        """The device is to be waited for after each update: else a rest would only be that of the
        launch, and load that rises would find several updates in the queue."""
        if self.sharing is None:
            return self.share < 1
        return self.sharing.duty < 1 and self._load() is not None

    def begin(self) -> None:
        """Work begins, unless it is under way."""
        if self.sharing is not None and self.began is None:
            self.began = self._look()

    def rest(self, busy_s: float, settle: Callable[[], None]) -> None:
        """Rest after work, if a rest is due.

        Args:
            busy_s: seconds that this piece of work took.
            settle: waits until the device has done what was launched.
        """
        if self.sharing is None:
            self._wait(busy_s * (1 / self.share - 1))
        else:
            self._share(self.sharing, settle)

    def breathe(self, settle: Callable[[], None]) -> None:
        """The same in the midst of a piece of work, after which ``rest`` is called."""
        if self.sharing is not None:
            self.rest(0.0, settle)

    def was_suspended(self) -> None:
        """The process goes on after a signal had stopped it."""
        self.num_suspended += 1

    def is_idle(self, settle: Callable[[], None]) -> None:
        """There is no work now. What was done since the last rest is followed by one, so that a
        trainer that works whenever a trace comes is held as well."""
        if self.began is not None:
            self.breathe(settle)
        self.began = None

    def figures(self) -> dict[str, float | str | None]:
        """For status and journal."""
        if self.sharing is None:
            return {"duty": self.share, "slowdown": None, "loss": None}
        more = {} if self.allowance is None else self.allowance.figures()
        return self.sharing.figures() | more

    def _load(self) -> Load | None:
        """Of a server on this device."""
        load = None if self.server is None else self.server.read()
        return load if load is not None and load.device == self.device else None

    def _share(self, sharing: Sharing, settle: Callable[[], None]) -> None:
        load, now_s = self._load(), self.clock()
        if load is None or not load.is_busy(now_s):
            self.began = None
            return
        pass_s = _pass_s(self.began, load)
        duty = self._duty(sharing, load.running)
        burst_s = _burst_s(duty, _REST_PASSES * pass_s)
        if self.began is not None and now_s - self.began.at_s < burst_s:
            return
        settle()
        self._wait(_SPILL_PASSES * pass_s)
        spilt = self._look()
        worked_s = self._told(sharing.worked, self.began, spilt)
        self._book(_slowdown(sharing), self.began, spilt)
        rest_s = max(worked_s * (1 / duty - 1), _REST_PASSES * pass_s)
        self._wait_while_busy(rest_s)
        rested = self._look()
        self._told(sharing.rested, spilt, rested)
        self._book(0.0, spilt, rested)
        self.began = rested

    def _duty(self, sharing: Sharing, running: int) -> float:
        """Share of the time for work. What falls does so at once; what rises, as ``sharing`` lets
        it."""
        if self.allowance is None:
            return sharing.duty
        allowed = self.allowance.share(running)
        # Not below the steady share: a duty grows by a tenth at a time, and has to be back soon.
        sharing.most = max(allowed, self.allowance.steady)
        return min(sharing.duty, allowed / max(_slowdown(sharing), allowed))

    def _book(self, slowdown: float, since: _Seen | None, until: _Seen | None) -> None:
        """Enter what serving lost in between into the account."""
        if self.allowance is None or since is None or until is None:
            return
        seconds = until.load.busy_s - since.load.busy_s
        self.allowance.served(seconds, until.load.running, slowdown * seconds)

    def _look(self) -> _Seen | None:
        load = self._load()
        return None if load is None else _Seen(load, self.clock(), self.num_suspended)

    def _told(
        self, tell: Callable[[float, float], None], since: _Seen | None, until: _Seen | None
    ) -> float:
        """Tell what the server did meanwhile; returns how long it was, 0 if that is not sound."""
        if since is None or until is None or until.num_suspended != since.num_suspended:
            return 0.0
        tokens = until.load.tokens - since.load.tokens
        seconds = until.load.busy_s - since.load.busy_s
        if tokens < 0 or seconds < 0:  # another server has come
            return 0.0
        tell(tokens, seconds)
        return until.at_s - since.at_s

    def _wait_while_busy(self, seconds: float) -> None:
        """Rest, unless the server has nothing to do any more."""
        until_s = self.clock() + seconds
        while (left_s := until_s - self.clock()) > 0 and not self.stop.is_set():
            self._wait(min(left_s, _SLICE_S))
            load = self._load()
            if load is None or not load.is_busy(self.clock()):
                return

    def _wait(self, seconds: float) -> None:
        if seconds <= 0:
            return
        started_s = self.clock()
        self.stop.wait(seconds)
        self.rested_s += self.clock() - started_s


def _slowdown(sharing: Sharing) -> float:
    """Share of its speed that serving lacks while the trainer works; what is uncertain counts as
    lost."""
    found = sharing.slowdown
    return FIRST_SLOWDOWN if found is None else min(1.0, found + sharing.error)


def _burst_s(duty: float, rest_s: float) -> float:
    """Work for which a rest of ``rest_s`` is due."""
    return _BURST_S if duty >= 1 else min(_BURST_S, rest_s * duty / (1 - duty))


def _pass_s(since: _Seen | None, now: Load) -> float:
    """Seconds of a pass lately."""
    if since is None or now.passes <= since.load.passes or now.busy_s <= since.load.busy_s:
        return _PASS_S
    found = (now.busy_s - since.load.busy_s) / (now.passes - since.load.passes)
    return min(found, _LONGEST_PASS_S)


def duty_of(
    settings: TrainerSettings, run_dir: Path, stop: threading.Event, device: torch.device
) -> Duty:
    """As the settings say, for a trainer on this device.

    Raises:
        SettingsError: bursts are set that cannot be.
    """
    if settings.duty == "auto":
        return Duty(
            sharing=Sharing(settings.max_serving_loss),
            allowance=_allowance(settings),
            server=LoadReader(run_dir),
            device=hardware_of(device),
            stop=stop,
        )
    if settings.burst.serving_loss is not None:
        raise SettingsError(
            f"trainer.burst.serving_loss needs trainer.duty auto, which measures what learning "
            f"costs, and trainer.duty is {settings.duty:g}"
        )
    return Duty(share=settings.duty, stop=stop)


def _allowance(settings: TrainerSettings) -> Allowance | None:
    """
    Raises:
        SettingsError: bursts cost less than what may be lost all the time.
    """
    burst, most = settings.burst.serving_loss, settings.max_serving_loss
    if burst is None:
        return None
    if burst < most:
        raise SettingsError(
            f"trainer.burst.serving_loss is {burst:g}, below trainer.max_serving_loss {most:g}, "
            f"which serving may lose on average; raise it, or leave it out for no bursts"
        )
    return Allowance(most, burst, settings.burst.window_s)
