"""What the demo prints: a live panel on a terminal, plain lines elsewhere, and the summary."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from examples.recording import Answer
from examples.report import (
    busy_line,
    checks,
    headline,
    learning_line,
    phase_rows,
    shown,
    tokens_per_step,
    verdict,
)

RECENT_S = 10.0
LINE_EVERY_S = 5.0
BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 56


@dataclass(frozen=True, slots=True)
class Now:
    """State of the demo at one moment."""

    phases: tuple[str, ...]
    phase: str
    """One of ``phases``, or ``replay``."""
    phase_s: float
    """Seconds since it began."""
    share: float
    """Share of the phase that is over, 0..1."""
    at_s: float
    """Seconds since the demo began."""
    answers: tuple[Answer, ...]
    """All answers so far."""
    version: int
    newest_version: int
    swaps: int
    rollbacks: int
    failed: int

    @property
    def staleness(self) -> int:
        return self.newest_version - self.version

    @property
    def recent(self) -> tuple[Answer, ...]:
        """Answers of this phase that finished within the last ``RECENT_S``."""
        return tuple(
            answer
            for answer in self.answers
            if answer.phase == self.phase and answer.finished_s > self.at_s - RECENT_S
        )

    @property
    def tokens_per_s(self) -> float | None:
        recent = self.recent
        if not recent or self.phase_s <= 0:
            return None
        return sum(answer.num_tokens for answer in recent) / min(RECENT_S, self.phase_s)


class View:
    """Shows the newest ``Now``. A context manager, because a live panel must be closed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._lined_at_s = -LINE_EVERY_S

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line above the panel."""
        self.console.print(text, highlight=False)

    def show(self, now: Now) -> None:
        if self._live:
            self._live.update(panel(now))
        elif time.monotonic() - self._lined_at_s >= LINE_EVERY_S:
            self._lined_at_s = time.monotonic()
            self.console.print(line(now), highlight=False, soft_wrap=True)


def line(now: Now) -> str:
    """``now`` in one line, for logs."""
    return (
        f"{now.at_s:5.0f} s  {now.phase:<12}  {len(now.answers):4d} requests  "
        f"{shown(now.tokens_per_s, digits=0):>4} tokens/s  "
        f"{shown(tokens_per_step(now.recent)):>4} tokens/step  "
        f"version {now.version}  staleness {now.staleness}  swaps {now.swaps}  "
        f"rollbacks {now.rollbacks}  failed {now.failed}"
    )


def panel(now: Now) -> RenderableType:
    figures = Table.grid(padding=(0, 3))
    for _ in range(4):
        figures.add_column(min_width=14)
    figures.add_row(
        _figure(shown(now.tokens_per_s, digits=0), "tokens/s"),
        _figure(shown(tokens_per_step(now.recent)), "tokens per step"),
        _figure(str(now.version), "drafter version"),
        _figure(str(now.staleness), "staleness"),
    )
    figures.add_row(
        _figure(str(len(now.answers)), "requests"),
        _figure(str(now.swaps), "swaps"),
        _figure(str(now.rollbacks), "rollbacks", "bold yellow" if now.rollbacks else "bold"),
        _figure(str(now.failed), "failed", "bold red" if now.failed else "bold"),
    )
    spark = Text.assemble((sparkline(now.answers), "blue"), ("  tokens per step so far", "dim"))
    return Panel(
        Group(_road(now), Text(), figures, Text(), spark),
        title=f"Slipstream  {now.at_s:.0f} s",
        title_align="left",
        border_style="dim",
        width=88,
    )


def _road(now: Now) -> Text:
    """The phases in order, the current one with its progress."""
    road = Text()
    for name in now.phases:
        is_present = name == now.phase
        road.append(f" {name} ", "bold reverse" if is_present else "dim")
        road.append(f" {now.share:4.0%} " if is_present else " ")
    if now.phase not in now.phases:
        road.append(f" {now.phase} ", "bold reverse")
        road.append(f" {now.share:4.0%} ")
    return road


def _figure(value: str, name: str, style: str = "bold") -> Text:
    return Text.assemble((value, style), " ", (name, "dim"))


def sparkline(answers: Sequence[Answer], width: int = SPARK_WIDTH) -> str:
    """tokens_per_step over the traffic in ``width`` characters, scaled from 1 (plain) to the
    maximum."""
    if not answers:
        return ""
    cuts = [len(answers) * i // width for i in range(width + 1)]
    parts = [answers[a:b] for a, b in itertools.pairwise(cuts) if a < b]
    levels = [tokens_per_step(part) or 1.0 for part in parts]
    span = max(max(levels) - 1, 1e-9)
    return "".join(
        BARS[min(int((level - 1) / span * len(BARS)), len(BARS) - 1)] for level in levels
    )


SHORT_COLUMNS = (
    "phase",
    "plain",
    "static",
    "index",
    "tuned",
    "× plain",
    "× static",
    "× index",
    "alone",
    "newest",
)
"""``PHASE_COLUMNS``, short enough for 80 characters; the last two are the drafter alone."""


COLOURS = {"good": "green", "bad": "red", "neutral": "default"}


def summary(report: dict[str, Any]) -> list[RenderableType]:
    """Headline, figures and verdicts, for a terminal."""
    text, mood = headline(report)
    phases = Table(*SHORT_COLUMNS, box=None, title="tokens/s and speedups")
    verdicts = Table(box=None)
    for row in phase_rows(report):
        phases.add_row(*row[: len(SHORT_COLUMNS)])
    for name in ("", "measured", "goal", ""):
        verdicts.add_column(name)
    for check in checks(report):
        colour = "green" if check.passed else "red"
        goal = f"{check.kind} {check.limit:g}"
        verdicts.add_row(check.name, shown(check.value), goal, f"[{colour}]{verdict(check)}[/]")
    learning = Text(f"{learning_line(report)} {busy_line(report)}".rstrip())
    return [Text(text, f"bold {COLOURS[mood]}"), learning, phases, verdicts]
