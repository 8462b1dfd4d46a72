"""What it takes to learn each trace once: memory of what was seen, and the time of each claim.

    python -m benchmarks.seen_traces     # a minute and a half on two cores

- **memory**: what ``buffer.seen.SeenTraces`` holds after 10 million numbers of one server in order,
  after 10 million of 20 million in random order, so that half of them are gaps, and after 100,000
  epochs, as of servers that were started so often; with the size of the same in a checkpoint. Each
  in a process of its own; generating the numbers is part of its time.
- **claims**: processor and wall time of asking a group which of 64 traces are new, for each backend
  whose groups are shared by processes, and what a server of Redis then holds of 200,000 traces that
  were learnt, half of whose neighbours were not. Brokers and readers share the two cores.

Writes ``benchmarks/results/seen_traces.json`` and, with ``--publish``, ``rows/seen_traces.json``.
"""

from __future__ import annotations

import json
import multiprocessing
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import redis
import typer

from benchmarks.harness.results import RESULTS, Out, Row, at_most, say, write_result, write_rows
from buffer.backends import open_backend
from buffer.interface import Backend, Record, TraceLimits
from buffer.redis_claims import RedisClaims
from buffer.redis_client import RedisClient
from buffer.redis_url import parse_redis_url
from buffer.seen import Identity, SeenTraces
from oracles.kafka_brokers import running_broker
from oracles.redis_servers import RedisServer, valkey_binary

NUM_TRACES, NUM_EPOCHS = 10_000_000, 100_000
AT_ONCE, NUM_CLAIMS = 64, 200
PER_S = 3000
LIMITS = TraceLimits(segment_bytes=1 << 20, max_bytes=1 << 28, ttl_s=3600.0, sync_interval_s=0.0)
_PIECE = 100_000


def traces_in_order() -> Iterator[Identity]:
    """As one server makes them."""
    for seq in range(NUM_TRACES):
        yield "server-1", 1, seq


def traces_with_gaps() -> Iterator[Identity]:
    """Every second one on average, in random order."""
    order = np.random.default_rng(0).permutation(2 * NUM_TRACES)[:NUM_TRACES].astype(np.int32)
    for at in range(0, NUM_TRACES, _PIECE):
        for seq in order[at : at + _PIECE].tolist():
            yield "server-1", 1, seq


def traces_of_epochs() -> Iterator[Identity]:
    """Five traces of each start of ten servers."""
    for epoch in range(NUM_EPOCHS):
        for seq in range(5):
            yield f"server-{epoch % 10}", 1_700_000_000_000 + epoch, seq


MEMORIES = {
    "10 million in order": traces_in_order,
    "10 million, 50 % gaps": traces_with_gaps,
    "100,000 epochs": traces_of_epochs,
}


def remember(name: str) -> dict[str, float]:
    """Fill a memory, and say what that took."""
    seen, begun = SeenTraces(), time.process_time()
    num_traces = _add_all(seen, MEMORIES[name]())
    add_s = time.process_time() - begun
    begun = time.process_time()
    stored = json.dumps(seen.to_json())
    stored_s = time.process_time() - begun
    return {
        "traces": num_traces,
        "add_us": add_s / num_traces * 1e6,
        "memory_mib": num_bytes(seen) / 2**20,
        "checkpoint_mib": len(stored) / 2**20,
        "checkpoint_s": stored_s,
    }


def _add_all(seen: SeenTraces, traces: Iterable[Identity]) -> int:
    num_traces = 0
    for trace in traces:
        assert seen.add(*trace)
        num_traces += 1
    return num_traces


def num_bytes(one: Any) -> int:
    """Bytes of an object and of all that it holds."""
    inside: list[Any] = []
    if isinstance(one, dict):
        inside = [*one.keys(), *one.values()]
    elif isinstance(one, tuple):
        inside = list(one)
    elif hasattr(one, "__slots__"):
        inside = [getattr(one, name) for name in one.__slots__]
    return sys.getsizeof(one) + sum(map(num_bytes, inside))


def requests(location: str) -> list[list[tuple[Record, Identity]]]:
    """Records of traces that nobody has claimed, ``AT_ONCE`` at a time."""
    return [
        [
            (Record(b"", "w1", location.format(number)), ("server-1", 1, number))
            for number in range(first, first + AT_ONCE)
        ]
        for first in range(0, NUM_CLAIMS * AT_ONCE, AT_ONCE)
    ]


