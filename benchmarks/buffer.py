"""The buffer against the raw device and the bare client, in one run and in turns.

    python -m benchmarks.buffer                  # two minutes on two cores
    python -m benchmarks.buffer --parts redis    # of: log, redis, kafka, hand-over

- **log**: appends of 64 KiB and 1 MiB with a group commit for every 8 MiB, against plain writes and
  fdatasync of the same bytes; reads of single records at random places of an index, each checked,
  against pread into the same memory.
- **redis**: records of 64 KiB written and read by a group, against redis-py with pipelines of the
  same batches, on one Valkey server that appends to a file and syncs every second. Reading also by
  the processor time of client and server together: on a busy machine, wall time is that of waiting.
- **kafka**: records of 64 KiB written and read without a group, against kafka-python with the same
  settings and pipelines, on one Tansu in memory (``benchmarks/buffer_kafka.py``).
- **hand-over**: what ``Recorder.put`` costs the token path, with the log, and with a Redis that
  accepts connections and never answers.

Medians over turns; each turn measures both sides. Writes ``benchmarks/results/buffer.json`` and,
with ``--publish``, ``rows/buffer.json``.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import redis
import typer
from numpy.typing import NDArray

from benchmarks.buffer_kafka import measure_kafka
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
from buffer.frames import HEAD, read_frame, scan
from buffer.interface import Backend, TraceLimits
from buffer.segment_writer import SegmentWriter
from oracles.proxies import Proxy
from oracles.redis_servers import RedisServer, valkey_binary
from serving.capture.recorder import Recorder

LIMITS = TraceLimits(32 << 20, 4 << 30, 3600.0, 1e9)
GROUP_BYTES = 8 << 20
"""Bytes of one group commit."""
REDIS_BATCH = 16
"""Records of 64 KiB in one pipeline, as our writer takes them."""
PUTS = 20_000
SIZES = {"64 KiB": 64 << 10, "1 MiB": 1 << 20}


@contextmanager
def folder_in(parent: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="buffer-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def per_s(work: Callable[[], int]) -> float:
    """Bytes a second of wall time."""
    begun = time.perf_counter()
    num_bytes = work()
    return num_bytes / (time.perf_counter() - begun)


def compare(sides: dict[str, Callable[[], float]], num_turns: int) -> dict[str, Any]:
    """Measure all sides in turns, in rotating order.

    Returns:
        Every turn, and medians and their ratios to the last side.
    """
    names, turns = list(sides), list[dict[str, float]]()
    for turn in range(num_turns):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        turns.append({name: sides[name]() for name in order})
    medians = {name: statistics.median(turn[name] for turn in turns) for name in names}
    ratios = {
        name: statistics.median(turn[name] / turn[names[-1]] for turn in turns)
        for name in names[:-1]
    }
    return {"turns": turns, "medians": medians, "ratios": ratios, "load": os.getloadavg()[0]}


# ---- the embedded log ----------------------------------------------------------------------------


def append_log(root: Path, record: bytes, num_bytes: int) -> float:
    """Bytes a second that the log acknowledges."""
    folder = Path(tempfile.mkdtemp(dir=root))
    at_once = max(1, GROUP_BYTES // len(record))
    with SegmentWriter(folder, LIMITS) as writer:

        def work() -> int:
            for _ in range(num_bytes // (at_once * len(record))):
                writer.append_all([record] * at_once)
                writer.sync()
            return writer.counts.durable * len(record)

        rate = per_s(work)
    shutil.rmtree(folder)
    return rate


def append_plain(root: Path, record: bytes, num_bytes: int) -> float:
    """Bytes a second of write and fdatasync, files of the same size."""
    folder = Path(tempfile.mkdtemp(dir=root))
    at_once = max(1, GROUP_BYTES // len(record))

    def work() -> int:
        done = 0
        while done < num_bytes // (at_once * len(record)) * at_once * len(record):
            path = folder / f"{done}"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for _ in range(LIMITS.segment_bytes // GROUP_BYTES):
                done += os.writev(descriptor, [record] * at_once)
                os.fdatasync(descriptor)
            os.close(descriptor)
        return done

    rate = per_s(work)
    shutil.rmtree(folder)
    return rate


def read_at_random(root: Path, size: int, num_reads: int, num_turns: int) -> dict[str, Any]:
    """Single records of one segment in the page cache: ours are checked, every byte of them."""
    with SegmentWriter(root, LIMITS) as writer:
        for number in range(LIMITS.segment_bytes // (size + HEAD.size)):
            writer.append(random.Random(number).randbytes(size))
        path = next((root / writer.name).glob("*.seg"))
    descriptor = os.open(path, os.O_RDONLY)
    file_bytes = os.fstat(descriptor).st_size
    index = [(frame.start, frame.end) for frame in scan(descriptor, file_bytes)]
    luck = random.Random(0)
    places = [luck.choice(index) for _ in range(num_reads)]
    block = np.empty(size + HEAD.size, np.uint8)

    def take(num_bytes: int) -> NDArray[np.uint8]:
        assert num_bytes == block.size
        return block

    def ours() -> int:
        for start, end in places:
            frame = read_frame(descriptor, start, file_bytes, take, end)
            assert frame is not None
        return num_reads * size

    def plain() -> int:
        for start, _ in places:
            os.preadv(descriptor, [block], start)
        return num_reads * size

    sides = {"log": lambda: per_s(ours), "pread": lambda: per_s(plain)}
    found = compare(sides, num_turns)
    os.close(descriptor)
    return found


def measure_log(root: Path, num_bytes: int, num_turns: int) -> Iterator[tuple[str, Any]]:
    for name, size in SIZES.items():
        record = os.urandom(size)
        sides: dict[str, Callable[[], float]] = {
            "log": lambda record=record: append_log(root, record, num_bytes),
            "write and fdatasync": lambda record=record: append_plain(root, record, num_bytes),
        }
        yield f"append, {name}", compare(sides, num_turns)
        folder = Path(tempfile.mkdtemp(dir=root))
        num_reads = max(64, num_bytes // size)
        yield f"random read, {name}", read_at_random(folder, size, num_reads, num_turns)


# ---- Redis ---------------------------------------------------------------------------------------


def write_buffer(backend: Backend, record: bytes, num_records: int) -> float:
    with backend.open_trace_writer(LIMITS) as writer:

        def work() -> int:
            for _ in range(num_records // REDIS_BATCH):
                writer.append_all([record] * REDIS_BATCH)
                writer.sync()
            return writer.counts.durable * len(record)

        return per_s(work)


def read_buffer(backend: Backend, num_records: int) -> float:
    member = backend.open_record_reader(group="trainer")

    def work() -> int:
        num_bytes = 0
        while num_bytes < num_records * SIZES["64 KiB"]:
            num_bytes += sum(len(record.payload) for record in member.read(REDIS_BATCH))
        member.commit(member.offsets())
        return num_bytes

    rate = per_s(work)
    member.close()
    return rate


def write_bare(client: redis.Redis, key: str, record: bytes, num_records: int) -> float:
    def work() -> int:
        for _ in range(num_records // REDIS_BATCH):
            pipe = client.pipeline(transaction=False)
            for _ in range(REDIS_BATCH):
                pipe.xadd(key, {"d": record})
            pipe.execute()
        return num_records // REDIS_BATCH * REDIS_BATCH * len(record)

    return per_s(work)


def read_bare(client: redis.Redis, key: str, num_records: int) -> float:
    client.xgroup_create(key, "g", "0")

    def work() -> int:
        num_bytes = 0
        while found := client.xreadgroup("g", "c", {key: ">"}, count=REDIS_BATCH):
            entries = found[0][1]
            client.xack(key, "g", *(entry_id for entry_id, _ in entries))
            num_bytes += sum(len(fields[b"d"]) for _, fields in entries)
        assert num_bytes >= num_records * SIZES["64 KiB"]
        return num_bytes

    return per_s(work)


def processor_s(server: RedisServer) -> float:
    """Processor time so far of this process and of the server's thread."""
    taken_ns = int(Path(f"/proc/{server.pid}/schedstat").read_bytes().split()[0])
    return time.process_time() + taken_ns / 1e9


