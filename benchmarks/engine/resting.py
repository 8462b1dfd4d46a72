"""What a policy at rest costs: how long the device waits for the host beside drafts that never pay.

    python -m benchmarks.engine.resting                       # two minutes on one core

As in ``benchmarks.engine.host``, a stand-in takes the place of the device, and rounds overlap as on
a GPU: the next one is launched while the last one runs, and the host's work between two launches
is free if it takes no longer than the device does. Whatever it takes longer, the device waits, so
a step that is long now and then costs more than its share of the average. All times are those of a
clock that runs with the engine's thread and jumps where that waits for the device, so other work
on the machine counts only by the caches it spoils.

The policy decides for a drafter with random weights, of which no token is kept, and has learned so
over thousands of steps. Requests end and begin all the time, as those of chat clients do: answers
have 60 to 150 tokens, and a client's next request comes some steps after its last answer. Windows
of two arms alternate: requests that allow no drafts, and requests for which the policy decides.

``device_waits`` is the share of a window in which the device had nothing to do, and ``host_us`` the
thread's time a step; both are medians over windows. ``over_plain`` is the median, over pairs of
adjacent windows, of the tokens per second with the policy relative to those without drafts. What
the stand-in takes to draw its outcomes counts as the host's: a launch takes as long.

Writes ``benchmarks/results/resting.json`` after every case, and ``rows/resting.json``.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.engine.host import Meter, StandIn, host_engine, metered, patched
from benchmarks.harness.engines import Built
from benchmarks.harness.loops import clear
from benchmarks.harness.results import RESULTS, Out, Row, at_least, write_each, write_rows
from serving.engine.cuda_graphs import Landing
from serving.engine.loop import Engine
from serving.requests import Output, Request, SamplingParams

DEVICE_MS = {1: 0.25, 8: 0.25, 32: 0.33, 64: 0.37, 128: 0.4}
"""Milliseconds of a plain step by batch: those of SmolLM2-135M on an H200, divided by three, as
this machine's cores are that much faster than those beside the card."""
GOAL = 0.985
_DRAFT_COST = 0.12
"""Time that a draft token takes, as a share of a plain step."""
_NUM_PROMPT, _ANSWERS = 48, (60, 150)
_AWAY_STEPS = 3
"""Steps between the end of a client's answer and its next request."""
_FULL_COLLECTION = 1000
"""Full collections are as rare as in a server, see ``Service.start``."""
ARMS = {"plain": 0, "policy": None}
"""``Request.max_draft``."""


class Device(StandIn):
    """A device with a clock of its own: that of the host's thread, and what the host waits."""

    def __init__(self, engine: Engine, plain_s: float) -> None:
        super().__init__(engine, 0.0, plain_s)
        self._plain_s = plain_s
        self.host_waited_s = self.waited_s = 0.0
        """Seconds that the host and the device had nothing to do."""

    def now_s(self) -> float:
        """In place of ``time.perf_counter``."""
        return time.thread_time() + self.host_waited_s

    def wait(self, landing: Landing) -> bool:
        left_s = self._landings_s[id(landing)] - self.now_s()
        self.host_waited_s += max(left_s, 0.0)
        return left_s > 0

    def _round(self, key: Any) -> None:
        self._device_s = self._plain_s * (1 + _DRAFT_COST * key.num_draft)
        super()._round(key)
        self._device_s = self._plain_s

    def _take_time(self) -> None:
        self.waited_s += max(0.0, -self.left_s)
        super()._take_time()

    @contextmanager
    def at_work(self, engine: Engine) -> Iterator[None]:
        """The engine runs on this device and on its clock."""
        clock, thresholds = {(time, "perf_counter"): self.now_s}, gc.get_threshold()
        gc.set_threshold(*thresholds[:2], _FULL_COLLECTION)
        try:
            with metered(engine, self, Meter(time.thread_time_ns), {}), patched(clock):
                yield
        finally:
            gc.set_threshold(*thresholds)


class Clients:
    """Keep requests of one arm under way."""

    def __init__(self, engine: Engine, num: int, temperature: float, *, captures: bool) -> None:
        self._engine, self._temperature, self._captures = engine, temperature, captures
        self._num, self._num_sent = num, 0
        self.arm = "policy"
        self._due: deque[int] = deque()
        """Steps at which requests begin, in order."""
        self.begin(0)

    def begin(self, seed: int) -> None:
        """Start over, once no request is left."""
        self._numbers, self._step = np.random.default_rng(seed), 0
        self._due = deque([0] * self._num)

    def step(self) -> None:
        """Send what is due, and run a step."""
        while self._due and self._due[0] <= self._step:
            self._due.popleft()
            self._send()
        self._engine.step()
        self._step += 1

    def _send(self) -> None:
        sampling = SamplingParams(
            temperature=self._temperature,
            max_tokens=int(self._numbers.integers(*_ANSWERS)),
            ignore_eos=True,
        )
        prompt = tuple(self._numbers.integers(40, size=_NUM_PROMPT).tolist())
        self._num_sent += 1
        request = Request(
            f"resting-{self._num_sent}", prompt, sampling,
            max_draft=ARMS[self.arm], capture=self._captures,
        )  # fmt: skip

        def heard(output: Output) -> None:
            if output.finish_reason is not None:
                self._due.append(self._step + _AWAY_STEPS)

        self._engine.inbox.submit(request, heard)


