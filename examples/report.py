"""Figures, verdicts and texts of a demo, as pure functions of its recording."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from buffer.records import Acceptance

Arm = Literal["plain", "static", "tuned"]
ARMS: tuple[Arm, ...] = ("plain", "static", "tuned")


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished request of the live traffic."""

    phase: str
    finished_s: float
    """Seconds since the demo began."""
    num_tokens: int
    """Completion tokens."""
    acceptance: Acceptance
    version: int
    """Drafter version in force at its last step."""
    newest_version: int
    """Newest published version when it finished."""


@dataclass(frozen=True, slots=True)
class Replay:
    """One held-out prompt, answered by one arm, alone on the server."""

    phase: str
    arm: Arm
    prompt: int
    """Index among the held-out prompts of its domain."""
    request_s: float
    """Seconds the client waited."""
    token_ids: tuple[int, ...]
    acceptance: Acceptance
    version: int


@dataclass(frozen=True, slots=True)
class PhaseSpan:
    """When a phase of traffic ran."""

    name: str
    started_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class VersionChange:
    """The server began to use another version during the traffic."""

    at_s: float
    """Seconds since the demo began."""
    version: int
    """Version in use from then on."""
    rolled_back: bool
    """The server returned to it from a newer one."""


@dataclass(frozen=True, slots=True)
class Recording:
    """Everything the demo observed. The report is a function of it."""

    phases: tuple[PhaseSpan, ...]
    shifted: tuple[str, ...]
    """Phases whose traffic the first drafter was not trained on."""
    answers: tuple[Answer, ...]
    """In the order in which they finished."""
    changes: tuple[VersionChange, ...]
    """Swaps and rollbacks of the traffic, as the server recorded them."""
    replays: tuple[Replay, ...]
    static_version: int
    """In force when the first phase ended; its neural weights are those of the static arm."""
    newest_version: int
    """Version of the tuned arm."""
    swaps: int
    """During the traffic; those of the replay are not counted."""
    rollbacks: int
    failed_requests: int
    """Live, replayed or warming up."""
    warmup_requests: int
    """Unmeasured requests of the replay."""
    seconds: float
    """From the start of the demo to its last answer, with start-up and replay."""
    machine: dict[str, Any]
    """Keys hardware, versions, commit."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Recording:
        """Inverse of ``to_json``."""
        fields = json.loads(text)
        return cls(
            **{
                **fields,
                "phases": tuple(PhaseSpan(**span) for span in fields["phases"]),
                "shifted": tuple(fields["shifted"]),
                "answers": tuple(
                    Answer(**{**answer, "acceptance": Acceptance(**answer["acceptance"])})
                    for answer in fields["answers"]
                ),
                "changes": tuple(VersionChange(**change) for change in fields["changes"]),
                "replays": tuple(
                    Replay(
                        **{
                            **replay,
                            "token_ids": tuple(replay["token_ids"]),
                            "acceptance": Acceptance(**replay["acceptance"]),
                        }
                    )
                    for replay in fields["replays"]
                ),
            }
        )


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
    """Tokens over seconds waited, of all replays together; ``None`` without replays."""
    chosen = list(replays)
    waited_s = sum(replay.request_s for replay in chosen)
    return sum(len(replay.token_ids) for replay in chosen) / waited_s if chosen else None


def tokens_per_step(replays: Iterable[Replay | Answer]) -> float | None:
    return sum((replay.acceptance for replay in replays), Acceptance()).tokens_per_step


def ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def median_speedup(replays: Sequence[Replay], arm: Arm, base: Arm) -> float | None:
    """Median over prompts of how much faster ``arm`` answered than ``base``."""
    speeds: dict[tuple[Arm, str, int], float | None] = {
        (replay.arm, replay.phase, replay.prompt): tokens_per_s([replay]) for replay in replays
    }
    pairs = (
        ratio(speed, speeds.get((base, phase, prompt)))
        for (which, phase, prompt), speed in speeds.items()
        if which == arm
    )
    known = [pair for pair in pairs if pair is not None]
    return statistics.median(known) if known else None


def mismatched_outputs(replays: Iterable[Replay]) -> int:
    """Number of prompts, over all phases, to which the arms gave different tokens."""
    answers: dict[tuple[str, int], set[tuple[int, ...]]] = {}
    for replay in replays:
        answers.setdefault((replay.phase, replay.prompt), set()).add(replay.token_ids)
    return sum(len(different) > 1 for different in answers.values())


def speeds(replays: Sequence[Replay]) -> dict[str, Any]:
    """The three speeds, their quotients, and the median quotient over prompts."""
    by_arm = {arm: tokens_per_s(r for r in replays if r.arm == arm) for arm in ARMS}
    return {
        **{f"{arm}_tokens_per_s": by_arm[arm] for arm in ARMS},
        "speedup_vs_plain": ratio(by_arm["tuned"], by_arm["plain"]),
        "speedup_vs_static": ratio(by_arm["tuned"], by_arm["static"]),
        "static_speedup_vs_plain": ratio(by_arm["static"], by_arm["plain"]),
        "median_speedup_vs_plain": median_speedup(replays, "tuned", "plain"),
        "median_speedup_vs_static": median_speedup(replays, "tuned", "static"),
    }


def phase_report(recording: Recording, span: PhaseSpan) -> dict[str, Any]:
    """Figures of one phase: replayed ones, and ``live_`` ones of its traffic."""
    replays = [replay for replay in recording.replays if replay.phase == span.name]
    answers = [answer for answer in recording.answers if answer.phase == span.name]
    quarter = max(1, len(answers) // 4)
    is_first = span == recording.phases[0]
    in_force: Arm = "static" if is_first else "tuned"
    per_step = {arm: tokens_per_step(r for r in replays if r.arm == arm) for arm in ARMS}
    report = {
        "name": span.name,
        **speeds(replays),
        "tokens_per_step": per_step[in_force],
        "tokens_per_step_version": (
            recording.static_version if is_first else recording.newest_version
        ),
        "static_tokens_per_step": per_step["static"],
        "tuned_tokens_per_step": per_step["tuned"],
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
    both on the held-out prompts that the first and the last phase share."""
    names = (recording.phases[0].name, recording.phases[-1].name)
    newest, former = (
        tokens_per_step(r for r in recording.replays if r.arm == arm and r.phase in names)
        for arm in ("tuned", "static")
    )
    return ratio(newest, former)


