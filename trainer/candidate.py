"""The candidate: the averaged weights that are judged and, if they pass, published.

On a GPU that takes no time from the updates. A copy of the weights is judged behind the updates
that were launched, its figures are read once they have arrived, and a thread puts the version
together and writes it. Until that is over, no other candidate is judged. On a CPU, where nothing is
gained by that, everything is done at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from buffer.interface import ServiceAwayError
from buffer.records import Manifest
from buffer.sealed import Sealed
from policies.gate import GateVerdict
from trainer.fitted_policy import fitted_policy
from trainer.gate import GATE_DRAFT_K, Judgement
from trainer.publish import Outcome, is_same, publish_version
from trainer.times import Part

if TYPE_CHECKING:
    from trainer.gate import Judging
    from trainer.loop import Trainer


def begin(trainer: Trainer) -> None:
    """Take the averaged weights as a candidate, and begin to judge them. If the published version
    was rolled back, go on from an older one instead."""
    candidate, publisher, pace = trainer.publisher.candidate, trainer.publisher, trainer.pace
    assert not candidate.is_busy, "one candidate at a time"
    pace.begin_judging()
    if candidate.beside:
        trainer.write_updates()
    else:
        trainer.settle()
    try:
        if trainer.published.version in publisher.store.read_denied():
            trainer.settle()
            trainer.follow_roll_back()
            pace.judged(None, None, 0.0)
            return
    except ServiceAwayError as away:
        if line := publisher.outage.failed(str(away)):
            trainer.journal.event("buffer_away", text=f"{line}; it is judged later")
        pace.judged(None, None, 0.0)
        return
    if line := publisher.outage.ended():
        trainer.journal.event("buffer_back", text=line)
    candidate.began_s = pace.working_s
    candidate.step = trainer.learner.step
    pace.duty.begin()
    with _busy(trainer, "judging"):
        model = candidate.take(trainer.learner.average)
        memory, speed = trainer.memory, trainer.worth.costs.speed_table(GATE_DRAFT_K)
        given = model, memory.held_out, memory.held_out_older, speed
        candidate.judging = trainer.judge.begin(*given)
    if not candidate.beside:
        attend(trainer, wait=True)


def attend(trainer: Trainer, *, wait: bool = False) -> None:
    """Go on with the candidate as far as that is possible at present.

    Args:
        wait: until its outcome is known.
    """
    candidate = trainer.publisher.candidate
    if candidate.judging is not None and (wait or candidate.judging.is_ready):
        with _busy(trainer, "judging"):
            _judged(trainer, candidate.judging)
    if candidate.job is not None and (wait or candidate.job.done()):
        with _busy(trainer, "publishing"):
            _ended(trainer, candidate.job.result())


@contextlib.contextmanager
def _busy(trainer: Trainer, part: Part) -> Iterator[None]:
    """Work that keeps the updates from going on, and a rest after it."""
    started_s = trainer.pace.working_s
    with trainer.updates.times.during(part):
        yield
    seconds = trainer.pace.working_s - started_s
    trainer.worth.spend(seconds)
    trainer.rest(seconds)


def _judged(trainer: Trainer, judging: Judging) -> None:
    """The figures have arrived: publish the candidate, or give it up."""
    candidate = trainer.publisher.candidate
    judgement = judging.judgement()
    candidate.judging = None
    candidate.judging_s = trainer.pace.working_s - candidate.began_s
    assert candidate.model is not None, "it was judged"
    if not judgement.verdict.passed:
        _ended(trainer, Outcome(judgement, None))
        return
    work = partial(
        _published,
        trainer,
        candidate.model,
        judgement,
        step=candidate.step,
        learning_s=trainer.worth.payback.spent_s,
    )
    if candidate.beside:
        candidate.job = candidate.pool.submit(work)
    else:
        with trainer.updates.times.during("publishing"):
            _ended(trainer, work())


def _published(
    trainer: Trainer, model: nn.Module, judgement: Judgement, *, step: int, learning_s: float
) -> Outcome:
    """Publish a candidate that has passed, beside updates: nothing of what it reads do they change.
    After weights were restored they may be those of a version, which no margin makes a new one."""
    learner, publisher = trainer.learner, trainer.publisher
    with _own_stream(learner.store.device):
        content = publisher.content_of(learner.trainable, model)
        verdict = _known_already(trainer, model, content)
        if verdict is not None:
            return Outcome(replace(judgement, verdict=verdict), None)
        try:
            published = publish_version(
                publisher.store,
                content,
                trainer.published,
                judgement,
                step=step,
                learning_s=learning_s,
                keep=trainer.settings.trainer.keep_versions,
                epoch=publisher.epoch,
                policy=fitted_policy(trainer.settings.run_dir, trainer.settings.drafter.kind),
                above=publisher.candidate.highest,
            )
        except OSError as error:  # the disk is full, or the buffer's service away
            return Outcome(judgement, None, error)
    return Outcome(judgement, published)


def _known_already(trainer: Trainer, model: nn.Module, content: Sealed) -> GateVerdict | None:
    """What the verdict is instead if these are the weights of a version."""
    try:
        found = trainer.publisher.version_with(content)
    except ServiceAwayError:
        found = None  # then it cannot be published either, and that is told
    if is_same(trainer.learner.trainable, model, trainer.judge.incumbent):
        found = trainer.published.version, False
    if found is None:
        return None
    version, is_denied = found
    reason = f"these are the weights of version {version} itself"
    if is_denied:
        return GateVerdict(False, f"{reason}, which was rolled back", "denied")
    return GateVerdict(False, reason, "equal")


def _ended(trainer: Trainer, outcome: Outcome) -> None:
    """Tell what became of the candidate, and draw the consequences."""
    candidate, judgement, pace = trainer.publisher.candidate, outcome.judgement, trainer.pace
    candidate.job = None
    trainer.updates.latest["gate"] = judgement.to_json()
    trainer.journal.event(
        "gate",
        step=candidate.step,
        seconds=candidate.judging_s,
        parent=trainer.published.version,
        acceptance=judgement.acceptance,
        domains={name: asdict(one) for name, one in judgement.domains.items()},
        **judgement.to_json(),
    )
    if outcome.problem is not None:
        trainer.journal.event("publish_failed", text=f"{outcome.problem}; training continues")
    elif outcome.published is not None:
        _promote(trainer, outcome.published)
    elif judgement.is_hopeless:
        trainer.settle()
        pace.begin()
        trainer.restore_from(None, "the candidate is far behind the incumbent")
    else:
        pace.refused_in_row += 1
    trainer.restored = trainer.restored and judgement.is_hopeless
    took_s = candidate.judging_s if candidate.beside else pace.working_s - candidate.began_s
    pace.judged(judgement.relative_error, judgement.verdict.lacks, took_s)
    trainer.worth.judged(judgement, pace.refused_in_row)


def _promote(trainer: Trainer, published: Manifest) -> None:
    """The candidate is the newest version now, which the next ones must beat."""
    candidate = trainer.publisher.candidate
    trainer.published = published
    candidate.highest = max(candidate.highest, published.version)
    trainer.pace.refused_in_row = 0
    assert candidate.model is not None, "it was judged"
    trainer.judge.promote(candidate.model, was_judged=True)
    trainer.journal.event(
        "published", step=candidate.step, version=published.version, parent=published.parent
    )


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """What this thread asks of a GPU does not queue behind the updates. The candidate's weights are
    there: its figures have arrived."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(_stream_of(device)):
        yield


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
