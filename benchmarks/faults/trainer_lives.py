"""Lives of a trainer for ``benchmarks.faults.trainer_kills``, and the processes beside it.

Everything here runs in forked processes that may be killed at any time.
"""

from __future__ import annotations

import itertools
import json
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import trainer.candidate
import trainer.saver
from buffer.backends import open_backend
from buffer.bundles import BundleError
from buffer.codec import encode_trace
from buffer.counts import GroupCounts
from buffer.files import write_atomically
from buffer.interface import TraceLimits
from buffer.manifest import TENSORS
from buffer.records import Trace
from buffer.traces import TraceReader
from buffer.weights_store import WeightsStore
from configs.schema import Settings
from trainer.build import build_trainer
from trainer.checkpoint import Checkpoint, read_checkpoint
from trainer.dataset import triple_of
from trainer.lock import only_trainer
from trainer.loop import Trainer, run
from trainer.replay import Memory

PHASES = ("start", "update", "gate", "publication", "checkpoint", "rest")
PARTS = ("fork", "lock", "checkpoint", "build")
"""Of a start: until the new process runs, until it holds the lock of the run, reading the
checkpoint, and the rest, in which the traces that memory held are read again."""
LIMITS = TraceLimits(1 << 20, 64 << 20, 1e9, 0.0)
"""Of the traces that are written."""
PRODUCER, EPOCH = "server", 7
WRITER = f"{PRODUCER}/{EPOCH}"
_TRACES_PER_S = 40
_USED = "benchmark_used"
_COUNTERS = ("step", "num_skipped", "lr_scale", "steps_since_judged", "refused_in_row", "random")


class Phase:
    """What a trainer does at present, in memory that its processes share."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 8)
        self.reset()

    def reset(self) -> None:
        """A new life begins."""
        self._map[0], self._map[1] = 0, 0

    def set(self, name: str) -> None:
        self._map[0] = PHASES.index(name)

    def saves(self, is_so: bool) -> None:
        """A checkpoint is written, beside whatever else is done."""
        self._map[1] = int(is_so)

    @property
    def names(self) -> tuple[str, ...]:
        """What it does: one thing, and perhaps a checkpoint beside it."""
        own = PHASES[self._map[0]]
        return (own, "checkpoint") if self._map[1] else (own,)


@dataclass(slots=True)
class Used:
    """Traces that a trainer's memory took in, in the line of checkpoints that it continues."""

    bits: dict[str, int] = field(default_factory=dict)
    """``<producer>/<epoch>`` -> one bit for each sequence number."""
    twice: list[str] = field(default_factory=list)

    def take(self, key: str) -> None:
        """One trace."""
        producer, epoch, seq = triple_of(key)
        name, bit = f"{producer}/{epoch}", 1 << seq
        before = self.bits.get(name, 0)
        if before & bit:
            self.twice.append(key)
        self.bits[name] = before | bit

    def to_json(self) -> dict[str, Any]:
        return {"bits": {k: f"{v:x}" for k, v in self.bits.items()}, "twice": self.twice}

    @classmethod
    def of(cls, saved: Checkpoint | None) -> Used:
        """What a checkpoint says."""
        if saved is None or _USED not in saved.state:
            return cls()
        body = saved.state[_USED]
        return cls({k: int(v, 16) for k, v in body["bits"].items()}, list(body["twice"]))


# ---- the processes -------------------------------------------------------------------------------


def observed(used: Used, phase: Phase) -> None:
    """Let the trainer of this process say what it does, and note what it uses."""

    def around(owner: Any, name: str, begin: Callable[[], None], end: Callable[[], None]) -> None:
        work = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            begin()
            try:
                return work(*args, **options)
            finally:
                end()

        setattr(owner, name, wrapped)

    def during(owner: Any, name: str, phase_name: str, after: str = "rest") -> None:
        around(owner, name, lambda: phase.set(phase_name), lambda: phase.set(after))

    during(Trainer, "update", "update")
    during(Trainer, "judge_candidate", "gate")
    during(Trainer, "checkpoint", "checkpoint")
    during(trainer.candidate, "publish_version", "publication", after="gate")
    saver = trainer.saver
    around(saver, "write_checkpoint", lambda: phase.saves(True), lambda: phase.saves(False))

    take_in, to_json = Memory.take_in, Trainer.state_to_json

    def noting(memory: Memory, samples: Any) -> None:
        for sample in samples:
            used.take(sample.key)
        take_in(memory, samples)

    def with_used(self: Trainer) -> dict[str, Any]:
        return {**to_json(self), _USED: used.to_json()}

    Memory.take_in = noting  # type: ignore[method-assign]
    Trainer.state_to_json = with_used  # type: ignore[method-assign]


def live(settings: Settings, phase: Phase, began_s: float, told: Path, until: Path | None) -> None:
    """One life of the trainer.

    Args:
        told: file that says how it resumed.
        until: end like a trainer that is told to, once this file is there; ``None``: never.
    """
    stop, marks = threading.Event(), [began_s, time.monotonic()]
    with only_trainer(settings.run_dir / "trainer"):
        marks.append(time.monotonic())
        saved = read_checkpoint(settings.run_dir / "trainer" / "checkpoints")
        observed(Used.of(saved), phase)
        marks.append(time.monotonic())
        made = build_trainer(settings, stop)
        phase.set("rest")
        marks.append(time.monotonic())
        lengths = [after - before for before, after in itertools.pairwise(marks)]
        found = {
            "seconds": sum(lengths),
            "parts": dict(zip(PARTS, lengths, strict=True)) | {"processor": time.process_time()},
            "step": made.learner.step,
            "problems": [] if saved is None else differences(made, saved),
            "resumed": saved is not None,
        }
        write_atomically(told, json.dumps(found).encode())
        if until is not None:
            threading.Thread(target=_stop_at, args=(until, stop), daemon=True).start()
        run(made)


