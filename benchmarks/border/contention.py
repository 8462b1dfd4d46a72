"""What the border costs the engine's loop, without a target.

The engine's own loop decodes 128 requests, with a stand-in for the device: a program takes as long
as one of a small target on an H200, and the engine's thread waits for it without the GIL. The other
side of each border is a process that submits requests and decodes outputs, nothing else, so two
cores suffice. What is lost against the same loop without a border went to delivering: its own time,
and the time for which other threads of the process held the GIL while the engine's thread wanted
it. On a loaded machine, times of steps say little, and how often the thread waited says more.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness.results import Row, say
from configs.load import load_settings
from serving.border.messages import (
    VERSION,
    FromEngine,
    Hello,
    Outputs,
    Submit,
    frame,
)
from serving.framing import Frames
from serving.requests import OnOutput, Output, Request
from serving.sampling import SamplingParams
from serving.served_model import ServedModel

NUM_STREAMS = 128
PROMPT_TOKENS, STREAM_TOKENS = 48, 464
WARM_S = 1.0


@dataclass(frozen=True, slots=True)
class Steps:
    """One measurement."""

    num_readers: int
    """Processes at the other ends; 0: outputs are made and dropped."""
    step_ms: float
    """Median of a step."""
    cpu_ms: float
    """Processor time of the engine's thread, by step."""
    num_waits: float
    """How often the engine's thread gave up its core by itself, by step: once for the device, and
    whenever another thread held the GIL."""
    share: float
    """Steps per second, over those without a border in the same round."""


class LoopDesk:
    """A ``serving.border.in_process.Desk`` of an engine without a service."""

    can_swap = False

    def __init__(self, engine: Any) -> None:
        self.model = ServedModel("stand-in", None, 1 << 16, 2048, 4, 0)
        self._inbox = engine.inbox
        self.put_off: Callable[[Callable[[], None]], None] = self._inbox.handover.put_off

    def submit(self, requests: Sequence[Request], on_output: OnOutput) -> None:
        self._inbox.submit_all(requests, on_output)

    def cancel(self, request_ids: Iterable[str]) -> None:
        for one in request_ids:
            self._inbox.cancel(one)


def measure(readers: Sequence[int], device_ms: float, seconds: float, rounds: int) -> list[Steps]:
    """Time steps with each number of readers, interleaved with steps without any."""
    import torch

    from benchmarks.engine.host import host_engine

    torch.set_num_threads(1)
    found: list[Steps] = []
    with torch.inference_mode(), host_engine(NUM_STREAMS) as built:
        engine = built.engine
        engine.policy = _plain()
        with _beside_a_device(engine, device_ms / 1e3) as steps_s:
            engine.start()
            for _ in range(rounds):
                turn = [_steps(engine, steps_s, num, seconds) for num in (0, *readers)]
                found += [replace(one, share=turn[0].step_ms / one.step_ms) for one in turn]
                for one in found[-len(turn) :]:
                    say(f"{one}")
            engine.stop()
    return found


def _plain() -> Any:
    from policies.fixed import FixedPolicy

    return FixedPolicy("none", 0)


@contextmanager
def _beside_a_device(engine: Any, device_s: float) -> Iterator[list[float]]:
    """Let the stand-in work. Yields the seconds of each step of a full batch."""
    from benchmarks.engine.host import StandIn, patched
    from serving.engine.cuda_graphs import Landing

    stand_in = StandIn(engine, 0.0, device_s)
    steps_s: list[float] = []
    right = engine.step

    def wait(_landing: Landing) -> bool:
        left_s = stand_in.left_s
        if left_s > 0:
            time.sleep(left_s)
        return left_s > 0

    def step() -> bool:
        begun_s = time.perf_counter()
        did = right()
        if engine.scheduler.num_running == NUM_STREAMS:
            steps_s.append(time.perf_counter() - begun_s)
        return bool(did)

    changes: dict[tuple[Any, str], Any] = {
        (engine, "step"): step,
        (engine.programs.rounds, "_program"): stand_in.round_program,
        (engine.programs.prefill, "_program"): stand_in.prompt_program,
        (Landing, "wait"): wait,
    }
    for rows in engine.drafting.neural.values():
        changes[rows, "_program"] = stand_in.other_program
    with patched(changes):
        yield steps_s


