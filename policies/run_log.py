"""The log of a run, read from its buffer and its profile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from buffer.audit import audit
from buffer.backends import open_backend
from buffer.traces import TraceCounts, TraceReader, traces_in
from configs.choices import SettingsError
from policies.costs import LEAST_STEPS, are_enough, profile_of, times_of
from policies.interface import CostSample
from policies.logged import LoggedStep, drafters_of, steps_of
from policies.replayed_file import read_replayed
from policies.replayed_log import ReplayedLog

Times = Literal["auto", "profile", "traces"]
"""Step times: of the profile in the run folder, or medians of the traces; ``auto``: the profile if
it has the drafter."""
_DOUBT, _SHOWN = 0.2, 3
"""Difference of step times that is worth a warning, and how many it names."""


def read_steps(url: str, run_dir: Path, most_steps: int) -> tuple[list[LoggedStep], TraceCounts]:
    """The newest steps of a run, with what was replayed of them, and what became of its records;
    the access is noted.

    Raises:
        ValueError, OSError: the buffer, or the file of what was replayed, cannot be read.
    """
    replayed = read_replayed(run_dir)
    reader = open_traces(url, run_dir)
    return steps_of(traces_in(reader), replayed)[-most_steps:], reader.counts


def open_traces(url: str, run_dir: Path) -> TraceReader:
    """Reads the traces of a run; the access is noted.

    Raises:
        ValueError, OSError: the buffer cannot be read.
    """
    reader = TraceReader(open_backend(url, run_dir))
    audit(run_dir, "policies", url)  # of what is there: a run that is not must not be made
    return reader


def log_of_run(
    steps: Sequence[LoggedStep], drafter: str | None, run_dir: Path, times: Times, max_draft: int
) -> ReplayedLog:
    """All that the steps of a run say about one drafter.

    Args:
        drafter: ``None``: the one with the most steps.

    Raises:
        SettingsError: the run has no such drafter, or its profile is damaged.
        ValueError: the traces, or the times, do not say enough.
    """
    known = drafters_of(steps)
    if not known and (mixed := num_mixed(steps)):
        raise ValueError(
            f"all {mixed} steps that drafted did so with several drafters at once, so they do not "
            f"tell what one of them brings; serve some requests with drafter.mixed=false, and "
            f"with no mix of the index either"
        )
    if not known:
        raise ValueError(
            f"{len(steps)} steps were read and none drafted anything; let the run serve some "
            f"requests with a policy that drafts"
        )
    if drafter is not None and drafter not in known:
        raise SettingsError(f"no step was drafted by {drafter!r}; the run has {', '.join(known)}")
    chosen = known[0] if drafter is None else drafter
    return ReplayedLog.of(steps, chosen, _times(steps, chosen, run_dir, times), max_draft)


def time_doubts(log: ReplayedLog) -> str | None:
    """Where the step times by which a log is judged are not those that its own steps took, as one
    line; ``None``: nowhere."""
    found = []
    for sample in times_of(log.steps):
        if sample.draft_k <= log.max_draft:
            by_table = float(log.table.seconds(sample.batch)[sample.draft_k])
            ratio = by_table / sample.step_s
            found.append((abs(math.log(ratio)), sample, by_table))
    far = sorted((one for one in found if one[0] > math.log(1 + _DOUBT)), key=lambda one: -one[0])
    if not far:
        return None
    shown = "; ".join(
        f"K = {sample.draft_k} at batch {sample.batch}: {1000 * by_table:.1f} ms, in these traces "
        f"{1000 * sample.step_s:.1f}"
        for _, sample, by_table in far[:_SHOWN]
    )
    return (
        f"warning: {len(far)} of {len(found)} step times differ by more than {100 * _DOUBT:.0f} % "
        f"from those of the traces, so what is said of K holds for another machine or load "
        f"({shown}); --times traces uses the latter"
    )


def num_mixed(steps: Sequence[LoggedStep]) -> int:
    """Steps of several drafters, which say nothing about any one of them."""
    return sum(step.is_mixed for step in steps)


def replays(log: ReplayedLog) -> str | None:
    """How far longer drafts are scored by a replay, as one line; ``None``: not at all."""
    unknown = [
        row
        for step in log.steps
        for row in step.rows
        if row.num_accepted == row.num_verified and row.longest(step.draft_k) is None
    ]
    num = sum(bool(row.replayed) for row in unknown)
    if not num:
        return None
    return (
        f"{num} of {len(unknown)} rounds that do not say what a longer draft keeps are scored by a "
        f"replay of the drafter along the text, the others by hazards"
    )


def _times(
    steps: Sequence[LoggedStep], drafter: str, run_dir: Path, times: Times
) -> list[CostSample]:
    """
    Raises:
        ValueError: they do not tell what steps of the drafter take.
    """
    profile = [] if times == "traces" else profile_of(run_dir)
    if times != "traces" and are_enough(profile, drafter):
        return profile
    if times == "profile" and not profile:
        raise ValueError(
            f"{run_dir} holds no profile of step times: a server writes one when its policy wants "
            f"times, which `fixed` does not; use --times traces"
        )
    if times == "profile":
        raise ValueError(
            f"the profile of {run_dir} has no step times of {drafter!r}: a server measures those "
            f"of drafters on its device alone; use --times traces"
        )
    found = times_of(steps)
    if not are_enough(found, drafter):
        raise ValueError(
            f"neither a profile nor these traces tell the times of {drafter!r}: at some batch "
            f"size, {LEAST_STEPS} steps that drafted at one K and {LEAST_STEPS} plain ones are "
            f"needed, without prompts beside them; serve more requests"
        )
    return found
