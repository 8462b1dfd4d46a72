"""Sampled requests follow the target's joint distribution: a chi-squared test at p = 1e-9 on many
samples of each sampling setting and drafter, with the kernels that programs call
(``oracles/device_law.py``)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from oracles.device_bugs import BUGS
from oracles.device_law import REDUCED, RIGHT, SMALL, WIDE, Faces, Layout, sample
from oracles.greedy import law_row
from oracles.joint_law import SETTINGS, Cut, Setting, expected_law, tables_of
from specops.verify_logits import Rule

_BUGGY = Setting(temperature=1.5, cut=Cut.NOTHING, num_draft=2)
_PLANTED = 1_000_000
_WIDE_SHARE = 0.05
_VARIED = SETTINGS[3::4]
"""Covers every draft length and temperature, with and without truncation."""
_WHOLE = [setting for setting in SETTINGS if setting.cut is Cut.NOTHING]
_LAYOUTS = {"whole": SMALL, "reduced": REDUCED, "wide": WIDE}


@dataclass(frozen=True, slots=True)
class Run:
    """One combination of sampling and drafting settings."""

    setting: Setting
    regime: str
    rule: Rule
    layout: str = "whole"
    """Vocabulary layout; ``reduced``: a smaller draft vocabulary, ``wide``: full-size parts."""
    share: float = 1.0
    """Share of the requested number of samples."""
    bug: str | None = None
    """Name of a planted bug; the run must then be rejected."""
    as_served: bool = True
    """See ``device_law.sample``."""

    def num_samples(self, asked: int) -> int:
        """Samples to draw; fewer are enough to expose a planted bug."""
        count = max(1, round(asked * self.share))
        return count if self.bug is None else min(count, _PLANTED)


def _runs() -> Iterator[Run]:
    def all_settings(regimes: Iterable[str], rule: Rule, layout: str = "whole") -> Iterator[Run]:
        for regime, setting in itertools.product(regimes, SETTINGS):
            yield Run(setting, regime, rule, layout)

    both = ("close", "opposed")
    for bug, regime in itertools.product(BUGS, both):
        yield Run(_BUGGY, regime, Rule.BLOCK, bug=bug)
    yield from all_settings(both, Rule.BLOCK)
    for regime, setting in itertools.product(both, _VARIED):
        yield Run(setting, regime, Rule.BLOCK, "wide", share=_WIDE_SHARE)
    yield from all_settings(("close",), Rule.BLOCK, "reduced")
    yield from all_settings(("swapped",), Rule.BLOCK)
    yield from all_settings(("opposed",), Rule.MATCH)
    for setting in _WHOLE[2::4]:
        yield Run(setting, "close", Rule.BLOCK, as_served=False)
    yield from all_settings(both, Rule.STANDARD)
    yield from all_settings(("index",), Rule.BLOCK)


RUNS = tuple(_runs())
"""Planted bugs, then the most revealing runs first."""


def measure(
    device: torch.device, num_samples: int, budget_s: float, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Measure the runs in order until the budget is used up.

    Args:
        keep: called with each row as soon as it is measured.
    """
    started = time.perf_counter()
    for number, run in enumerate(RUNS):
        if time.perf_counter() - started > budget_s:
            print(f"law: no time for {len(RUNS) - number} of {len(RUNS)} runs", flush=True)
            return
        row = _row(run, device, run.num_samples(num_samples), 1_000 + number)
        keep(row)
        print(
            f"law {number + 1}/{len(RUNS)}, {time.perf_counter() - started:.0f} s: "
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
        run.setting, tables, run.rule, num_samples, device, layout, parts,
        seed=seed, as_served=run.as_served,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    wanted = expected_law(run.setting, tables)
    row = law_row(run.setting.name, run.regime, run.rule.name.lower(), counts, rate, wanted)
    more = {
        "sampling": run.setting.sampling,
        "vocabulary": run.layout,
        "as_served": run.as_served,
        "samples": num_samples,
        "planted": run.bug,
    }
    return {**row, **more, "seconds": seconds}


def is_sound(rows: list[dict[str, Any]]) -> bool:
    """True if exactly the planted bugs were rejected, or if there are no rows."""
    honest = [row for row in rows if row["planted"] is None]
    is_kept = all(row["chi_squared_over_limit"] <= 1 for row in honest)
    return is_kept and all(excess > 1 for excess in _planted(rows).values())


def _planted(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Bug -> largest chi-squared over its limit, across drafters."""
    excesses: dict[str, float] = {}
    for row in rows:
        if row["planted"] is not None:
            worst = excesses.get(row["planted"], 0.0)
            excesses[row["planted"]] = max(worst, row["chi_squared_over_limit"])
    return excesses


def summary(rows: list[dict[str, Any]], num_samples: int) -> dict[str, Any]:
    """Totals, with planted bugs counted separately."""
    honest = [row for row in rows if row["planted"] is None]
    samples = [row["samples"] for row in honest]
    excesses = _planted(rows)
    return {
        "complete": len(rows) == len(RUNS),
        "runs": len(honest),
        "runs_planned": sum(run.bug is None for run in RUNS),
        "runs_of_all_samples": sum(count == num_samples for count in samples),
        "samples": sum(samples),
        "samples_min": min(samples, default=None),
        "samples_max": max(samples, default=None),
        "settings": len({row["setting"] for row in honest}),
        "samplings": len({row["sampling"] for row in honest}),
        "rejected_at_1e-9": sum(row["chi_squared_over_limit"] > 1 for row in honest),
        "largest_chi_squared_over_limit": max(
            (row["chi_squared_over_limit"] for row in honest), default=None
        ),
        "planted_bugs": len(excesses),
        "planted_bugs_planned": len(BUGS),
        "planted_bugs_rejected": sum(excess > 1 for excess in excesses.values()),
        "seconds": sum(row["seconds"] for row in rows),
    }