def measure_redis(num_bytes: int, num_turns: int) -> Iterator[tuple[str, Any]]:
    record = os.urandom(SIZES["64 KiB"])
    num_records = num_bytes // len(record) // REDIS_BATCH * REDIS_BATCH
    server = RedisServer(valkey_binary(), {"appendfsync": "everysec"})
    client = redis.Redis(port=server.port)
    turn = 0
    reads, by_processor = list[dict[str, float]](), list[dict[str, float]]()

    def read(name: str, work: Callable[[], float]) -> None:
        begun_s = processor_s(server)
        reads.append({name: work()})
        taken_s = processor_s(server) - begun_s
        by_processor.append({name: num_records * len(record) / taken_s})

    def ours() -> float:
        nonlocal turn
        turn += 1
        client.flushall()
        backend = open_backend(f"{server.url}?run=run-{turn}", Path("."))
        rate = write_buffer(backend, record, num_records)
        read("buffer", lambda: read_buffer(backend, num_records))
        return rate

    def bare() -> float:
        client.flushall()
        rate = write_bare(client, "bare", record, num_records)
        read("redis-py", lambda: read_bare(client, "bare", num_records))
        return rate

    try:
        yield "write, 64 KiB", compare({"buffer": ours, "redis-py": bare}, num_turns)
        yield "read and commit, 64 KiB", compare(taken_from(reads), num_turns)
        yield (
            "read and commit, 64 KiB, by processor time",
            compare(taken_from(by_processor), num_turns),
        )
    finally:
        client.close()
        server.close()


