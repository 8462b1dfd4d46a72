"""All figures and tables that server and trainer report, each with what it says.

The dashboard (``reporting.dashboard``) is made of this list. Figures of a draft position or of a
domain have a name with a pattern in it: ``{position}`` counts from 1, ``{domain}`` is one that
``reports.domains`` lists, or ``other``. Of drafters beside the first, figures have the same names
behind ``beside/{drafter}/``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")
FIRST = "(first)"
"""How tables name the first drafter of a run."""
TIME = "unix_s"
"""The time axis that all figures of all runs share: seconds since 1970, when they were taken."""

SERVER = {
    "server/speedup_over_plain": "Time that plain decoding would have taken for the same tokens, "
    "by the measured step times, over the time of the steps; 1 is no gain.",
    "server/generation_tokens_per_s": "Tokens generated per second.",
    "server/tokens_per_step": "Tokens per target pass of a request, 1 to K + 1.",
    "server/acceptance_rate": "Share of the proposed tokens that were accepted.",
    "server/draft_k": "Mean K over the steps, 0 for plain ones.",
    "server/version": "Version of the drafter in use.",
    "server/staleness": "Published versions that are newer than the one in use.",
    "server/requests_running": "Requests in the batch.",
    "server/requests_waiting": "Requests not yet admitted.",
    "server/kv_usage": "Share of the KV pages in use.",
    "server/traces_lost": "Traces dropped or failed, since the start.",
    "server/reports_lost": "Records that no writer has written, since the start.",
}
"""Figures of a server, over the time since the last ones."""
TRAINER = {
    "trainer/step": "Updates so far.",
    "trainer/loss": "Mean loss of the updates.",
    "trainer/alpha_{position}": "Overlap with the target at each draft position.",
    "trainer/rows_per_s": "Rows trained on per second of work.",
    "trainer/grad_norm": "Gradient norm before clipping.",
    "trainer/lr": "Learning rate.",
    "trainer/skipped": "Updates that were not finite, since the start.",
    "trainer/staleness": "Versions by which the drafts in the batches are behind.",
    "trainer/version": "Newest published version.",
    "trainer/drift": "Largest evidence over the domains that acceptance has fallen, as a share of "
    "what starts an alarm.",
    "trainer/time_{part}": "Share of the last ten seconds in which the trainer made updates, took "
    "traces in, judged, published, saved, reported, rested or waited.",
}
GATE = {
    "gate/candidate": "The candidate's figure on held-out traces: tokens_per_step, or speedup over "
    "plain where step times are known.",
    "gate/incumbent": "The same of the last published version.",
    "gate/gain_error": "Standard error of their difference.",
    "gate/passed": "1 if the candidate was published.",
    "domain/{domain}/speedup_over_plain": "Of the published version on held-out traces.",
    "domain/{domain}/speedup_over_static": "The same, relative to the version that the trainer "
    "began from.",
}
POLICY = {
    "policy/gain": "Of a fitted draft policy over the one in force, on held-out steps: relative "
    "tokens per second, or how much better a head ranks positions.",
    "policy/gain_at_least": "Its lower bound at 95 %.",
    "policy/passed": "1 if the network that was fitted is better than what is in force.",
    "policy/fit_s": "Seconds that fitting and judging it took, beside everything else.",
}
PAYBACK = {
    "payback/spent_s": "Seconds that learning has taken.",
    "payback/saved_s": "Seconds that drafting has saved in serving, against plain decoding.",
    "payback/saved_by_learning_s": "Those of them that the version learning began from would not "
    "have saved.",
    "payback/ratio": "Saved by learning over spent.",
}
TABLES = {
    "events/swaps": "Versions taken and rolled back, as the server saw them.",
    "events/gate": "Candidates judged, and why each was published or not.",
    "events/policy": "Draft policies fitted, and why each passed or not.",
}
FIGURES = SERVER | TRAINER | GATE | POLICY | PAYBACK


PER_DRAFTER = frozenset({*TRAINER, *GATE, *POLICY, *PAYBACK, "server/version", "server/staleness"})
"""Figures that each drafter of a run has."""
_BESIDE = "(beside/[^/]+/)?"


def of_drafter(drafter: str, values: Mapping[str, T]) -> dict[str, T]:
    """Figures under the names that they have for one drafter.

    Args:
        drafter: its kind; empty for the first of the run.
    """
    return {f"beside/{drafter}/{n}" if drafter else n: value for n, value in values.items()}


def pattern_of(name: str) -> str:
    """A regular expression for the figures of this name, of all drafters."""
    own = re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(name))
    return _BESIDE + own if name in PER_DRAFTER else own


def is_known(name: str) -> bool:
    """Whether the list has this figure."""
    return any(re.fullmatch(pattern_of(known), name) for known in FIGURES)
