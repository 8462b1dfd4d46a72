"""What a run folder says of its trainer: ``trainer status``, ``logs`` and ``stop``.

Reads files alone; the trainer is neither asked nor slowed. Whether it lives, its lock says, not its
process number, which the system gives to others.
"""

from __future__ import annotations

import heapq
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from buffer.files import open_regular
from buffer.small_json import is_whole, parse_small_json, read_small_json
from trainer.journal import LINE_EVERY_S, text_of
from trainer.lock import STOP_SIGNAL, Owner, owner_of

POLL_S = 0.25
START_S = 10.0
"""How long ``logs -f`` waits for a trainer that may be starting: importing torch takes seconds."""
_TAIL_BYTES = 1 << 18
"""Of ``log.jsonl``, read for a rate; more than ten seconds of events."""

Life = Literal["runs", "starts", "stopped", "failed", "gone", "none"]


class NoSuchRunError(ValueError):
    """The folder is not that of a run with a trainer."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A trainer, as its folder shows it."""

    life: Life
    """``gone``: its process ended without a word, as after kill -9. ``none``: it never started."""
    owner: Owner | None
    """Who runs or starts."""
    last: Mapping[str, Any]
    """Content of ``status.json``; empty if there is none."""
    rows_per_s: float | None
    """Rows trained in the last ten seconds before ``status.json`` was written."""
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The same of the trainers of drafters beside the main one, by kind."""

    def to_lines(self) -> list[str]:
        """For people."""
        last = self.last
        lines = [f"state      {self._state()}"]
        if last:
            lines += [
                f"version    {last.get('version')}",
                f"step       {last.get('step')}, {last.get('skipped')} updates skipped",
                f"traces     {_traces(last.get('traces'))}",
                f"gate       {_gate(last.get('gate'))}",
            ]
        if (policy := _policy(last.get("policy"))) is not None:
            lines.append(f"policy     {policy}")
        if (sharing := _sharing(last.get("sharing"))) is not None:
            lines.append(f"sharing    {sharing}")
        if (parts := _time(last.get("time"))) is not None:
            lines.append(f"time       {parts}")
        if self.rows_per_s is not None:
            lines.insert(3, f"rows/s     {self.rows_per_s:.0f}")
        lines += [
            f"{kind:<10} version {one.get('version')}, step {one.get('step')}: {one.get('state')}"
            for kind, one in self.beside.items()
        ]
        return lines

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        owner = None if self.owner is None else {"pid": self.owner.pid, "host": self.owner.host}
        return {
            "life": self.life,
            "owner": owner,
            "rows_per_s": self.rows_per_s,
            "status": dict(self.last),
            "beside": {kind: dict(one) for kind, one in self.beside.items()},
        }

    def _state(self) -> str:
        last, owner = self.last, self.owner
        if owner is not None:
            who = f"process {owner.pid} on {owner.host}"
            state = last.get("state") if self.life == "runs" else "starts: it loads, or resumes"
            return f"{state} ({who})"
        if self.life == "gone":
            return (
                f"not running: process {last.get('pid')} ended without a word, killed, out of "
                f"memory or on a full disk, while {last.get('state')}; start it again, and it "
                f"resumes"
            )
        if self.life == "none":
            return "not running: no trainer has got as far as training in this run"
        return f"not running: {last.get('state')}"


def status_of(run: Path) -> RunStatus:
    """
    Raises:
        NoSuchRunError: there is no such run, or it never had a trainer.
        OSError: its files cannot be read.
    """
    folder = _folder_of(run)
    owner = owner_of(folder)
    last = _read_status(folder / "status.json")
    rate = _rows_per_s(folder / "log.jsonl")
    beside = {path.parent.name: _read_status(path) for path in sorted(folder.glob("*/status.json"))}
    if owner is not None:
        life: Life = "runs" if last.get("pid") == owner.pid else "starts"
        return RunStatus(life, owner, last, rate, beside)
    state = str(last.get("state", ""))
    life = "gone"
    if not last:
        life = "none"
    elif state == "stopped":
        life = "stopped"
    elif state.startswith("failed"):
        life = "failed"
    return RunStatus(life, None, last, None, beside)


def stop(run: Path, timeout_s: float) -> str:
    """Tell the trainer of a run to stop, and wait until it has.

    Returns:
        What happened, in words.

    Raises:
        NoSuchRunError: see ``status_of``.
        ValueError: no trainer runs, it runs on another host, or it ended otherwise.
        TimeoutError: it still runs.
    """
    folder = _folder_of(run)
    owner = owner_of(folder)
    if owner is None or owner.pid is None:
        raise ValueError(f"no trainer runs in {run}: there is nothing to stop")
    if owner.host != socket.gethostname():
        raise ValueError(
            f"the trainer of {run} is process {owner.pid} on {owner.host}, and this is "
            f"{socket.gethostname()}: stop it there, or cancel its job"
        )
    try:
        os.kill(owner.pid, STOP_SIGNAL)
    except ProcessLookupError:
        pass  # it has just ended
    except PermissionError:
        raise ValueError(
            f"process {owner.pid}, the trainer of {run}, is another user's: stop it as that user"
        ) from None
    deadline = time.monotonic() + timeout_s
    while owner_of(folder) == owner:
        if time.monotonic() >= deadline:
            raise TimeoutError(
                f"process {owner.pid} was told to stop and still runs after {timeout_s:g} s; it "
                f"ends after its update and a checkpoint. trainer status shows it; kill -9 loses "
                f"what was learnt since the last checkpoint"
            )
        time.sleep(POLL_S)
    last = _read_status(folder / "status.json")
    if last.get("pid") != owner.pid:
        return f"process {owner.pid} stopped before it trained"
    if last.get("state") != "stopped":
        raise ValueError(
            f"process {owner.pid} ended, but not as told: its last state is {last.get('state')!r}. "
            f"Its log says why; started again, it resumes from its last checkpoint"
        )
    return f"process {owner.pid} stopped at step {last.get('step')}, version {last.get('version')}"


def log_lines(run: Path, follow: bool) -> Iterator[str]:
    """Lines of a run's log for people: every event, and one line for ten seconds of learning.
    Those of drafters beside the main one name their kind.

    Args:
        follow: wait for more while a trainer runs, and say what it waits for; wait ``START_S`` for
            one that is just starting.

    Raises:
        NoSuchRunError: see ``status_of``.
        OSError: the log cannot be read.
    """
    seen, started_by_s = False, time.monotonic() + START_S
    if follow:
        yield from _until_there(run, started_by_s)
    logs = {"": _Log(_folder_of(run))}
    while True:
        owner = owner_of(run / "trainer")  # before reading: what it wrote last is read, too
        lives = owner is not None
        seen = seen or lives
        may_start = not seen and time.monotonic() < started_by_s
        for path in sorted((run / "trainer").glob("*/log.jsonl")):
            kind = path.parent.name
            logs.setdefault(kind, _Log(path.parent, f"{kind}: "))
        new = ([(event, log) for event in log.new_events()] for log in logs.values())
        for event, log in heapq.merge(*new, key=lambda one: int(one[0].get("unix_ms", 0))):
            yield from log.learning.lines(event)
        if not (follow and (lives or may_start)):
            break
        if owner is not None:
            for log in logs.values():
                yield from log.awaited(owner)
        time.sleep(POLL_S)
    for log in logs.values():
        yield from log.learning.ended()
    if follow:
        yield "no trainer runs in this folder (any more)"


class _Log:
    """The log of one drafter's trainer, read on and on."""

    def __init__(self, folder: Path, prefix: str = "") -> None:
        """
        Args:
            prefix: of each line, to tell drafters apart.
        """
        self._path = folder / "log.jsonl"
        self.learning = _Learning(prefix)
        self._waiting = _Waiting(folder, prefix)
        self._done, self._rest = 0, b""

    def new_events(self) -> list[dict[str, Any]]:
        """What was written since the last call."""
        if not self._path.exists():
            return []
        with open(open_regular(self._path), "rb") as file:
            file.seek(self._done)
            new = file.read()
        self._done += len(new)
        *whole, self._rest = (self._rest + new).split(b"\n")
        return [_event(text) for text in whole]

    def awaited(self, owner: Owner) -> Iterator[str]:
        """What the trainer waits for, if that is to be said now."""
        line = self._waiting.line(owner)
        if line is not None:
            yield from self.learning.ended()
            yield line


