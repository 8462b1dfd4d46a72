"""Everything a demo observed, and its JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from buffer.records import Acceptance
from examples.arms import Arm


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
    domain: str
    """Of its prompt."""


@dataclass(frozen=True, slots=True)
class Replay:
    """One held-out prompt, answered by one arm."""

    domain: str
    """Phases of one domain share its replay."""
    arm: Arm
    prompt: int
    """Index among the held-out prompts of the domain."""
    request_s: float
    """Seconds the client waited."""
    share_s: float
    """Its share of the server's time: the seconds of its turn over the turn's requests. Equal to
    ``request_s``, but for the client's own time, where one request is answered at a time."""
    token_ids: tuple[int, ...]
    acceptance: Acceptance
    version: int
    turn: int
    """First prompt of the turn in which it was answered. Every arm answers the same prompts in a
    turn, and they share its seconds, so a turn is one measurement."""


@dataclass(frozen=True, slots=True)
class PhaseSpan:
    """When a phase of traffic ran."""

    name: str
    domain: str
    started_s: float
    ended_s: float
    mixed_with: tuple[str, ...] = ()
    """Further domains of its traffic."""

    @property
    def domains(self) -> tuple[str, ...]:
        """All that its prompts were about."""
        return self.domain, *self.mixed_with


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
class Learning:
    """What the trainer spent."""

    device: str
    """``CPU`` or ``GPU``."""
    seconds: float
    """Time of updates and gates. On a CPU the trainer has one core."""
    updates: int
    rows: int
    """Rows trained on, repetitions included."""


@dataclass(frozen=True, slots=True)
class Goals:
    """What a demo is held against, on shifted traffic."""

    over_plain: float = 1.3
    over_static: float = 1.1
    seconds: float = 600.0
    """Of the whole demo."""


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
    """In force when the first phase ended: the frozen weights."""
    newest_version: int
    """The newest weights."""
    swaps: int
    """During the traffic; those of the replay are not counted."""
    rollbacks: int
    failed_requests: int
    """Live, replayed or warming up."""
    warmup_requests: int
    """Unmeasured ones of the replay."""
    seconds: float
    """From the start of the demo to its last answer, with start-up and replay."""
    learning: Learning
    target: str
    """Its name in the API."""
    temperature: float
    num_clients: int
    """Concurrent requests of the traffic."""
    replay_clients: int
    """Concurrent requests of the replay."""
    goals: Goals
    load_before: float
    """Load average of the last minute when the demo began: work of others."""
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
                "phases": tuple(
                    PhaseSpan(**{**span, "mixed_with": tuple(span["mixed_with"])})
                    for span in fields["phases"]
                ),
                "shifted": tuple(fields["shifted"]),
                "answers": tuple(
                    Answer(**{**answer, "acceptance": Acceptance(**answer["acceptance"])})
                    for answer in fields["answers"]
                ),
                "changes": tuple(VersionChange(**change) for change in fields["changes"]),
                "learning": Learning(**fields["learning"]),
                "goals": Goals(**fields["goals"]),
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


def learning_of(journal: Path, device: str) -> Learning:
    """What the trainer spent, by its journal ``trainer/log.jsonl``, whether it came to something or
    not. Without a journal nothing was spent."""
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
    events = [json.loads(line) for line in lines]
    updates = [event for event in events if event["event"] == "update"]
    return Learning(
        device=device,
        seconds=sum(event["seconds"] for event in events if event["event"] in ("update", "gate")),
        updates=sum(event["updates"] for event in updates),
        rows=sum(event["rows"] for event in updates),
    )