def time_claims(backend: Backend, location: str) -> dict[str, float]:
    """Claim, as a trainer does after each read."""
    with backend.open_trace_writer(LIMITS) as writer:
        writer.append(b"x")
    member = backend.open_record_reader(group="trainer")
    while not member.read(1):
        time.sleep(0.01)
    wall, begun = list[float](), time.process_time()
    for found in requests(location):
        started = time.perf_counter()
        assert all(member.claim(found))
        wall.append(time.perf_counter() - started)
    cpu_s = time.process_time() - begun
    member.close()
    return {
        "cpu_us_per_trace": cpu_s / NUM_CLAIMS / AT_ONCE * 1e6,
        "wall_us_per_trace": statistics.median(wall) / AT_ONCE * 1e6,
        "cores_at_3000_a_second": cpu_s / NUM_CLAIMS / AT_ONCE * PER_S,
    }


def redis_memory(server: RedisServer, root: Path, num_traces: int) -> dict[str, float]:
    """Bytes that the server holds of traces that were learnt."""
    client = RedisClient(parse_redis_url(f"{server.url}?run=memory", root))
    claims = RedisClaims(client, "trainer")
    order = np.random.default_rng(0).permutation(2 * num_traces)[:num_traces].tolist()
    for first in range(0, num_traces, 500):
        numbers = range(first, min(first + 500, num_traces))
        found = [(Record(b"", "w1", str(n)), ("server-1", 1, order[n])) for n in numbers]
        assert all(claims.claim(found, lambda _: False))
        claims.commit("w1", numbers)
    keys = client.options.key("learnt", "trainer"), client.options.key("claims", "trainer")
    held = sum(client.call("MEMORY", "USAGE", key, "SAMPLES", 0) or 0 for key in keys)
    client.close()
    return {"traces": num_traces, "bytes_per_trace": held / num_traces}


def measure_claims(root: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Each backend's."""
    yield "log", time_claims(open_backend("log:", root), "0-{}")
    server = RedisServer(valkey_binary())
    try:
        url = f"{server.url}?run={secrets.token_hex(4)}"
        figures = time_claims(open_backend(url, root), "{}")
        with redis.Redis(port=server.port) as control:
            spent = control.info("commandstats")["cmdstat_eval"]["usec"]
        yield "Valkey", {**figures, "server_us_per_trace": spent / NUM_CLAIMS / AT_ONCE}
        yield "Valkey, memory", redis_memory(server, root, 200_000)
    finally:
        server.close()
    with running_broker("tansu", root / "tansu") as broker:
        url = f"kafka://{broker.address}/claims?partitions=1&batch_bytes=0"
        yield "Kafka (Tansu)", time_claims(open_backend(url, root), "0-{}")


def rows_of(memory: dict[str, Any], claims: dict[str, Any]) -> Iterator[Row]:
    """The claims."""
    bounds = {"10 million in order": 1.0, "10 million, 50 % gaps": 8.0, "100,000 epochs": 32.0}
    for name, figures in memory.items():
        yield at_most(name, "memory, MiB", figures["memory_mib"], bounds[name])
    for name, figures in claims.items():
        if "cores_at_3000_a_second" in figures:
            measure = f"cores that a trainer's claims of {PER_S} traces a second take"
            yield at_most(name, measure, figures["cores_at_3000_a_second"], 0.1)


def main(
    parts: Annotated[str, typer.Option(help="memory, claims")] = "memory,claims",
    publish: Annotated[bool, typer.Option(help="write rows/seen_traces.json, too")] = False,
    out: Out = RESULTS / "seen_traces.json",
) -> None:
    """Measure all parts."""
    wanted: Sequence[str] = parts.split(",")
    memory, claims = dict[str, Any](), dict[str, Any]()
    for name in MEMORIES if "memory" in wanted else ():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory[name] = pool.apply(remember, (name,))
        say(f"{name}: {memory[name]}")
    if "claims" in wanted:
        with tempfile.TemporaryDirectory() as folder:
            for name, figures in measure_claims(Path(folder)):
                claims[name] = figures
                say(f"{name}: {figures}")
    write_result(out, {"memory": memory, "claims": claims})
    if publish:
        rows = rows_of(memory, claims)
        write_rows("seen_traces", rows, "python -m benchmarks.seen_traces", RESULTS)


if __name__ == "__main__":
    typer.run(main)
