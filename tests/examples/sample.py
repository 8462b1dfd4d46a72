"""A synthetic recording of a demo: four phases, a drafter that learns the shifted ones."""

from __future__ import annotations

import random

from buffer.records import Acceptance
from examples.arms import ALL_ARMS, Arm
from examples.recording import (
    Answer,
    Goals,
    Learning,
    PhaseSpan,
    Recording,
    Replay,
    VersionChange,
)

NAMES = ("python", "c", "docs", "python-again")
DOMAINS = ("python", "c", "docs")
STATIC = {"python": 3.4, "c": 2.1, "docs": 2.2, "python-again": 3.4}
INDEX = {"python": 3.4, "c": 2.5, "docs": 2.4, "python-again": 3.4}
TUNED = {"python": 3.35, "c": 3.3, "docs": 2.9, "python-again": 3.35}
PLAIN_TOKENS_PER_S = 150.0
TOKENS = 96


def acceptance_of(tokens_per_step: float, num_tokens: int = TOKENS) -> Acceptance:
    num_steps = round(num_tokens / tokens_per_step)
    return Acceptance(num_steps, 4 * num_steps, num_tokens - num_steps)


def sample_answers(per_phase: int) -> tuple[Answer, ...]:
    rng = random.Random(0)
    answers, now_s, version = [], 10.0, 0
    for name in NAMES:
        for index in range(per_phase):
            progress = min(1.0, index / (0.6 * per_phase))
            level = STATIC[name] + progress * (TUNED[name] - STATIC[name])
            now_s += TOKENS / (level * 60) * rng.uniform(0.8, 1.2)
            version += name != "python" and index % 12 == 5
            acceptance = acceptance_of(level * rng.uniform(0.9, 1.1))
            domain = name.removesuffix("-again")
            answers.append(Answer(name, now_s, TOKENS, acceptance, version, version, domain))
    return tuple(answers)


def changes_of(answers: tuple[Answer, ...]) -> tuple[VersionChange, ...]:
    """A swap just before the first answer of each version."""
    firsts = {answer.version: answer.finished_s for answer in reversed(answers)}
    return tuple(VersionChange(s - 0.01, v, False) for v, s in sorted(firsts.items()) if v)


def sample_replays(prompts: int) -> tuple[Replay, ...]:
    return tuple(
        Replay(
            domain,
            arm,
            prompt,
            request_s(domain, arm),
            request_s(domain, arm),
            tokens_of(domain, prompt),
            spent(domain, arm),
            7,
            prompt,
        )
        for domain in DOMAINS
        for arm in ALL_ARMS
        for prompt in range(prompts)
    )


def level(name: str, arm: Arm) -> float:
    """tokens_per_step of an arm."""
    levels = {
        "plain": 1.0,
        "static": STATIC[name],
        "index": INDEX[name],
        "tuned": TUNED[name],
        "drafter_alone_static": 0.8 * STATIC[name],
        "drafter_alone_tuned": 0.8 * TUNED[name],
    }
    return levels[arm]


def request_s(name: str, arm: Arm) -> float:
    speedup = 1.0 if arm == "plain" else 0.6 * level(name, arm)
    return TOKENS / (PLAIN_TOKENS_PER_S * speedup)


def spent(name: str, arm: Arm) -> Acceptance:
    return Acceptance(TOKENS, 0, 0) if arm == "plain" else acceptance_of(level(name, arm))


def tokens_of(name: str, prompt: int) -> tuple[int, ...]:
    return tuple(random.Random(f"{name} {prompt}").choices(range(96), k=TOKENS))


def sample_recording(per_phase: int = 60, prompts: int = 4) -> Recording:
    answers = sample_answers(per_phase)
    ends = [10.0, *(answers[(i + 1) * per_phase - 1].finished_s for i in range(len(NAMES)))]
    return Recording(
        phases=tuple(
            PhaseSpan(name, name.removesuffix("-again"), ends[i], ends[i + 1])
            for i, name in enumerate(NAMES)
        ),
        shifted=("c", "docs"),
        answers=answers,
        changes=changes_of(answers),
        replays=sample_replays(prompts),
        static_version=0,
        newest_version=answers[-1].version,
        swaps=answers[-1].version,
        rollbacks=0,
        failed_requests=0,
        warmup_requests=24,
        seconds=500.0,
        learning=Learning("CPU", 60.0, 400, 400_000),
        target="target",
        temperature=0.4,
        num_clients=4,
        replay_clients=1,
        goals=Goals(),
        load_before=0.1,
        machine={"hardware": {"cpu": "a CPU", "cores": 2}, "versions": {}, "commit": None},
    )