def _steps(engine: Any, steps_s: list[float], num_readers: int, seconds: float) -> Steps:
    """Look at the steps of some seconds."""
    with _readers(engine, num_readers):
        while engine.scheduler.num_running < NUM_STREAMS:
            time.sleep(0.05)
        time.sleep(WARM_S)
        steps_s.clear()
        before = _spent(engine)
        time.sleep(seconds)
        after, num = _spent(engine), len(steps_s)
        step_ms = 1e3 * statistics.median(steps_s)
    while engine.inbox.num_inflight():
        time.sleep(0.05)
    cpu_ns, waits = (b - a for a, b in zip(before, after, strict=True))
    return Steps(num_readers, step_ms, cpu_ns / 1e6 / num, waits / num, 1.0)


def _spent(engine: Any) -> tuple[int, int]:
    """Nanoseconds of the engine's thread on a core, and how often it gave one up by itself."""
    task = Path(f"/proc/self/task/{engine._thread.native_id}")
    lines = (task / "status").read_text().splitlines()
    (waits,) = (line for line in lines if line.startswith("voluntary_ctxt_switches"))
    return int((task / "schedstat").read_text().split()[0]), int(waits.split()[1])


@contextmanager
def _readers(engine: Any, count: int) -> Iterator[None]:
    """Keep the engine busy from so many processes, or from this one."""
    from serving.border.engine_side import Line, welcome_for

    desk = LoopDesk(engine)
    if count == 0:
        feed = _Feed(lambda requests: desk.submit(requests, feed.take))
        feed.begin(0, NUM_STREAMS)
        yield
        feed.is_over = True
        engine.inbox.cancel_all()
        return
    welcome = welcome_for(desk, load_settings((), (), {}), Path())  # type: ignore[arg-type]
    context = multiprocessing.get_context("spawn")
    orders: Any = None  # nobody asks what takes long
    lines, processes = [], []
    for number in range(count):
        own, other = socket.socketpair()
        line = Line(own, desk, welcome, orders)  # type: ignore[arg-type]
        line.start()
        lines.append(line)
        with other:
            arguments = (other, number, NUM_STREAMS // count)
            processes.append(context.Process(target=_read, args=arguments))
            processes[-1].start()
    try:
        yield
    finally:
        for line in lines:
            line.end()
        for process in processes:
            process.join()


class _Feed:
    """Keeps requests in flight: for each that has finished, another one is submitted."""

    def __init__(self, submit: Callable[[list[Request]], None]) -> None:
        self._submit = submit
        self._num = 0
        self.is_over = False

    def begin(self, reader: int, count: int) -> None:
        self._reader = reader
        for _ in range(count):
            self._next()

    def take(self, output: Output) -> None:
        if output.finish_reason is not None and not self.is_over:
            self._next()

    def _next(self) -> None:
        self._num += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=STREAM_TOKENS, ignore_eos=True)
        name = f"cmpl-{self._reader:016}{self._num:016}-0"
        prompt = tuple(range(self._num % 7, PROMPT_TOKENS + self._num % 7))
        self._submit([Request(name, prompt, sampling, capture=False)])


def _read(sock: socket.socket, number: int, count: int) -> None:
    """The other side of a border."""
    feed = _Feed(lambda requests: sock.sendall(frame(Submit(1, requests))))
    frames: Frames[FromEngine] = Frames(FromEngine)
    sock.sendall(frame(Hello(VERSION)))
    feed.begin(number, count)
    while data := sock.recv(1 << 18):
        for message in frames.feed(data):
            if isinstance(message, Outputs):
                for output in message.outputs:
                    feed.take(output)


def rows_of(found: Sequence[Steps], device_ms: float) -> Iterator[Row]:
    """Medians over the rounds."""
    for num in dict.fromkeys(one.num_readers for one in found):
        own = [one for one in found if one.num_readers == num]
        case = (
            f"engine's loop beside a stand-in of {device_ms:g} ms, {NUM_STREAMS} streams, "
            f"{num} processes read"
        )
        for measure_, name in (
            ("steps/s of those without a border", "share"),
            ("waits of the engine's thread, by step", "num_waits"),
            ("processor time of the engine's thread, by step, ms", "cpu_ms"),
        ):
            value = statistics.median(getattr(one, name) for one in own)
            yield Row(case, f"{measure_}, median", value, None, None)
