"""Figures, verdicts and texts of a demo, as pure functions of its recording."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from buffer.records import Acceptance
from examples.arms import ALL_ARMS, ALONE, ARMS, Arm
from examples.recording import Answer, PhaseSpan, Recording, Replay


@dataclass(frozen=True, slots=True)
class Check:
    """A figure and the goal it is held against."""

    name: str
    value: float | None
    """``None`` if it was not measured, which fails the check."""
    limit: float
    kind: Literal["at least", "at most"]

    @property
    def passed(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.limit if self.kind == "at least" else self.value <= self.limit


# Figures


def tokens_per_s(replays: Iterable[Replay]) -> float | None:
    """Tokens over the seconds that they took, of all replays together; ``None`` without replays."""
    chosen = list(replays)
    spent_s = sum(replay.share_s for replay in chosen)
    return sum(len(replay.token_ids) for replay in chosen) / spent_s if chosen else None


def tokens_per_step(replays: Iterable[Replay | Answer]) -> float | None:
    return sum((replay.acceptance for replay in replays), Acceptance()).tokens_per_step


def ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def median_speedup(replays: Sequence[Replay], arm: Arm, base: Arm) -> float | None:
    """Median over prompts of how much faster ``arm`` answered than ``base``."""
    speeds: dict[tuple[Arm, str, int], float | None] = {
        (replay.arm, replay.domain, replay.prompt): tokens_per_s([replay]) for replay in replays
    }
    pairs = (
        ratio(speed, speeds.get((base, domain, prompt)))
        for (which, domain, prompt), speed in speeds.items()
        if which == arm
    )
    known = [pair for pair in pairs if pair is not None]
    return statistics.median(known) if known else None


def speedup_error(replays: Sequence[Replay], arm: Arm, base: Arm) -> float | None:
    """Standard error of the speed of ``arm`` over that of ``base``, from how much it differs
    between turns: a ratio of sums, linearised. ``None``: fewer than two turns, or no tokens.

    Source:
        Cochran, Sampling Techniques (1977), Section 6.4: the ratio estimate.
    """
    turns = _turns(replays, arm, base)
    totals = [sum(column) for column in zip(*turns, strict=True)]
    if len(turns) < 2 or not all(totals):
        return None
    shares = ([value / total for value, total in zip(t, totals, strict=True)] for t in turns)
    squares = (
        (tokens - seconds - base_tokens + base_seconds) ** 2
        for tokens, seconds, base_tokens, base_seconds in shares
    )
    relative = math.sqrt(sum(squares) * len(turns) / (len(turns) - 1))
    return relative * (totals[0] / totals[1]) / (totals[2] / totals[3])


def _turns(
    replays: Sequence[Replay], arm: Arm, base: Arm
) -> list[tuple[float, float, float, float]]:
    """Tokens and seconds of ``arm``, then of ``base``, for each turn that both have answered."""
    spent: dict[tuple[str, int], dict[Arm, tuple[float, float]]] = {}
    for replay in replays:
        sums = spent.setdefault((replay.domain, replay.turn), {})
        tokens, seconds = sums.get(replay.arm, (0.0, 0.0))
        sums[replay.arm] = tokens + len(replay.token_ids), seconds + replay.share_s
    return [(*sums[arm], *sums[base]) for sums in spent.values() if arm in sums and base in sums]


def mismatched_outputs(replays: Iterable[Replay]) -> int:
    """Number of prompts, over all domains, to which the arms gave different tokens."""
    answers: dict[tuple[str, int], set[tuple[int, ...]]] = {}
    for replay in replays:
        answers.setdefault((replay.domain, replay.prompt), set()).add(replay.token_ids)
    return sum(len(different) > 1 for different in answers.values())


def speeds(replays: Sequence[Replay]) -> dict[str, Any]:
    """The speed of every arm, their quotients, and the median quotient over prompts."""
    by_arm = {arm: tokens_per_s(r for r in replays if r.arm == arm) for arm in ALL_ARMS}
    known = [speed for arm in ARMS if (speed := by_arm[arm]) is not None]
    alone = by_arm["drafter_alone_tuned"], by_arm["drafter_alone_static"]
    return {
        **{f"{arm}_tokens_per_s": by_arm[arm] for arm in ALL_ARMS},
        "speedup_vs_plain": ratio(by_arm["tuned"], by_arm["plain"]),
        "speedup_vs_static": ratio(by_arm["tuned"], by_arm["static"]),
        "speedup_vs_index": ratio(by_arm["tuned"], by_arm["index"]),
        "speedup_vs_best": ratio(by_arm["tuned"], max(known, default=None)),
        "static_speedup_vs_plain": ratio(by_arm["static"], by_arm["plain"]),
        "index_speedup_vs_plain": ratio(by_arm["index"], by_arm["plain"]),
        "drafter_alone_speedup_vs_static": ratio(*alone),
        **{
            f"median_speedup_vs_{base}": median_speedup(replays, "tuned", base)
            for base in ARMS
            if base != "tuned"
        },
        **{
            f"speedup_vs_{base}_error": speedup_error(replays, "tuned", base)
            for base in ARMS
            if base != "tuned"
        },
    }


def learning_report(recording: Recording, shifted: Sequence[Replay]) -> dict[str, Any]:
    """What learning took, and when it was earned back.

    Args:
        shifted: replays of shifted traffic.
    """
    learning = recording.learning
    seconds = {arm: [replay.share_s for replay in shifted if replay.arm == arm] for arm in ARMS}
    saved_s = None
    if seconds["index"] and seconds["tuned"]:
        saved_s = statistics.fmean(seconds["index"]) - statistics.fmean(seconds["tuned"])
    is_newer = recording.newest_version != recording.static_version
    earns = is_newer and saved_s is not None and saved_s > 0
    earned_back = math.ceil(learning.seconds / saved_s) if earns and saved_s else None
    return {
        "learning_device": learning.device,
        "learning_seconds": learning.seconds,
        "learning_updates": learning.updates,
        "learning_rows": learning.rows,
        "seconds_saved_per_request": saved_s,
        "earned_back_after_requests": earned_back,
    }


def phase_report(recording: Recording, span: PhaseSpan) -> dict[str, Any]:
    """Figures of one phase: replayed ones, and ``live_`` ones of its traffic."""
    replays = [replay for replay in recording.replays if replay.domain in span.domains]
    answers = [answer for answer in recording.answers if answer.phase == span.name]
    quarter = max(1, len(answers) // 4)
    is_first = span == recording.phases[0]
    in_force: Arm = "static" if is_first else "tuned"
    per_step = {arm: tokens_per_step(r for r in replays if r.arm == arm) for arm in ALL_ARMS}
    report = {
        "name": span.name,
        **speeds(replays),
        "tokens_per_step": per_step[in_force],
        "tokens_per_step_version": (
            recording.static_version if is_first else recording.newest_version
        ),
        **{f"{arm}_tokens_per_step": per_step[arm] for arm in ALL_ARMS if arm != "plain"},
        "live_tokens_per_step_first_quarter": tokens_per_step(answers[:quarter]),
        "live_tokens_per_step_last_quarter": tokens_per_step(answers[-quarter:]),
        "live_tokens_per_s": live_tokens_per_s(answers, span),
        "requests": len(answers),
        "replayed_prompts": len({replay.prompt for replay in replays}),
        "first_version": answers[0].version if answers else None,
        "last_version": answers[-1].version if answers else None,
        "seconds": span.ended_s - span.started_s,
    }
    if span == recording.phases[-1]:
        report["tokens_per_step_ratio_to_first"] = ratio_to_first(recording)
    return report


def ratio_to_first(recording: Recording) -> float | None:
    """tokens_per_step of the newest weights over that of the weights at the end of the first phase,
    both without an index and on the held-out prompts that the first and the last phase share."""
    domain = recording.phases[0].domain
    newest, former = (
        tokens_per_step(r for r in recording.replays if r.arm == arm and r.domain == domain)
        for arm in ("drafter_alone_tuned", "drafter_alone_static")
    )
    return ratio(newest, former)


def live_tokens_per_s(answers: Sequence[Answer], span: PhaseSpan) -> float | None:
    length_s = span.ended_s - span.started_s
    return sum(a.num_tokens for a in answers) / length_s if length_s > 0 else None


DEFINITIONS = {
    "speeds": (
        "Completion tokens over the seconds that they took, on held-out prompts, the arms in turn "
        "on one server, trainer stopped, replay_clients requests at a time. Phases of one domain "
        "share its replay. The top-level speeds are over the phases in shifted_phases together."
    ),
    "speedup_errors": (
        "Standard errors of the speedups, from how much they differ between turns of the replay; "
        "null: fewer than two turns."
    ),
    "plain": "Requests with max_draft 0: the target alone.",
    "static": (
        "What a team deploys the day before: the weights that were in force when the first phase "
        "ended, and an index that sees the request alone."
    ),
    "index": "Static with the index over recent traffic.",
    "tuned": "Index with the newest weights.",
    "drafter_alone": "The drafter without any index, with the weights of static and of tuned.",
    "tokens_per_step": (
        "Replayed: tokens per target pass of the static arm for the first phase, and of the tuned "
        "arm for the others."
    ),
    "tokens_per_step_ratio_to_first": (
        "Newest weights over the weights of the end of the first phase, both without an index, "
        "replayed on the same held-out prompts of the first and the last phase; below 1 something "
        "was forgotten."
    ),
    "mismatched_outputs": (
        "Replayed prompts whose token ids differ between arms; every request has its seed."
    ),
    "learning_seconds": (
        "Time of the trainer's updates and gates during the whole traffic, on learning_device."
    ),
    "earned_back_after_requests": (
        "learning_seconds over the seconds by which tuned answers a replayed request of shifted "
        "traffic faster than index; null: never."
    ),
    "requests": "Live and replayed, warm-up included.",
}


def shifted_replays(recording: Recording) -> list[Replay]:
    """Replays of the domains that the first drafter was not trained on."""
    shifted = [span for span in recording.phases if span.name in recording.shifted]
    domains = {domain for span in shifted for domain in span.domains}
    domains -= {recording.phases[0].domain}
    return [replay for replay in recording.replays if replay.domain in domains]


def build_report(recording: Recording) -> dict[str, Any]:
    """``report.json``."""
    shifted = shifted_replays(recording)
    return {
        "target": recording.target,
        "temperature": recording.temperature,
        "shifted_phases": list(recording.shifted),
        **speeds(shifted),
        **learning_report(recording, shifted),
        "swaps": recording.swaps,
        "rollbacks": recording.rollbacks,
        "requests": len(recording.answers)
        + len(recording.replays)
        + recording.warmup_requests
        + recording.failed_requests,
        "failed_requests": recording.failed_requests,
        "mismatched_outputs": mismatched_outputs(recording.replays),
        "seconds": recording.seconds,
        "static_version": recording.static_version,
        "newest_version": recording.newest_version,
        "live_requests": len(recording.answers),
        "num_clients": recording.num_clients,
        "replay_clients": recording.replay_clients,
        "goals": asdict(recording.goals),
        "load_before": recording.load_before,
        "phases": [phase_report(recording, span) for span in recording.phases],
        **recording.machine,
        "definitions": DEFINITIONS,
    }


# Verdicts


def checks(report: dict[str, Any]) -> list[Check]:
    """The demo's goals."""
    goals, last = report["goals"], report["phases"][-1]
    return [
        Check(
            "shifted phases: speed over plain",
            report["speedup_vs_plain"],
            goals["over_plain"],
            "at least",
        ),
        Check(
            "shifted phases: speed over static",
            report["speedup_vs_static"],
            goals["over_static"],
            "at least",
        ),
        *(
            Check(
                f"{phase['name']}: speed over the best arm",
                phase["speedup_vs_best"],
                0.98,
                "at least",
            )
            for phase in report["phases"]
        ),
        Check(
            f"{last['name']}: tokens_per_step over first",
            last["tokens_per_step_ratio_to_first"],
            0.97,
            "at least",
        ),
        Check("swaps", report["swaps"], 5, "at least"),
        Check("failed requests", report["failed_requests"], 0, "at most"),
        Check("mismatched outputs", report["mismatched_outputs"], 0, "at most"),
        Check("seconds", report["seconds"], goals["seconds"], "at most"),
    ]


