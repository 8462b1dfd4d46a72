"""How long a trainer that restarts takes to have the samples again that it held.

    python -m benchmarks.resume                          # a minute on two cores
    python -m benchmarks.resume --stores redis,kafka --traces 2000

A checkpoint names the samples in the trainer's memory and says where in the buffer each is. Here a
log is written, an intake reads it as a trainer does, and another one finds a random choice of its
samples again, with their locations and without: then it reads the whole log, as backends without
``fetch`` do. Traces have 128 tokens of an answer and hidden rows of 4 x 576 in fp8.

- **log**: the embedded log, in the page cache.
- **redis**: one Valkey server that appends to a file.
- **kafka**: one Tansu, which keeps everything in memory.

Processor time is that of this process, without the server. Writes
``benchmarks/results/resume.json`` and, with ``--publish``, ``rows/resume.json``.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.data_path import FINGERPRINT, HIDDEN, LAYER_IDS, VOCAB, make_trace
from benchmarks.harness.results import (
    RESULTS,
    Out,
    Row,
    at_most,
    known,
    say,
    write_result,
    write_rows,
)
from buffer.backends import open_backend
from buffer.codec import encode_trace
from buffer.interface import Backend, Location, TraceLimits
from buffer.traces import TraceReader
from oracles.kafka_brokers import running_broker
from oracles.redis_servers import RedisServer, valkey_binary
from trainer.dataset import Expected
from trainer.intake import Intake
from trainer.journal import Journal
from trainer.target import TargetWatch

SOURCE = "python -m benchmarks.resume"
STORES = ("log", "redis", "kafka")
LIMITS = TraceLimits(32 << 20, 4 << 30, 3600.0, 1e9)
GOAL_S = 10.0
"""Of a whole resume, of which this is a part."""
_AT_ONCE = 64


def backend_of(store: str, root: Path, stack: ExitStack) -> Backend:
    """An empty buffer, whose server ends with the stack."""
    url = "log:"
    if store == "redis":
        server = RedisServer(valkey_binary(), {"appendfsync": "everysec"})
        stack.callback(server.close)
        url = f"{server.url}?run=resume"
    elif store == "kafka":
        broker = stack.enter_context(running_broker("tansu", root / "tansu"))
        url = f"kafka://{broker.address}/resume?batch_bytes=0"
    return open_backend(url, root)


def write(backend: Backend, num_traces: int) -> int:
    """Write a log; returns its bytes."""
    few = [make_trace(seq, "float8_e4m3fn") for seq in range(8)]
    num_bytes = 0
    with backend.open_trace_writer(LIMITS) as writer:
        for seq in range(num_traces):
            record = encode_trace(replace(few[seq % 8], seq=seq))
            num_bytes += len(record)
            writer.append(record)
            if seq % _AT_ONCE == _AT_ONCE - 1:
                writer.sync()
    return num_bytes


def intake_of(backend: Backend, root: Path) -> Intake:
    """The trainer's end of the log."""
    expected = Expected(FINGERPRINT, LAYER_IDS, HIDDEN, VOCAB)
    return Intake(
        TraceReader(backend), expected, 2048, Journal(root / "trainer"), TargetWatch(root)
    )


def read_all(intake: Intake) -> list[str]:
    """Keys of all samples."""
    keys = list[str]()
    while samples := intake.read():
        keys += [one.key for one in samples]
    return keys


def find(
    backend: Backend, root: Path, wanted: set[str], locations: Mapping[str, Location]
) -> tuple[float, float]:
    """Seconds, and processor seconds, until a fresh intake has found these samples."""
    intake = intake_of(backend, root)
    began_s, busy_s = time.monotonic(), time.process_time()
    found = intake.find(wanted, TraceReader(backend), locations)
    spent = time.monotonic() - began_s, time.process_time() - busy_s
    assert found.keys() == wanted
    intake.close()
    return spent


def measure(store: str, num_traces: int, num_held: int, num_turns: int) -> dict[str, Any]:
    """Both ways in turns, on one log."""
    with tempfile.TemporaryDirectory(prefix="resume-") as name, ExitStack() as stack:
        root = Path(name)
        backend = backend_of(store, root, stack)
        num_bytes = write(backend, num_traces)
        intake = intake_of(backend, root)
        keys = read_all(intake)
        assert len(keys) == num_traces
        held = set(random.Random(0).sample(keys, num_held))
        locations = intake.locations(held)
        intake.close()
        turns: dict[str, list[tuple[float, float]]] = {"located": [], "whole": []}
        for _ in range(num_turns):
            turns["whole"].append(find(backend, root, held, {}))
            turns["located"].append(find(backend, root, held, locations))
    return {
        "store": store,
        "load": os.getloadavg()[0],
        "traces": num_traces,
        "held": num_held,
        "bytes": num_bytes,
        "median_s": {way: statistics.median(s for s, _ in all_) for way, all_ in turns.items()},
        "processor_s": {way: statistics.median(s for _, s in all_) for way, all_ in turns.items()},
        "turns": turns,
    }


def rows_of(found: Sequence[dict[str, Any]]) -> Iterator[Row]:
    for one in found:
        what = f"{one['held']} of {one['traces']} traces, log of {one['bytes'] / 1e6:.0f} MB, "
        what += f"{one['store']}, load {one['load']:.0f}"
        seconds = one["median_s"]
        yield at_most(what, "found again at their locations, s", seconds["located"], GOAL_S)
        yield Row(what, "found again by reading the whole log, s", seconds["whole"], None, None)


def main(
    stores: Annotated[str, typer.Option(help="what to measure")] = ",".join(STORES),
    traces: Annotated[int, typer.Option(min=64, help="in the log")] = 600,
    held: Annotated[int, typer.Option(min=1, help="by the trainer")] = 64,
    turns: Annotated[int, typer.Option(min=1, help="of each way")] = 3,
    publish: Annotated[bool, typer.Option(help="write rows/resume.json, too")] = False,
    out: Out = RESULTS / "resume.json",
) -> None:
    """Measure each buffer."""
    found: list[dict[str, Any]] = []
    for store in known("store", stores.split(","), STORES):
        one = measure(store, traces, held, turns)
        found.append(one)
        say(
            f"{store}: {held} of {traces} traces in {one['bytes']:,} bytes: s {one['median_s']}, "
            f"processor {one['processor_s']}, load {one['load']:.1f}"
        )
        write_result(out, {"rows": found})
    if publish:
        write_rows("resume", rows_of(found), SOURCE)


if __name__ == "__main__":
    typer.run(main)
