"""The gate before publication: a candidate must beat the incumbent and forget nothing.

What is compared is an estimate from few traces, whose chains resemble each other. How far the gain
may be off is told by how it differs from trace to trace, both drafters measured on the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

KEEP = 0.97
"""Ratio that must be kept of the figure on earlier traffic, and on each domain."""

Reason = Literal[
    "passed", "no_traces", "not_finite", "too_few", "equal", "worse", "forgets", "domain", "denied"
]
"""The verdict in a word. ``denied``: a server rolled back these very weights."""


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """The decision and, for logs and the manifest, its reason with figures."""

    passed: bool
    reason: str
    kind: Reason
    lacks: float | None = None
    """By how much of itself the candidate's figure would have had to be higher to pass, all else
    equal; ``None`` if it passed or nothing can be said."""


@dataclass(frozen=True, slots=True)
class PairedTrace:
    """Both drafters on one trace."""

    num_chains: int
    candidate: float
    """Sum over its chains of the tokens that a step yields."""
    incumbent: float


def gain_error(traces: Sequence[PairedTrace]) -> float | None:
    """Standard error of ``candidate - incumbent`` in tokens_per_step, each chain weighing the same.

    Chains of one trace count as one observation: that of a ratio of sums over traces, by its
    residuals.

    Returns:
        ``None`` for fewer than two traces with chains.
    """
    traces = [trace for trace in traces if trace.num_chains]
    count, total = len(traces), sum(trace.num_chains for trace in traces)
    if count < 2:
        return None
    gain = sum(trace.candidate - trace.incumbent for trace in traces) / total
    residuals = (t.candidate - t.incumbent - gain * t.num_chains for t in traces)
    return math.sqrt(sum(r * r for r in residuals) * count / (count - 1)) / total


def errors_allowed(confidence: float, num_traces: int) -> float:
    """Standard errors between an estimate and its one-sided lower bound: Student's quantile.

    Args:
        confidence: 0.5 <= confidence < 1; 0.5 is the estimate itself.
        num_traces: >= 2.

    Source:
        First two terms of Fisher's expansion, Abramowitz and Stegun 26.7.5; within 3 % from 5
        traces on at 0.9.
    """
    z, degrees = NormalDist().inv_cdf(confidence), num_traces - 1
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2


def gate(
    candidate: float,
    incumbent: float,
    margin: float,
    num_rows: int,
    older: tuple[float, float] | None = None,
    keep: float = KEEP,
    traces: Sequence[PairedTrace] | None = None,
    confidence: float = 0.5,
    domains: Mapping[str, Sequence[PairedTrace]] | None = None,
) -> GateVerdict:
    """Compare two drafters on held-out traces, in tokens_per_step or in speed.

    Args:
        candidate: figure of the new weights.
        incumbent: that of the last published version on the same rows.
        margin: required ratio candidate / incumbent, e.g. 1.005. From 1 on, a candidate that is
            merely as good does not pass: it would cost a swap and gain nothing.
        num_rows: held-out rows behind both figures; with none, nothing passes.
        older: both figures on held-out traces of earlier traffic, if there are any.
        keep: required ratio of the older figures, so that earlier traffic is not forgotten. Nor may
            the loss there exceed the gain on the newest traces: the product of both ratios never
            falls, and small losses cannot add up.
        traces: the same figures trace by trace; ``None``: only the estimates count.
        confidence: with which the candidate must not be worse than the incumbent (or than
            ``margin`` of it, if that is below 1), judged by how the gain differs between traces.
        domains: both drafters on newest and earlier traces, by domain. On none of them may the
            candidate be below ``keep`` of the incumbent (or ``margin``, if that is less) by more
            than the traces' own scatter.
    """
    if num_rows < 1:
        return GateVerdict(False, "no held-out rows to judge on", "no_traces")
    if not math.isfinite(candidate) or not math.isfinite(incumbent):
        return GateVerdict(
            False, f"not finite: candidate {candidate}, incumbent {incumbent}", "not_finite"
        )
    figures = f"candidate {candidate:.4f}, incumbent {incumbent:.4f}, {num_rows} rows"
    wanted = margin * incumbent
    if traces is not None and confidence > 0.5:
        error = gain_error(traces)
        if error is None:
            return GateVerdict(
                False, f"too few held-out traces for an interval: {figures}", "too_few"
            )
        unsure = errors_allowed(confidence, sum(t.num_chains > 0 for t in traces)) * error
        figures += f", gain uncertain by {unsure:.4f}"
        wanted = max(wanted, min(margin, 1.0) * incumbent + unsure)
    if margin >= 1 and candidate == incumbent:
        return GateVerdict(False, f"no better than the incumbent: {figures}", "equal", 0.0)
    if candidate < wanted:
        return GateVerdict(
            False,
            f"below {wanted:.4f}, margin {margin:g}: {figures}",
            "worse",
            wanted / candidate - 1 if candidate > 0 else None,
        )
    if older is not None:
        least = max(keep, min(1.0, incumbent / candidate))
        if not older[0] >= least * older[1]:
            return GateVerdict(
                False,
                f"forgets earlier traffic: candidate {older[0]:.4f} there, below {least:.4g} x "
                f"incumbent {older[1]:.4f}",
                "forgets",
            )
    kept = min(keep, margin)
    falls = [name for name, own in (domains or {}).items() if _falls(own, kept, confidence)]
    if falls:
        return GateVerdict(
            False, f"falls below {kept:g} x incumbent on {', '.join(map(repr, falls))}", "domain"
        )
    return GateVerdict(True, f"at least {wanted:.4f}, margin {margin:g}: {figures}", "passed")


def _falls(traces: Sequence[PairedTrace], keep: float, confidence: float) -> bool:
    """The candidate is below ``keep`` of the incumbent, even with what the traces leave open added
    to it. False for fewer than two traces, which leave everything open."""
    kept = [PairedTrace(t.num_chains, t.candidate, keep * t.incumbent) for t in traces]
    error = gain_error(kept)
    if error is None:
        return False
    total = sum(t.num_chains for t in kept)
    loss = sum(t.incumbent - t.candidate for t in kept) / total
    return loss > errors_allowed(confidence, sum(t.num_chains > 0 for t in kept)) * error