def verdict(check: Check) -> str:
    return "PASS" if check.passed else "FAIL"


Mood = Literal["good", "bad", "neutral"]
"""How a figure is coloured: green, red or not at all."""


def mood_of_speedup(speedup: float | None) -> Mood:
    """Judged as it is shown, with two digits: above 1.00 good, below bad."""
    if speedup is None or round(speedup, 2) == 1:
        return "neutral"
    return "good" if speedup > 1 else "bad"


def mood_of_faults(count: int) -> Mood:
    """Anything but zero is bad."""
    return "bad" if count else "good"


SURE = 2.0
"""Standard errors above 1 from which a speedup is shown to be a gain."""


def headline(report: dict[str, Any]) -> tuple[str, Mood]:
    """One sentence on what the demo showed, from the speeds on shifted traffic.

    Learning paid if the newest weights are faster than the frozen server and than the frozen
    weights, both by more than chance would make them: by ``SURE`` standard errors, and in each of
    several runs.
    """
    plain, static, index = (report[f"speedup_vs_{arm}"] for arm in ("plain", "static", "index"))
    if plain is None or static is None or index is None:
        return "The speeds were not measured", "neutral"
    if mood_of_speedup(plain) == "bad":
        return f"Drafting did not pay: {plain:.2f} times plain decoding", "bad"
    if report["newest_version"] == report["static_version"]:
        return "Nothing was learned: no version came after the first phase", "neutral"
    for speedup, name in ((static, "the frozen server"), (index, "the frozen weights")):
        if mood_of_speedup(speedup) == "bad":
            return f"Learning did not pay: {speedup:.2f} times as fast as {name}", "bad"
    if mood_of_speedup(index) == "neutral":
        return "Learning changed nothing: the newest weights are as fast as the frozen ones", (
            "neutral"
        )
    how = (
        f"{static:.2f} times as fast as the frozen server, {index:.2f} times by the weights"
        f"{_within(report)}"
    )
    if is_sure(report, "static") and is_sure(report, "index"):
        return f"Learning paid: {how}", "good"
    return f"Not shown that learning paid: {how}", "neutral"