def differences(made: Trainer, saved: Checkpoint) -> list[str]:
    """In what the state of a trainer that has just resumed is not that of its checkpoint."""
    own, state = made.learner.state_tensors(), made.state_to_json()
    names = own.keys() | saved.tensors.keys()
    found = [n for n in names if _bytes_of(own.get(n)) != _bytes_of(saved.tensors.get(n))]
    as_saved = json.loads(json.dumps(state))
    return sorted(found) + [name for name in _COUNTERS if as_saved[name] != saved.state[name]]


def _bytes_of(tensor: Tensor | None) -> bytes | None:
    if tensor is None:
        return None
    return f"{tensor.dtype} {list(tensor.shape)}".encode() + bytes(
        tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    )


def _stop_at(file: Path, stop: threading.Event) -> None:
    while not file.exists():
        time.sleep(0.05)
    stop.set()


def write_traces(settings: Settings, traces: list[Trace], note: Path, until: Path) -> None:
    """Stand for a server: write traces, each with a number of its own, and note how many are
    stored; end once the file ``until`` is there."""
    writer = open_backend(settings.buffer.url, settings.run_dir).open_trace_writer(LIMITS)
    number = 0
    while not until.exists():
        for _ in range(max(1, _TRACES_PER_S // 20)):
            trace = replace(
                traces[number % len(traces)], producer=PRODUCER, epoch=EPOCH, seq=number
            )
            writer.append(encode_trace(trace))
            number += 1
        writer.sync()
        write_atomically(note, str(number).encode())
        time.sleep(0.05)
    writer.close()


@dataclass(frozen=True, slots=True)
class Account:
    """What became of every trace that was written: written = used + waiting + evicted."""

    written: int
    """Acknowledged by the log."""
    used: int
    """By the memory of the trainer whose checkpoint was the last."""
    held_out: int
    """Of these: to judge candidates with."""
    waiting: int
    """In the log, and not used."""
    evicted: int
    """No longer in the log, and never used."""
    differences: int
    """By which ``buffer stats`` counts otherwise: committed, pending and lost for this group."""

    @classmethod
    def of(cls, settings: Settings, written: int, saved: Checkpoint) -> Account:
        """Once nobody writes or reads any more."""
        used = Used.of(saved).bits.get(WRITER, 0)
        backend = open_backend(settings.buffer.url, settings.run_dir)
        reader, stored = TraceReader(backend), set[int]()
        while traces := reader.read(1000):
            stored |= {trace.seq for trace in traces}
        missing = {seq for seq in range(written) if not used >> seq & 1}
        waiting, evicted = len(missing & stored), len(missing - stored)
        counts = group_counts(settings)
        found = {
            "written": counts.committed + counts.pending + counts.lost + counts.deleted,
            "used": counts.committed,
            "waiting": counts.pending,
            "evicted": counts.lost,
        }
        own = {"written": written, "used": used.bit_count(), "waiting": waiting, "evicted": evicted}
        memory = saved.state["memory"]
        judged = abs(memory["num_samples"] + memory["num_held_out"] - used.bit_count())
        return cls(
            **own,
            held_out=memory["num_held_out"],
            differences=judged + sum(abs(found[name] - own[name]) for name in own),
        )


def group_counts(settings: Settings) -> GroupCounts:
    """The traces of a buffer as ``buffer stats`` counts them for this trainer."""
    stats = open_backend(settings.buffer.url, settings.run_dir).stats()
    group = settings.trainer.group
    nothing = GroupCounts(group, committed=0, pending=stats.appended, lost=0)
    return next((one for one in stats.groups if one.group == group), nothing)


@dataclass(slots=True)
class Seen:
    """What a reader of versions has seen."""

    digests: dict[int, str] = field(default_factory=dict)
    highest: int = -1
    problems: list[str] = field(default_factory=list)

    def look(self, store: WeightsStore, again: bool = False) -> None:
        """Read all versions that were not read before; ``again``: all."""
        for version in store.versions():
            if version in self.digests and not again:
                continue
            try:
                digest = store.read(version).manifest.files[TENSORS].sha256
            except BundleError as error:
                if version in store.versions():  # else it was pruned meanwhile
                    self.problems.append(f"version {version}: {error.problem}")
                continue
            if version not in self.digests and version < self.highest:
                self.problems.append(f"version {version} came after {self.highest}")
            if self.digests.setdefault(version, digest) != digest:
                self.problems.append(f"version {version} has changed")
            self.highest = max(self.highest, version)

    def to_json(self) -> dict[str, Any]:
        return {"versions": len(self.digests), "problems": self.problems}


def watch_versions(settings: Settings, note: Path, until: Path) -> None:
    """Stand for a server that looks for versions all the time; end once ``until`` is there."""
    store = open_backend(settings.buffer.url, settings.run_dir).open_weights()
    seen, noted = Seen(), (-1, -1)
    while not until.exists():
        seen.look(store)
        now = len(seen.digests), len(seen.problems)
        if now != noted:
            write_atomically(note, json.dumps(seen.to_json()).encode())
            noted = now
        time.sleep(0.001)


def forked(work: Callable[[], None]) -> int:
    """Start a process that does this; returns its id."""
    pid = os.fork()
    if pid == 0:
        try:
            logging.disable(logging.CRITICAL)
            work()
            os._exit(0)
        except BaseException:  # the process's outermost loop
            import traceback

            traceback.print_exc()
        os._exit(1)
    return pid
