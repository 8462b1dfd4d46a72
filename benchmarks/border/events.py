"""What an event of a stream costs the engine's process and an HTTP process, without a target.

A thread stands for the engine: at every step it makes one output of one token for each request that
runs, as ``serving.engine.outputs`` does, and hands it over. All else is the server's own: the
border, an HTTP process, its application. Clients read lines in processes of their own. Processor
time is counted, so other work on the machine matters by its caches only.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import benchmarks.border.speed as speed
from benchmarks.harness.results import Row, say
from configs.load import load_settings
from configs.schema import Settings
from serving.border.engine_side import Line, welcome_for
from serving.border.processes import Spawned, Spawner
from serving.engine.handover import Handover
from serving.http.port import bind
from serving.requests import OnOutput, Output, Request, SpeculationStats
from serving.served_model import ServedModel
from targets.files import read_target

_TICK = os.sysconf("SC_CLK_TCK")


class PacedDesk:
    """A ``serving.border.in_process.Desk`` of an engine that does nothing but make outputs."""

    can_swap = False

    def __init__(self, model: ServedModel, step_s: float) -> None:
        """
        Args:
            step_s: time from one step to the next, at least.
        """
        self.model = model
        self.num_outputs = 0
        self.spent_s = 0.0
        """Processor time of the thread that stands for the engine."""
        self._step_s = step_s
        self._handover = Handover()
        self.put_off = self._handover.put_off
        self._running: dict[str, tuple[Request, OnOutput, list[int]]] = {}
        self._arrived: list[tuple[Request, OnOutput]] = []
        self._lock = threading.Lock()
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="paced engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_over = True
        self._thread.join()

    def submit(self, requests: Sequence[Request], on_output: OnOutput) -> None:
        with self._lock:
            self._arrived += [(request, on_output) for request in requests]

    def cancel(self, request_ids: Iterable[str]) -> None:
        for one in request_ids:
            self._running.pop(one, None)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def _run(self) -> None:
        due_s = time.perf_counter()
        while not self._is_over:
            for request, on_output in self._admitted():
                self._running[request.id] = request, on_output, [0]
            begun_s = time.thread_time()
            self._step()
            self._handover.run()
            self.spent_s += time.thread_time() - begun_s
            due_s = max(due_s + self._step_s, time.perf_counter())
            time.sleep(max(0.0, due_s - time.perf_counter()))

    def _admitted(self) -> list[tuple[Request, OnOutput]]:
        """Requests that begin in the next step."""
        with self._lock:
            arrived, self._arrived = self._arrived, []
        return arrived

    def _step(self) -> None:
        ended = []
        for request, on_output, count in list(self._running.values()):
            count[0] += 1
            is_last = count[0] >= request.sampling.max_tokens
            stats = SpeculationStats(0, count[0], 0, 0)
            reason = "length" if is_last else None
            on_output(
                Output(
                    request.id, " token", (1000 + count[0],), None, reason, stats,
                    len(request.prompt_ids), 0,
                )
            )  # fmt: skip
            if is_last:
                ended.append(request.id)
        self.num_outputs += len(self._running)
        self.cancel(ended)


Desk = TypeVar("Desk", bound=PacedDesk)


@dataclass(frozen=True, slots=True)
class Spent:
    """One turn."""

    outputs_per_s: float
    events_per_s: float
    engine_us: float
    """Of the engine's thread, by output."""
    border_us: float
    """Of all other threads of the engine's process."""
    http_us: float
    """Of the HTTP process, by output."""


def measure(clients: int, step_ms: float, seconds: float) -> Spent:
    """Stream for some seconds."""
    with (
        tempfile.TemporaryDirectory() as name,
        paced_server(Path(name), step_ms / 1e3, PacedDesk) as server,
    ):
        desk, spawned, port = server
        load = speed.Load((), desk.model.vocab_size, seconds, None)
        parts = [
            min(speed.CLIENTS_EACH, clients - at) for at in range(0, clients, speed.CLIENTS_EACH)
        ]
        context, stop = multiprocessing.get_context("spawn"), Path(name) / "stop"
        with ProcessPoolExecutor(len(parts), context) as pool:
            jobs = [
                pool.submit(speed.run_clients, port, load, part, seed, stop)
                for seed, part in enumerate(parts)
            ]
            try:
                while desk.num_running < 0.9 * clients:
                    time.sleep(0.05)
                time.sleep(speed.WARM_S)
                before, from_s = _spent(desk, spawned.process.pid), time.time()
                time.sleep(seconds)
                after, to_s = _spent(desk, spawned.process.pid), time.time()
            finally:
                stop.touch()
            events = sum(from_s <= at_s < to_s for job in jobs for at_s, _ in job.result())
    num, own_s, all_s, http_s = (b - a for a, b in zip(before, after, strict=True))
    took_s = to_s - from_s
    return Spent(
        num / took_s, events / took_s, 1e6 * own_s / num, 1e6 * (all_s - own_s) / num,
        1e6 * http_s / num,
    )  # fmt: skip


def _spent(desk: PacedDesk, pid: int) -> tuple[int, float, float, float]:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    http_s = (int(fields[11]) + int(fields[12])) / _TICK
    return desk.num_outputs, desk.spent_s, time.process_time(), http_s


@contextlib.contextmanager
def paced_server(
    folder: Path,
    step_s: float,
    kind: Callable[[ServedModel, float], Desk],
    chosen: Sequence[str] = (),
) -> Iterator[tuple[Desk, Spawned, int]]:
    """The paced engine with one HTTP process.

    Args:
        kind: makes the engine.
        chosen: settings.
    """
    own = (f"run_dir={folder}/run", "server.port=0")
    settings: Settings = load_settings((), (*own, *chosen), {})
    files = read_target(settings.target, settings.target_cache)
    model = ServedModel("paced", files.tokenizer, files.config.vocab_size, 2048, 4, 0)
    listener = bind(settings)
    spawner, desk = Spawner(1, listener), kind(model, step_s)
    spawned = spawner.spawn(0)
    orders: Any = None  # nobody asks what takes long
    line = Line(spawned.sock, desk, welcome_for(desk, settings, files.folder), orders)  # type: ignore[arg-type]
    line.start()
    try:
        while not line.is_ready:
            time.sleep(0.02)
        yield desk, spawned, listener.getsockname()[1]
    finally:
        desk.close()
        line.close_http(0.0)
        spawned.process.kill()
        spawned.process.wait()
        line.end()
        spawner.close()
        listener.close()


def rows_of(turns: Sequence[Spent], clients: int) -> Iterator[Row]:
    """The figures of some turns."""
    case = f"paced engine, 1 HTTP process, {clients} streams, one token an output"
    for measure_, name in (
        ("microseconds of the engine's thread, by output", "engine_us"),
        ("microseconds of other threads of the engine's process, by output", "border_us"),
        ("microseconds of the HTTP process, by output", "http_us"),
        ("outputs/s", "outputs_per_s"),
    ):
        values = [getattr(turn, name) for turn in turns]
        yield Row(case, f"{measure_}, median", statistics.median(values), None, None)


def measure_turns(clients: int, step_ms: float, seconds: float, turns: int) -> list[Spent]:
    found = []
    for turn in itertools.islice(itertools.count(1), turns):
        found.append(measure(clients, step_ms, seconds))
        say(f"turn {turn}: {found[-1]}")
    return found