def is_sure(report: dict[str, Any], base: str) -> bool:
    """Whether tuned is faster than an arm by more than chance. Results of before errors were kept
    have none: then only their runs say so."""
    error = report.get(f"speedup_vs_{base}_error") or 0.0
    speedups = [run[f"speedup_vs_{base}"] for run in report.get("runs", ())]
    return report[f"speedup_vs_{base}"] - SURE * error > 1 and all(
        mood_of_speedup(speedup) == "good" for speedup in speedups
    )


def _within(report: dict[str, Any]) -> str:
    errors = [report.get(f"speedup_vs_{base}_error") for base in ("static", "index")]
    known = [f"{SURE * error:.2f}" for error in errors if error is not None]
    return f" (± {' and '.join(known)})" if known else ""


# Texts


def shown(value: float | None, unit: str = "", digits: int = 2) -> str:
    """A figure as text, or a dash if it was not measured."""
    if value is None:
        return "–"
    return f"{value}{unit}" if isinstance(value, int) else f"{value:.{digits}f}{unit}"


PHASE_COLUMNS = (
    "phase",
    "plain tok/s",
    "static tok/s",
    "index tok/s",
    "tuned tok/s",
    "× plain",
    "× static",
    "× index",
    "drafter alone, frozen tok/s",
    "newest tok/s",
    "static tok/step",
    "tuned tok/step",
    "requests",
)