def _until_there(run: Path, until_s: float) -> Iterator[str]:
    """Wait for the folder of a trainer that may be starting; says so if there is none yet.

    Args:
        until_s: monotonic time at which to give up.
    """
    said = False
    while not (run / "trainer").is_dir() and time.monotonic() < until_s:
        if not said:
            yield f"no trainer was started in {run} yet; waiting {START_S:g} s for one"
            said = True
        time.sleep(POLL_S)


class _Waiting:
    """Says what a trainer waits for: when that changes, and every ten seconds."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self._path = folder / "status.json"
        self._prefix = prefix
        self._awaited: str | None = None
        """What it waited for when that was said last."""
        self._said_s = 0.0

    def line(self, owner: Owner) -> str | None:
        """What to say now; ``None``: nothing."""
        last, now_s = _read_status(self._path), time.monotonic()
        state = str(last.get("state"))
        is_waiting = state.startswith("waiting") and is_whole(last.get("unix_ms"))
        if last.get("pid") != owner.pid or not is_waiting:
            self._awaited = None
            return None
        awaited = state.partition(":")[0]
        if awaited == self._awaited and now_s - self._said_s < LINE_EVERY_S:
            return None
        self._awaited, self._said_s = awaited, now_s
        return f"{_clock(last)} {self._prefix}{state}"


class _Learning:
    """Joins updates to one line for ten seconds."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._updates: list[Mapping[str, Any]] = []

    def lines(self, event: Mapping[str, Any]) -> Iterator[str]:
        if _is_update(event):
            if self._updates and _seconds([self._updates[-1], event]) < 0:  # a clock set back
                yield from self.ended()
            self._updates.append(event)
            if _seconds(self._updates) >= LINE_EVERY_S:
                yield from self.ended()
            return
        text = text_of(event)
        if text is not None:
            yield from self.ended()
            yield f"{_clock(event)} {self._prefix}{text}"

    def ended(self) -> Iterator[str]:
        updates, self._updates = self._updates, []
        if not updates:
            return
        last = updates[-1]
        rows, count = (sum(int(one[key]) for one in updates) for key in ("rows", "updates"))
        loss = last["loss"]
        yield (
            f"{_clock(last)} {self._prefix}step {last.get('step')}: {count} updates of {rows} rows "
            f"in all, loss {'not finite' if loss is None else format(loss, '.4f')}"
        )


