"""How many rows a trainer on a server's device learns after a start and after a shift, and what
that costs serving, by ``trainer.burst``. Simulated: no device is needed.

    python -m benchmarks.burst          # some seconds

The trainer's own rule (``trainer.duty``) runs beside a simulated server on a clock of its own, with
what was measured on an H200 with a target of 135 M parameters and 32 clients
(``results/sharing.json``): an update of 960 rows takes 23 ms when the trainer never rests, and
costs the server 37 % of its speed meanwhile. Learning is urgent for a minute from the start on, and
for a minute after the traffic has shifted a quarter of an hour later.

Writes ``benchmarks/results/burst.json``.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer

from benchmarks.harness.results import RESULTS, Out, say, write_result
from buffer.load import Load
from policies.sharing import Sharing
from trainer.allowance import Allowance
from trainer.duty import Duty

PASS_S, UPDATE_S, ROWS = 0.002, 0.023, 960
SLOWDOWN, MOST, RUNNING = 0.37, 0.05, 32
SHIFT_S, URGENT_S, END_S = 900.0, 60.0, 1800.0
AFTER_S = (10.0, 30.0, 60.0)
"""Times after a start or a shift at which rows are counted."""
_SLICE_S = 1.0
_WINDOWS_S = (5.0, 60.0, 600.0)
"""Windows whose worst loss is looked for."""


class Server(threading.Event):
    """A server that decodes all the time, more slowly beside updates. Its clock is everybody's."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = self.passes = 0.0

    def clock(self) -> float:
        return self.now_s

    def read(self) -> Load:
        whole = int(self.passes)
        return Load(whole, RUNNING * whole, self.now_s, RUNNING, self.now_s, "GPU")

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.run(timeout, 1.0)
        return False

    def run(self, seconds: float, speed: float) -> None:
        """Time goes by."""
        self.now_s += seconds
        self.passes += seconds * speed / PASS_S


@dataclass(frozen=True, slots=True)
class Looked:
    """What had happened by some time."""

    at_s: float
    rows: int
    lost_s: float


def simulated(burst: float | None, window_s: float) -> list[Looked]:
    """About every second of half an hour."""
    server, rows = Server(), 0
    allowance = None if burst is None else Allowance(MOST, burst, window_s)
    sharing = Sharing(MOST)
    duty = Duty(
        sharing=sharing, allowance=allowance, server=server, device="GPU", stop=server,
        clock=server.clock,
    )  # fmt: skip
    seen = [Looked(0.0, 0, 0.0)]
    while server.now_s < END_S:
        if allowance is not None:
            if server.now_s % SHIFT_S < URGENT_S:
                allowance.hurry("drafter", "")
            else:
                allowance.calm("drafter")
        duty.begin()
        server.run(UPDATE_S, 1 - SLOWDOWN)
        rows += ROWS
        duty.rest(UPDATE_S, lambda: None)
        if server.now_s >= seen[-1].at_s + _SLICE_S:
            lost_s = server.now_s - server.passes * PASS_S
            seen.append(Looked(server.now_s, rows, lost_s))
    return seen


def between(seen: Sequence[Looked], begin_s: float, end_s: float) -> Looked:
    """What happened in between."""
    begin, end = (
        next((one for one in seen if one.at_s >= at_s), seen[-1]) for at_s in (begin_s, end_s)
    )
    return Looked(end.at_s - begin.at_s, end.rows - begin.rows, end.lost_s - begin.lost_s)


def worst_loss(seen: Sequence[Looked], window_s: float) -> float:
    """Largest share of its speed that serving lost over so long."""
    begins = (one.at_s for one in seen if one.at_s + window_s <= END_S)
    windows = (between(seen, begin_s, begin_s + window_s) for begin_s in begins)
    return max(one.lost_s / one.at_s for one in windows)


def figures_of(burst: float | None, window_s: float) -> dict[str, Any]:
    """One setting."""
    seen = simulated(burst, window_s)
    return {
        "burst": burst,
        "window_s": window_s,
        "rows_after_start": [between(seen, 0.0, s).rows for s in AFTER_S],
        "rows_after_shift": [between(seen, SHIFT_S, SHIFT_S + s).rows for s in AFTER_S],
        "rows": seen[-1].rows,
        "loss": seen[-1].lost_s / seen[-1].at_s,
        "worst_loss": {f"{s:g} s": worst_loss(seen, s) for s in _WINDOWS_S},
    }


def main(out: Out = RESULTS / "burst.json") -> None:
    """Simulate without bursts and with some."""
    found = []
    for burst, window_s in ((None, 600.0), (0.1, 600.0), (0.2, 600.0), (0.3, 600.0), (0.2, 1800.0)):
        found.append(figures_of(burst, window_s))
        say(str(found[-1]))
    write_result(out, {"after_s": AFTER_S, "slowdown": SLOWDOWN, "most": MOST, "rows": found})


if __name__ == "__main__":
    typer.run(main)
