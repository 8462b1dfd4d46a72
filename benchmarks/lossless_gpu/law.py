"""Sampled requests follow the target's joint law: chi-squared at p = 1e-9, many samples of each way
to sample and to draft, through the faces that programs call (``tests/device_law.py``)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.lossless_rows import law_row
from specops.verify_logits import Rule
from tests.device_bugs import BUGS
from tests.device_law import REDUCED, RIGHT, SMALL, WIDE, Faces, Layout, sample
from tests.joint_law import SETTINGS, Cut, Setting, expected_law, tables_of

_BUGGY = Setting(temperature=1.5, cut=Cut.NOTHING, num_draft=2)
_PLANTED = 1_000_000
_LAYOUTS = {"whole": SMALL, "reduced": REDUCED, "wide": WIDE}


@dataclass(frozen=True, slots=True)
class Run:
    """One way to sample and to draft."""

    setting: Setting
    regime: str
    rule: Rule
    layout: str = "whole"
    """Of the vocabularies: ``reduced`` is the drafter's, ``wide`` has parts of full size."""
    share: float = 1.0
    """Of the number of samples that was asked for."""
    bug: str | None = None
    """Planted: the run is to be rejected."""


def runs(num_samples: int) -> Iterator[Run]:
    """The most telling ones first."""

    def all_settings(regimes: Iterable[str], rule: Rule, layout: str = "whole") -> Iterator[Run]:
        for regime, setting in itertools.product(regimes, SETTINGS):
            yield Run(setting, regime, rule, layout)

    both = ("close", "opposed")
    yield from all_settings(both, Rule.BLOCK)
    planted = min(1.0, _PLANTED / num_samples)
    for bug, regime in itertools.product(BUGS, both):
        yield Run(_BUGGY, regime, Rule.BLOCK, share=planted, bug=bug)
    yield from all_settings(both, Rule.STANDARD)
    yield from all_settings(("index",), Rule.BLOCK)
    for regime, setting in itertools.product(both, SETTINGS[7::10]):
        yield Run(setting, regime, Rule.BLOCK, "wide", share=0.05)
    yield from all_settings(("close",), Rule.BLOCK, "reduced")
    yield from all_settings(("swapped",), Rule.BLOCK)
    yield from all_settings(("opposed",), Rule.MATCH)


def measure(
    device: torch.device, num_samples: int, budget_s: float, keep: Callable[[dict[str, Any]], None]
) -> None:
    """All runs that fit the budget.

    Args:
        keep: takes each row as soon as it is there.
    """
    started = time.perf_counter()
    planned = list(runs(num_samples))
    for number, run in enumerate(planned):
        if time.perf_counter() - started > budget_s:
            print(f"law: no time for {len(planned) - number} of {len(planned)} runs", flush=True)
            return
        row = _row(run, device, max(1, round(num_samples * run.share)), 1_000 + number)
        keep(row)
        print(
            f"law {number + 1}/{len(planned)}, {time.perf_counter() - started:.0f} s: "
            f"{run.setting.name}, {run.regime}, {run.rule.name.lower()}, {run.layout}"
            f"{'' if run.bug is None else ', planted: ' + run.bug}: "
            f"{row['chi_squared_over_limit']:.2f} of the limit in {row['seconds']:.2f} s",
            flush=True,
        )


def _row(run: Run, device: torch.device, num_samples: int, seed: int) -> dict[str, Any]:
    started = time.perf_counter()
    tables = tables_of(run.regime)
    layout: Layout = _LAYOUTS[run.layout]
    parts: Faces = RIGHT if run.bug is None else BUGS[run.bug]
    counts, rate = sample(
        run.setting, tables, run.rule, num_samples, device, layout, parts, seed=seed
    )
    seconds = time.perf_counter() - started
    wanted = expected_law(run.setting, tables)
    row = law_row(run.setting.name, run.regime, run.rule.name.lower(), counts, rate, wanted)
    more = {"vocabulary": run.layout, "samples": num_samples, "planted": run.bug}
    return {**row, **more, "seconds": seconds}


def is_sound(rows: list[dict[str, Any]]) -> bool:
    """Nothing was rejected but what was planted, and that was."""
    honest = [row for row in rows if row["planted"] is None]
    is_kept = all(row["chi_squared_over_limit"] <= 1 for row in honest)
    return is_kept and all(excess > 1 for excess in _planted(rows).values())


def _planted(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Bug -> chi-squared over its limit, by the drafter that shows it best."""
    excesses: dict[str, float] = {}
    for row in rows:
        if row["planted"] is not None:
            worst = excesses.get(row["planted"], 0.0)
            excesses[row["planted"]] = max(worst, row["chi_squared_over_limit"])
    return excesses


def summary(rows: list[dict[str, Any]], num_samples: int) -> dict[str, Any]:
    """What the rows say together; planted bugs by themselves."""
    honest = [row for row in rows if row["planted"] is None]
    excesses = _planted(rows)
    return {
        "runs": len(honest),
        "runs_planned": sum(run.bug is None for run in runs(num_samples)),
        "samples": sum(row["samples"] for row in honest),
        "samples_each": num_samples,
        "rejected_at_1e-9": sum(row["chi_squared_over_limit"] > 1 for row in honest),
        "largest_chi_squared_over_limit": max(
            (row["chi_squared_over_limit"] for row in honest), default=None
        ),
        "planted_bugs": len(excesses),
        "planted_bugs_rejected": sum(excess > 1 for excess in excesses.values()),
        "seconds": sum(row["seconds"] for row in rows),
    }