def live_tokens_per_s(answers: Sequence[Answer], span: PhaseSpan) -> float | None:
    length_s = span.ended_s - span.started_s
    return sum(a.num_tokens for a in answers) / length_s if length_s > 0 else None


DEFINITIONS = {
    "speeds": (
        "Completion tokens over seconds the client waited, held-out prompts answered one at a "
        "time, the three arms in turn on one server, trainer stopped. The top-level speeds are "
        "over the phases in shifted_phases together."
    ),
    "plain": "Requests with max_draft 0: the target alone.",
    "static": (
        "The same server and policy with the neural weights that were in force when the first "
        "phase ended."
    ),
    "tuned": "The same server and policy with the newest weights.",
    "tokens_per_step": (
        "Replayed: tokens per target pass of the drafter in force at the end of the first phase "
        "for that phase, and of the newest drafter for the others."
    ),
    "tokens_per_step_ratio_to_first": (
        "Newest weights over the weights of the end of the first phase, both replayed on the same "
        "held-out prompts of the first and the last phase; below 1 something was forgotten."
    ),
    "mismatched_outputs": "Replayed prompts whose greedy token ids differ between arms.",
    "requests": "Live and replayed, warm-up included.",
}


def build_report(recording: Recording) -> dict[str, Any]:
    """``report.json``."""
    shifted = [replay for replay in recording.replays if replay.phase in recording.shifted]
    return {
        "shifted_phases": list(recording.shifted),
        **speeds(shifted),
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
        "phases": [phase_report(recording, span) for span in recording.phases],
        **recording.machine,
        "definitions": DEFINITIONS,
    }


# Verdicts


def checks(report: dict[str, Any]) -> list[Check]:
    """The demo's goals on two CPU cores."""
    phases = {phase["name"]: phase for phase in report["phases"]}
    shifted = {name: phases[name] for name in report["shifted_phases"]}
    last = report["phases"][-1]
    return [
        *_speed_checks("shifted phases", report),
        *(check for name, phase in shifted.items() for check in _speed_checks(name, phase)),
        *(
            Check(f"{name}: speed over plain", phase["speedup_vs_plain"], 0.98, "at least")
            for name, phase in phases.items()
            if name not in shifted
        ),
        Check(
            f"{last['name']}: tokens_per_step over first",
            last["tokens_per_step_ratio_to_first"],
            0.95,
            "at least",
        ),
        Check("swaps", report["swaps"], 5, "at least"),
        Check("failed requests", report["failed_requests"], 0, "at most"),
        Check("mismatched outputs", report["mismatched_outputs"], 0, "at most"),
        Check("seconds", report["seconds"], 600, "at most"),
    ]


def _speed_checks(name: str, figures: dict[str, Any]) -> list[Check]:
    return [
        Check(f"{name}: speed over plain", figures["speedup_vs_plain"], 1.5, "at least"),
        Check(f"{name}: speed over static", figures["speedup_vs_static"], 1.25, "at least"),
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


def headline(report: dict[str, Any]) -> tuple[str, Mood]:
    """One sentence on what the demo showed, from the speeds on shifted traffic."""
    over_plain = mood_of_speedup(report["speedup_vs_plain"])
    over_static = mood_of_speedup(report["speedup_vs_static"])
    if report["speedup_vs_plain"] is None or report["speedup_vs_static"] is None:
        return "The speeds were not measured", "neutral"
    if over_plain == "bad":
        return "Drafting did not pay: the server was slower than plain decoding", "bad"
    if over_static == "bad":
        return "Learning did not pay: the tuned drafter was slower than the frozen one", "bad"
    if over_static == "neutral":
        return (
            "Learning changed nothing: the tuned drafter was as fast as the frozen one",
            "neutral",
        )
    return "The server got faster while it served", "good"


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
    "tuned tok/s",
    "× plain",
    "× static",
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
            shown(phase["speedup_vs_plain"]),
            shown(phase["speedup_vs_static"]),
            shown(phase["static_tokens_per_step"]),
            shown(phase["tuned_tokens_per_step"]),
            str(phase["requests"]),
        )
        for phase in report["phases"]
    ]