def _folder_of(run: Path) -> Path:
    if not run.is_dir():
        raise NoSuchRunError(f"{run}: no such run; name the folder, as in run_dir")
    folder = run / "trainer"
    if not folder.is_dir():
        raise NoSuchRunError(f"{run} has no trainer's folder: no trainer was started in this run")
    return folder


def _read_status(path: Path) -> dict[str, Any]:
    try:
        found = read_small_json(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise OSError(f"{path} is damaged: {error}") from error
    return found if isinstance(found, dict) else {}


def _rows_per_s(path: Path) -> float | None:
    """Rows of the last ten seconds of updates, by the clock; ``None`` without updates."""
    if not path.exists():
        return None
    with open(open_regular(path), "rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        events = [_event(line) for line in file.read().split(b"\n")[1:]]
    updates = [one for one in events if _is_update(one)]
    recent = list[dict[str, Any]]()
    for one in reversed(updates):  # not beyond a place where somebody has set the clock back
        is_later = bool(recent) and _seconds([one, recent[0]]) < 0
        if is_later or _seconds([one, updates[-1]]) > LINE_EVERY_S:
            break
        recent.insert(0, one)
    seconds = _seconds(recent)
    return sum(int(one["rows"]) for one in recent[1:]) / seconds if seconds else None


def _seconds(events: Sequence[Mapping[str, Any]]) -> float:
    if not events:
        return 0.0
    return (int(events[-1]["unix_ms"]) - int(events[0]["unix_ms"])) / 1000


def _event(line: bytes) -> dict[str, Any]:
    """An event; empty for a line that is none, which a killed trainer may leave."""
    try:
        found = parse_small_json(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and is_whole(found.get("unix_ms")) else {}


def _is_update(event: Mapping[str, Any]) -> bool:
    """It tells of updates, with the figures that this version of the program writes."""
    has_counts = is_whole(event.get("rows")) and is_whole(event.get("updates"))
    has_loss = "loss" in event and isinstance(event["loss"], float | int | None)
    return event.get("event") == "update" and has_counts and has_loss


def _clock(event: Mapping[str, Any]) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(int(event["unix_ms"]) / 1000))
    except (ValueError, OverflowError, OSError):  # no such time
        return f"{event['unix_ms']} ms"


def _traces(found: Any) -> str:
    if not isinstance(found, dict):
        return "unknown"
    return f"{found.get('read')} read, {found.get('held')} held, {found.get('held_out')} held out"


def _policy(found: Any) -> str | None:
    """The draft policy that is fitted, and what became of the last fit; ``None`` if none is."""
    if not isinstance(found, dict):
        return None
    last, counts = found.get("last"), found.get("fits")
    numbers = counts if isinstance(counts, dict) else {}
    done = ", ".join(f"{number} {what.replace('_', ' ')}" for what, number in numbers.items())
    parts = [f"{found.get('kind')} {found.get('state')}", f"fits: {done or 'none yet'}"]
    if found.get("unpublished"):
        parts.append("a network that passed waits for a version")
    if isinstance(last, dict):
        parts.append(f"the last: {last.get('text')}")
    return "; ".join(parts)


def _sharing(found: Any) -> str | None:
    """What a trainer on the server's device costs; ``None`` if nothing was measured."""
    shares = ("loss", "duty", "slowdown")
    if not isinstance(found, dict) or not all(isinstance(found.get(x), float) for x in shares):
        return None
    return (
        f"works {found['duty']:.0%} of the time while requests decode, which are slower by "
        f"{found['slowdown']:.0%} then; serving loses {found['loss']:.1%}{_burst(found)}"
    )


def _burst(found: dict[str, Any]) -> str:
    """What is left for bursts, and why there is one; empty if there are none."""
    balance_s, largest_s = found.get("balance_s"), found.get("largest_s")
    if not isinstance(balance_s, float) or not isinstance(largest_s, float):
        return ""
    why = found.get("urgent")
    now = f"; learning is urgent: {why}" if isinstance(why, str) else ""
    return f"; may lose another {max(balance_s, 0.0):.1f} s of {largest_s:.1f} s at once{now}"


def _time(found: Any) -> str | None:
    """What the trainer spends its time on, the most first; ``None`` if that is unknown."""
    if not isinstance(found, dict) or not all(isinstance(x, float) for x in found.values()):
        return None
    ordered = sorted(found.items(), key=lambda one: -one[1])
    shown = [f"{name.replace('_', ' ')} {share:.0%}" for name, share in ordered if share >= 0.005]
    return ", ".join(shown) or None


def _gate(found: Any) -> str:
    if not isinstance(found, dict):
        return "no candidate was judged yet"
    return f"{'passed' if found.get('passed') else 'refused'}: {found.get('reason')}"
