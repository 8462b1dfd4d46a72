"""Serving while the network to Redis or Kafka fails, and after it.

    python -m benchmarks.faults.network                       # 10 minutes of traffic for each
    python -m benchmarks.faults.network --seconds 60 --buffers redis

A server with the bundled target answers requests in a closed loop and records all of them. Between
it and the buffer's server is a proxy, in a process of its own, that makes one fault after another:
it cuts connections, delays what they carry, leaves them half open (nothing arrives, nobody is
told), resets them, or reads slowly. Each fault lasts some seconds, and as many without one follow.
A reader in another process, behind the same proxy, stands for the trainer.

- **serving**: the 99th percentile of the time of a request, with a fault and in the five seconds
  after it, over that without; the same less the time that the engine's thread was kept waiting for
  a core; and the processor time of that thread for each request (``request_times.py``). ``log`` has
  no network: there, the same windows without any fault show what noise alone does.
- **counts**: in the end, traces queued = written + dropped + failed, and what was written is what
  the reader has learnt, once each.
- **recovery**: from the end of a fault until all traces that waited then are acknowledged.

Run it on a machine with nothing else to do. Writes ``benchmarks/results/network.json`` and, with
``--publish``, ``rows/faults.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.faults.kills import Learnt, learn_for_ever
from benchmarks.faults.request_times import Moment, Pair, Window, clock_of, figures_of
from benchmarks.harness.results import (
    RESULTS,
    Row,
    at_most,
    known,
    say,
    write_result,
    write_rows,
)
from buffer.backends import open_backend
from oracles.kafka_brokers import Broker, free_port
from oracles.proxies import Proxy
from oracles.redis_servers import RedisServer, valkey_binary

# Not imported here: torch. Processes are forked before it starts threads.

BUFFERS = ("log", "redis", "kafka")
FAULTS = ("cut", "delay", "half-open", "reset", "slow reader")
MEASURES = {
    "p99": "p99 of a request",
    "own_p99": "p99 of a request less waiting for a core",
    "processor": "processor time of the engine for a request",
}
RECOVERY_S = 5.0
_FAULT_S = 10.0
_NUM_CLIENTS = 2
_MAX_TOKENS = 8
_DRAIN_S = 60.0


# ---- the network, in a process of its own --------------------------------------------------------


def _begin(proxy: Proxy, fault: str) -> None:
    if fault == "cut":
        proxy.refuses = True
        proxy.cut()
    elif fault == "reset":
        proxy.refuses = True
        proxy.reset()
    elif fault == "delay":
        proxy.delay_s = 0.2
    elif fault == "half-open":
        proxy.abandon()
    elif fault == "slow reader":
        proxy.bytes_per_s = 20_000.0
    else:
        proxy.flow()


class Network:
    """A proxy in a forked process."""

    def __init__(self, server_port: int) -> None:
        port_out, port_in = os.pipe()
        orders_out, self._orders = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._orders)
            with Proxy(server_port) as proxy:
                os.write(port_in, b"%d\n" % proxy.port)
                with os.fdopen(orders_out) as orders:
                    for line in orders:
                        _begin(proxy, line.strip())
            os._exit(0)
        os.close(orders_out)
        os.close(port_in)
        with os.fdopen(port_out) as answer:
            self.port = int(answer.readline())

    def begin(self, fault: str) -> None:
        """Begin a fault; ``flow`` ends it."""
        os.write(self._orders, f"{fault}\n".encode())

    def close(self) -> None:
        os.close(self._orders)
        os.waitpid(self._pid, 0)


@dataclass(frozen=True)
class Place:
    """A buffer behind a network."""

    name: str
    url: str
    network: Network | None


@contextlib.contextmanager
def running(name: str, folder: Path) -> Iterator[Place]:
    """A place of this name, with its server."""
    with contextlib.ExitStack() as stack:
        if name == "log":
            yield Place(name, "log:", None)
        elif name == "redis":
            server = RedisServer(valkey_binary(), {"appendfsync": "everysec"})
            stack.callback(server.close)
            network = Network(server.port)
            stack.callback(network.close)
            url = f"redis://127.0.0.1:{network.port}/0?run=network&timeout_s=1"
            yield Place(name, url, network)
        else:
            port = free_port()  # the broker must name the proxy's port, and is started after it
            network = Network(port)
            stack.callback(network.close)
            broker = Broker("tansu", folder / "tansu", port, advertised=network.port)
            stack.callback(broker.kill)
            url = f"kafka://127.0.0.1:{network.port}/network?partitions=1&timeout_s=1&session_s=60"
            yield Place(name, url, network)


# ---- traffic -------------------------------------------------------------------------------------


class Traffic:
    """Clients that ask again as soon as they have an answer."""

    def __init__(self, service: Any, clock: Callable[[], Moment]) -> None:
        self._service = service
        self._clock = clock
        self._answered: queue.SimpleQueue[tuple[int, Moment, str | None]] = queue.SimpleQueue()
        self._begun: dict[int, Moment] = {}
        self._chance = random.Random(0)
        self._number = 0
        for _ in range(_NUM_CLIENTS):
            self._ask()

    def run(self, until: Callable[[], bool]) -> Window:
        """Go on until something holds; returns the requests that were answered."""
        window, begun = Window(), self._clock()
        while not until():
            try:
                number, ended, error = self._answered.get(timeout=0.05)
            except queue.Empty:
                continue
            if error is not None:
                raise RuntimeError(f"a request failed: {error}")
            window.add(self._begun.pop(number), ended)
            self._ask()
        window.processor_s = self._clock().processor_s - begun.processor_s
        return window

    def end(self) -> None:
        """Wait for the answers that are still missing."""
        while self._begun:
            number, *_ = self._answered.get(timeout=60)
            del self._begun[number]

    def _ask(self) -> None:
        from serving.requests import Request, SamplingParams

        self._number += 1
        number = self._number
        prompt = tuple(self._chance.randrange(10, 1000) for _ in range(16))
        sampling = SamplingParams(max_tokens=_MAX_TOKENS, temperature=0.7, ignore_eos=True)

        def take(output: Any) -> None:  # on the engine's thread
            if output.finish_reason is not None:
                self._answered.put((number, self._clock(), output.error))

        self._begun[number] = self._clock()
        self._service.inbox.submit(Request(f"network-{number}", prompt, sampling), take)


@dataclass(slots=True)
class Measured:
    """Requests in pairs of windows, and how faults ended."""

    pairs: list[Pair] = field(default_factory=list)
    recoveries: dict[str, list[float | None]] = field(default_factory=dict)
    """Seconds by fault; ``None``: not before the next one."""


def for_seconds(seconds: float) -> Callable[[], bool]:
    end_s = time.monotonic() + seconds
    return lambda: time.monotonic() >= end_s


def measure(place: Place, service: Any, seconds: float, fault_s: float, after_s: float) -> Measured:
    """Traffic with faults and without, in turn."""
    found = Measured()
    (engine,) = (one for one in threading.enumerate() if one.name == "engine")
    traffic = Traffic(service, clock_of(engine))
    traffic.run(for_seconds(2.0))  # warm
    end_s = time.monotonic() + seconds
    turn = 0
    while turn < len(FAULTS) or time.monotonic() < end_s:
        fault = FAULTS[turn % len(FAULTS)]
        turn += 1
        if place.network is not None:
            place.network.begin(fault)
        faulty = traffic.run(for_seconds(fault_s))
        if place.network is not None:
            place.network.begin("flow")
        ended_s, waiting = time.monotonic(), service.figures().traces["queued"]
        recovered_s: list[float] = []

        def look(
            ended_s: float = ended_s, waiting: int = waiting, recovered_s: list[float] = recovered_s
        ) -> bool:
            if not recovered_s and _num_done(service.figures().traces) >= waiting:
                recovered_s.append(time.monotonic() - ended_s)
            return time.monotonic() - ended_s > after_s

        faulty += traffic.run(look)
        found.recoveries.setdefault(fault, []).append(recovered_s[0] if recovered_s else None)
        found.pairs.append(Pair(faulty, traffic.run(for_seconds(fault_s + after_s))))
    traffic.end()
    return found


def serve(
    place: Place, folder: Path, seconds: float, fault_s: float, after_s: float
) -> dict[str, Any]:
    """All figures of one buffer."""
    state = folder / "learnt.json"
    reader = os.fork()
    if reader == 0:
        try:
            learn_for_ever(open_backend(place.url, folder / "run"), state)
        finally:
            os._exit(1)
    from benchmarks.harness.engines import build
    from configs.load import load_settings

    chosen = [f"buffer.url={place.url}", f"run_dir={folder / 'run'}", "policy.kind=fixed"]
    chosen += ["policy.draft_k=0", "device=cpu", "engine.cpu_threads=1", "capture.enabled=true"]
    service, _ = build(load_settings([], chosen, {}))
    service.start()
    try:
        found = measure(place, service, seconds, fault_s, after_s)
        deadline_s = time.monotonic() + _DRAIN_S
        while _unsettled(service, state) and time.monotonic() < deadline_s:
            time.sleep(0.2)
    finally:
        service.stop()
    counts: dict[str, int] = service.figures().traces
    time.sleep(1.0)  # the reader's last checkpoint
    os.kill(reader, signal.SIGKILL)
    os.waitpid(reader, 0)
    learnt = Learnt.read(state)
    without = [one for pair in found.pairs for one in pair.quiet.taken_s]
    with_fault = [one for pair in found.pairs for one in pair.faulty.taken_s]
    waits = [one for several in found.recoveries.values() for one in several]
    return {
        "requests": [len(without), len(with_fault)],
        "p50_s": [statistics.median(without), statistics.median(with_fault)],
        "serving_s": figures_of(found.pairs),
        "recoveries_s": found.recoveries,
        "slowest_recovery_s": None
        if None in waits
        else max(one for one in waits if one is not None),
        "counts": counts,
        "learnt": _num_learnt(learnt),
        "learnt_twice": learnt.twice,
        "miscounted": abs(counts["queued"] - _num_done(counts))
        + abs(counts["written"] - _num_learnt(learnt))
        + learnt.twice,
        "load": os.getloadavg()[0],
    }


def _num_learnt(learnt: Learnt) -> int:
    return sum(bits.bit_count() for bits in learnt.seen.values())


def _num_done(counts: dict[str, int]) -> int:
    return counts["written"] + counts["dropped"] + counts["failed"]


def _unsettled(service: Any, state: Path) -> bool:
    counts: dict[str, int] = service.figures().traces
    return (
        _num_done(counts) < counts["queued"] or _num_learnt(Learnt.read(state)) < counts["written"]
    )


# ---- the page ------------------------------------------------------------------------------------


def rows_of(found: dict[str, Any]) -> Iterator[Row]:
    for name, figure in found.items():
        row = f"{name}: {', '.join(FAULTS)}" if name != "log" else "log: no network, noise alone"
        for key, measure in MEASURES.items():
            compared = figure["serving_s"][key]
            yield at_most(
                row, f"{measure} with faults over without", round(compared["ratio"], 4), 1.02
            )
            least, most = (f"{bound:.3f}" for bound in compared["interval"])
            yield Row(row, f"95 % interval of that: {measure}", f"{least} to {most}", None, None)
        yield at_most(row, "traces miscounted", figure["miscounted"], 0)
        if name != "log":
            slowest = figure["slowest_recovery_s"]
            yield at_most(row, "slowest recovery, s", slowest, RECOVERY_S)


def main(
    buffers: Annotated[str, typer.Option(help="of: log, redis, kafka")] = ",".join(BUFFERS),
    seconds: Annotated[float, typer.Option(min=1, help="of traffic for each buffer")] = 600.0,
    fault_s: Annotated[float, typer.Option(min=0.5, help="length of a fault")] = _FAULT_S,
    after_s: Annotated[float, typer.Option(min=0.1, help="counted as recovery")] = RECOVERY_S,
    publish: Annotated[bool, typer.Option(help="write rows/faults.json, too")] = False,
    out: Annotated[Path, typer.Option(help="result file")] = RESULTS / "network.json",
    rows_dir: Annotated[Path, typer.Option(help="folder of rows/faults.json")] = RESULTS,
) -> None:
    """Serve over a failing network, each buffer in a process of its own."""
    found: dict[str, Any] = {}
    for name in known("buffer", buffers.split(","), BUFFERS):
        found[name] = _in_process(name, seconds, fault_s, after_s)
        say(f"{name}: {found[name]}")
        write_result(out, found)
    if publish:
        write_rows("faults", rows_of(found), "python -m benchmarks.faults.network", rows_dir)


def _in_process(name: str, seconds: float, fault_s: float, after_s: float) -> dict[str, Any]:
    """Forked before torch is imported, so that it can fork in turn."""
    assert "torch" not in sys.modules, "torch has started threads, and processes must be forked"
    folder = Path(tempfile.mkdtemp(prefix=f"network-{name}-"))
    result = folder / "result.json"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with running(name, folder) as place:
                result.write_text(json.dumps(serve(place, folder, seconds, fault_s, after_s)))
            status = 0
        except BaseException:  # the process's outermost loop
            import traceback

            traceback.print_exc()
        os._exit(status)
    os.waitpid(child, 0)
    try:
        answer: dict[str, Any] = json.loads(result.read_bytes())
    except FileNotFoundError:
        raise RuntimeError(f"{name}: the server ended; see above") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return answer


if __name__ == "__main__":
    typer.run(main)