@dataclass(frozen=True, slots=True)
class Window:
    """One arm for some steps."""

    tokens_per_s: float
    device_waits: float
    host_us: float
    planned: float
    """Share of its steps that were planned,"""
    drafted: float
    """and of those with drafts."""


def take_window(clients: Clients, device: Device, engine: Engine, num_steps: int) -> Window:
    """Run steps of the arm that the clients are at."""
    began_s, waited_s, counts = device.now_s(), device.waited_s, _counts(engine)
    host_waited_s = device.host_waited_s
    for _ in range(num_steps):
        clients.step()
    seconds = device.now_s() - began_s
    host_s = seconds - (device.host_waited_s - host_waited_s)
    counts = _counts(engine) - counts
    return Window(
        counts["tokens"] / seconds,
        (device.waited_s - waited_s) / seconds,
        1e6 * host_s / num_steps,
        counts["planned"] / num_steps,
        counts["drafted"] / num_steps,
    )


def _counts(engine: Engine) -> Counter[str]:
    figures = engine.figures()
    arms = figures.steps_by_arm
    drafted = sum(count for (_, k), count in arms.items() if k)
    decisions = engine.policy.figures()["decisions"]
    planned = sum(count for reason, count in decisions.items() if reason != "rest")
    return Counter(tokens=figures.generation_tokens, drafted=drafted, planned=planned)


def measure(
    built: Built,
    batch: int,
    temperature: float,
    device_ms: float,
    *,
    num_steps: int,
    pairs: int,
    settled: int,
    captures: bool,
) -> dict[str, Any]:
    """All windows of a case."""
    engine = built.engine
    engine.policy = built.policy.own
    device = Device(engine, device_ms / 1e3)
    clients = Clients(engine, batch, temperature, captures=captures)
    found: dict[str, list[Window]] = {arm: [] for arm in ARMS}
    with device.at_work(engine):
        for _ in range(settled):
            clients.step()
        for pair in range(pairs):
            for clients.arm in ARMS if pair % 2 else reversed(ARMS):
                clear(engine)
                clients.begin(pair)  # both arms of a pair have the same requests at the same steps
                take_window(clients, device, engine, max(_ANSWERS))
                found[clients.arm].append(take_window(clients, device, engine, num_steps))
        clear(engine)
    both = list(zip(*found.values(), strict=True))
    ratios = [policy.tokens_per_s / plain.tokens_per_s for plain, policy in both]

    def median(arm: str, name: str) -> float:
        return statistics.median(getattr(window, name) for window in found[arm])

    return {
        "batch": batch,
        "temperature": temperature,
        "captures": captures,
        "device_ms": device_ms,
        "over_plain": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios)[::2],
        **{
            f"{name}_{arm}": median(arm, name)
            for name in ("device_waits", "host_us")
            for arm in ARMS
        },
        "planned": median("policy", "planned"),
        "drafted": statistics.mean(window.drafted for window in found["policy"]),
    }


def main(
    out: Out = RESULTS / "resting.json",
    batches: Annotated[str, typer.Option(help="comma-separated")] = "8,32,128",
    temperatures: Annotated[str, typer.Option(help="comma-separated")] = "0.7",
    num_steps: Annotated[int, typer.Option(help="steps of a window")] = 1500,
    pairs: int = 10,
    settled: Annotated[int, typer.Option(help="steps before the first window")] = 6000,
    captures: Annotated[bool, typer.Option(help="requests leave traces")] = True,
) -> None:
    """Measure all cases, each with a policy that starts over."""
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []

    def cases() -> Iterator[dict[str, Any]]:
        for size, heat in itertools.product(batches.split(","), temperatures.split(",")):
            with host_engine(int(size), ("drafter.suffix.enabled=false",)) as built:
                found.append(
                    measure(
                        built, int(size), float(heat), DEVICE_MS[int(size)],
                        num_steps=num_steps, pairs=pairs, settled=settled, captures=captures,
                    )
                )  # fmt: skip
            yield found[-1]

    with torch.inference_mode():
        write_each(out, cases())
    write_rows("resting", map(row_of, found), "python -m benchmarks.engine.resting", out.parent)


def row_of(case: dict[str, Any]) -> Row:
    """The claim of a case."""
    return at_least(
        f"{case['batch']} requests, temperature {case['temperature']:g}",
        "tokens/s, policy with a drafter of random weights over no drafts, beside a stand-in for "
        "the device",
        case["over_plain"],
        GOAL,
    )


if __name__ == "__main__":
    typer.run(main)