def taken_from(rates: list[dict[str, float]]) -> dict[str, Callable[[], float]]:
    """Sides for ``compare`` of what was measured already."""
    names = ("buffer", "redis-py")
    each = {name: iter([one[name] for one in rates if name in one]) for name in names}
    return {name: (lambda left=left: next(left)) for name, left in each.items()}


# ---- the token path ------------------------------------------------------------------------------


def time_puts(backend: Backend) -> dict[str, Any]:
    """What handing over a finished trace costs the caller, microseconds."""
    record = os.urandom(16 << 10)
    recorder = Recorder(backend.open_trace_writer(LIMITS), 1024, 0.05, 64 << 20)
    recorder.start()
    taken = []
    for _ in range(PUTS):
        begun = time.perf_counter_ns()
        recorder.put(lambda: record)
        taken.append((time.perf_counter_ns() - begun) / 1000)
        time.sleep(0.0001)
    recorder.close(10.0)
    taken.sort()
    return {
        "p50_us": taken[PUTS // 2],
        "p99_us": taken[PUTS * 99 // 100],
        "p999_us": taken[PUTS * 999 // 1000],
        "max_us": taken[-1],
        "counts": recorder.counts(),
        "load": os.getloadavg()[0],
    }


def measure_hand_over(root: Path) -> Iterator[tuple[str, Any]]:
    yield "log", time_puts(open_backend("log:", root))
    server = RedisServer(valkey_binary())
    with Proxy(server.port) as proxy:
        proxy.stall()
        url = f"redis://127.0.0.1:{proxy.port}/0?run=hung&timeout_s=1&spool_bytes=8388608"
        yield "hung redis", time_puts(open_backend(url, root))
        proxy.flow()
    server.close()


# ---- the page ------------------------------------------------------------------------------------


def rows_of(found: dict[str, Any]) -> Iterator[Row]:
    """The claims of the figures that were measured."""
    goals = {"append": 0.8, "random": 0.7, "write": 0.8, "read": 0.8}
    for name, figure in found.items():
        if "ratios" in figure:
            for side, ratio in figure["ratios"].items():
                other = list(figure["medians"])[-1]
                goal = goals[name.partition(": ")[2].partition(" ")[0].rstrip(",")]
                yield at_least(name, f"{side} over {other}, bytes a second", ratio, goal)
        elif name.endswith("hung redis"):
            yield at_most(name, "p99.9 of Recorder.put, microseconds", figure["p999_us"], 1000)
        else:
            yield at_most(name, "p99 of Recorder.put, microseconds", figure["p99_us"], 50)


PARTS = ("log", "redis", "kafka", "hand-over")


def main(
    folder: Annotated[Path | None, typer.Option(help="where logs are written")] = None,
    parts: Annotated[str, typer.Option(help="what to measure")] = ",".join(PARTS),
    turns: Annotated[int, typer.Option(min=1, help="of each comparison")] = 5,
    mebibytes: Annotated[int, typer.Option(min=32, help="written in each turn")] = 128,
    publish: Annotated[bool, typer.Option(help="write rows/buffer.json, too")] = False,
    out: Annotated[Path, typer.Option(help="result file")] = RESULTS / "buffer.json",
    rows_dir: Annotated[Path, typer.Option(help="folder of rows/buffer.json")] = RESULTS,
) -> None:
    """Measure all parts."""
    found: dict[str, Any] = {}
    num_bytes = mebibytes << 20
    with folder_in(folder) as root:
        measured: dict[str, Callable[[], Iterator[tuple[str, Any]]]] = {
            "log": lambda: measure_log(root, num_bytes, turns),
            "redis": lambda: measure_redis(num_bytes, turns),
            "kafka": lambda: measure_kafka(root, LIMITS, num_bytes, turns, per_s, compare),
            "hand-over": lambda: measure_hand_over(root),
        }
        for part in known("part", parts.split(","), PARTS):
            for name, figure in measured[part]():
                found[f"{part}: {name}"] = figure
                brief = {k: v for k, v in figure.items() if k != "turns"}
                say(f"{part}: {name}: {brief}")
                write_result(out, found)
    if publish:
        write_rows("buffer", rows_of(found), "python -m benchmarks.buffer", rows_dir)


if __name__ == "__main__":
    typer.run(main)