def phase_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row of texts per phase, in the order of ``PHASE_COLUMNS``."""
    return [
        (
            phase["name"],
            *(shown(phase[f"{arm}_tokens_per_s"], digits=1) for arm in ARMS),
            *(shown(phase[f"speedup_vs_{arm}"]) for arm in ARMS if arm != "tuned"),
            *(shown(phase[f"{arm}_tokens_per_s"], digits=1) for arm in ALONE),
            shown(phase["static_tokens_per_step"]),
            shown(phase["tuned_tokens_per_step"]),
            str(phase["requests"]),
        )
        for phase in report["phases"]
    ]


def busy_line(report: dict[str, Any]) -> str:
    """A warning if other work was under way when the demo began, else nothing."""
    cores, load = report["hardware"]["cores"], report["load_before"]
    if load < 0.5 * cores:
        return ""
    return (
        f"Other work kept the machine busy (load {load:.1f} on {cores} cores before the start): "
        f"these speeds mean little."
    )


def learning_line(report: dict[str, Any]) -> str:
    """What learning took, and when it was earned back, in one sentence."""
    if not report["learning_updates"]:
        return "The trainer made no update."
    spent = (
        f"Learning took {report['learning_seconds']:.0f} {report['learning_device']}-seconds in "
        f"{report['learning_updates']} updates"
    )
    after = report["earned_back_after_requests"]
    if after is None:
        return f"{spent}; at these speeds no number of requests earns them back."
    return f"{spent}, which {after} requests of shifted traffic earn back."
