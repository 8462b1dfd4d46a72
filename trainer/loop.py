"""The trainer's main loop and its running state.

Consumes: traces. Waits for: enough traces, and new ones once all were trained on ``replay_ratio``
times. Unblocked by: the server's recorder. Nothing waits for the trainer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from buffer.manifest import TENSORS
from buffer.records import Manifest
from configs.schema import Settings
from trainer import candidate, policy_turns
from trainer.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from trainer.figures import UpdateReport
from trainer.gate import Judge
from trainer.intake import Intake
from trainer.journal import Journal
from trainer.learner import MAX_SKIPS, Learner
from trainer.pace import Pace
from trainer.publish import Publisher
from trainer.replay import Memory, keys_in
from trainer.saver import Saver
from trainer.start import newest_drafter
from trainer.target import follow
from trainer.update_log import UpdateLog
from trainer.worth import Worth

POLL_S = 0.1
QUIET_S = 15.0
"""After this time without a trace, a candidate is judged without waiting for more updates."""


def run(*trainers: Trainer, still_ours: Callable[[], None] = lambda: None) -> None:
    """Train until told to stop, then save a checkpoint. The trainers of several drafters make one
    update each in turn; one that waits does not delay the others.

    Args:
        still_ours: called often; raises if the run folder is no longer this trainer's, which then
            writes nothing more.

    Raises:
        NotSavedError: the checkpoint at the end could not be written.
    """
    try:
        _train(trainers, still_ours)
        for trainer in trainers:
            trainer.learner.end()
        for trainer in trainers:
            trainer.check_saved()
    finally:
        for trainer in trainers:
            trainer.publisher.fits.close()
            trainer.intake.close()


def _train(trainers: Sequence[Trainer], still_ours: Callable[[], None]) -> None:
    for trainer in trainers:
        trainer.intake.start()
    while active := [trainer for trainer in trainers if not trainer.is_done()]:
        still_ours()
        turns = [trainer.take_turn() for trainer in active]
        if not any(turns):
            with active[0].updates.times.during("waiting"):
                active[0].stop.wait(POLL_S)
        for trainer in active:
            candidate.attend(trainer)
            policy_turns.attend(trainer)
            if trainer.candidate_is_due():
                trainer.judge_candidate()
            if trainer.checkpoint_is_due():
                trainer.checkpoint()
    still_ours()
    for trainer in trainers:
        trainer.finish()


class NotSavedError(OSError):
    """A trainer ends, and what it learnt last is in no checkpoint."""


@dataclass(slots=True)
class Trainer:
    """State of one trainer process."""

    settings: Settings
    intake: Intake
    publisher: Publisher
    memory: Memory
    learner: Learner
    judge: Judge
    published: Manifest
    """Manifest of the newest version, which candidates must beat."""
    random: np.random.Generator
    journal: Journal
    stop: threading.Event
    pace: Pace
    """When the next candidate is due."""
    saver: Saver
    worth: Worth
    """What learning costs and brings, and whether to go on."""
    restored: bool = False
    """Weights were restored, and no candidate was judged sound since."""
    updates: UpdateLog = field(default_factory=UpdateLog)
    """Updates that are not in the journal yet."""

    def is_done(self) -> bool:
        """Told to stop, or all steps are done."""
        return self.stop.is_set() or self._has_all_steps()

    def waits_for(self) -> str | None:
        """What the next update waits for; ``None`` if it can start."""
        if self._has_all_steps():
            return "the end"
        if self.worth.rests is not None:
            return f"acceptance to fall: {self.worth.rests}"
        return self.memory.waits_for()

    def take_turn(self) -> bool:
        """Take in traces and make an update, or report what that waits for. Returns whether there
        was one."""
        times = self.updates.times
        with times.during("taking_in"):
            self.take_in_traces()
        if self.waits_for() is not None:
            with times.during("waiting"):
                self.wait()
            return False
        with times.during("updates"):
            self.update()
        return True

    def take_in_traces(self) -> None:
        """Move the traces that arrived into memory, and drop what was deleted. If the target has
        other weights by now, learn for these."""
        if (moved := self.intake.moved_target()) is not None:
            follow(self, moved)
        # On a CPU the next batch is waited for, so that the same log gives the same updates.
        waits = not self.learner.runs_ahead or self.waits_for() is not None
        if samples := self.intake.read(wait=waits):
            self.memory.take_in(samples)
            self.worth.take_in(samples)
        self._drop_stale()
        self.worth.look()
        deletions = self.intake.new_deletions()
        if deletions is not None:
            num_traces = self.memory.forget(deletions.covers_owner)
            self.journal.event("deleted", traces=num_traces)

    def _drop_stale(self) -> None:
        """Hold ``trainer.max_staleness``."""
        most = self.settings.trainer.max_staleness
        if most is None:
            return
        oldest = self.published.version - most
        if num_traces := self.memory.drop_older(oldest):
            self.journal.event("stale", traces=num_traces, oldest_version=oldest)

    def update(self) -> None:
        """Train on one batch from memory. On a GPU its figures arrive some updates later."""
        started = time.monotonic()
        self.pace.duty.begin()
        parts = self.memory.draw(self.random)
        if not parts:
            return  # ``waits_for`` says why
        pieces = [piece for _, piece in parts]
        reports = self.learner.update(pieces)
        if self.pace.duty.waits:
            self.learner.wait()
        seconds = time.monotonic() - started
        self._worked(seconds)
        self.memory.trained_rows += sum(len(piece.rows) for piece in pieces)
        self.pace.steps_since_judged += 1
        self.updates.drew([sample for sample, _ in parts])
        self._follow(reports)
        self._write_status("training")
        self.rest(seconds)

    def rest(self, busy_s: float) -> None:
        """After this time of work, leave the device to others as long as ``trainer.duty`` says."""
        with self.updates.times.during("resting"):
            self.pace.duty.rest(busy_s, self.learner.wait)

    def breathe(self) -> None:
        """The same in the midst of a piece of work."""
        with self.updates.times.during("resting"):
            self.pace.duty.breathe(self.learner.wait)

    def settle(self) -> None:
        """Wait for the updates that were launched, and write what is known of them."""
        started = time.monotonic()
        reports = self.learner.settle()
        if reports:  # with none, nothing was waited for, and learning did not take the microseconds
            self._worked(time.monotonic() - started)
        self._follow(reports)
        self.write_updates()

    def _worked(self, seconds: float) -> None:
        self.updates.worked(seconds)
        self.worth.spend(seconds)

    def wait(self) -> None:
        """Report what is missing."""
        self.settle()
        self.pace.duty.is_idle(self.learner.wait)
        self._write_status(f"waiting for {self.waits_for()}")
        self.learner.rest()

    def candidate_is_due(self) -> bool:
        """There were enough updates, or any at all if traffic paused or all steps are done."""
        if self.pace.steps_since_judged == 0 or self.learner.skips_in_row or self.stop.is_set():
            return False
        if self.pace.is_cooling or self.publisher.is_busy:
            return False
        quiet_s = time.monotonic() - self.intake.last_trace_s
        is_quiet = quiet_s >= QUIET_S and self.waits_for() is not None
        return self.pace.is_due() or is_quiet or self._has_all_steps()

    def judge_candidate(self) -> None:
        """Judge the averaged weights, and publish them if they pass the gate; see
        ``trainer.candidate``."""
        candidate.begin(self)

    def end_candidate(self) -> None:
        """Wait until it is known what becomes of the candidate, if there is one."""
        candidate.attend(self, wait=True)

    def checkpoint_is_due(self) -> bool:
        """The last checkpoint is old enough and written, and the weights are sound."""
        self.report_checkpoint(wait=False)
        is_old = self.saver.age_s >= self.settings.trainer.checkpoint_every_s
        return is_old and not self.saver.is_busy and not self.learner.skips_in_row

    def checkpoint(self) -> None:
        """Begin to save everything needed to resume; it is written beside the next updates.

        If the disk is full, the previous checkpoint stays.
        """
        with self.updates.times.during("checkpoints"):
            self._begin_checkpoint()

    def _begin_checkpoint(self) -> None:
        self.settle()
        self.report_checkpoint(wait=True)
        tensors = self.learner.begin_state(self.saver.memory)
        self.saver.start(self.state_to_json(), tensors.tensors)

    def report_checkpoint(self, wait: bool) -> None:
        """Record the outcome of the checkpoint on its way, if there is one and it is known. Only
        now that it is on the disk, the buffer is told that its traces are done with."""
        saved = self.saver.outcome(wait)
        if saved is None:
            return
        if saved.error is not None:
            text = f"{saved.error}; the previous one stays"
            self.journal.event("checkpoint_failed", text=text)
            return
        self.journal.event(
            "checkpoint",
            step=saved.step,
            name=saved.name,
            bytes=saved.num_bytes,
            seconds=saved.seconds,
        )
        try:
            self.intake.commit(saved.offsets)
        except OSError as error:
            text = f"{error}; the next checkpoint commits these traces, too"
            self.journal.event("commit_failed", text=text)

    def finish(self) -> None:
        """Save a checkpoint if the weights are sound, and report the end."""
        self.intake.stop()
        self.settle()
        policy_turns.settle(self)
        self.end_candidate()
        if self.candidate_is_due():  # there were updates since the last one
            self.judge_candidate()
            self.end_candidate()
        policy_turns.end(self)
        if not self.learner.skips_in_row:
            self.checkpoint()
        self.report_checkpoint(wait=True)
        if self.saver.problem is None:
            self.journal.event("stopped", step=self.learner.step)
            self._write_status("stopped")

    def check_saved(self) -> None:
        """
        Raises:
            NotSavedError: the checkpoint at the end could not be written.
        """
        if (problem := self.saver.problem) is not None:
            raise NotSavedError(
                f"the checkpoint at the end, of step {self.learner.step}, could not be written "
                f"({problem}): what was learnt since the previous one is lost. Started again, the "
                f"trainer resumes from that one, and reads the traces since then again"
            )

    def identity(self) -> dict[str, Any]:
        """What must be equal in a checkpoint for this trainer to resume from it."""
        return {
            "target_fingerprint": self.intake.expected.target_fingerprint,
            "drafter_config": self.learner.trainable.config_to_json(self.learner.model),
        }

    def state_to_json(self) -> dict[str, Any]:
        """State that ``trainer.build.resume`` restores, besides the tensors."""
        memory = self.memory.to_json()
        return {
            **self.identity(),
            "step": self.learner.step,
            "num_skipped": self.learner.num_skipped,
            "lr": self.settings.trainer.lr,
            "lr_scale": self.learner.lr_scale,
            "steps_since_judged": self.pace.steps_since_judged,
            "refused_in_row": self.pace.refused_in_row,
            "worth": self.worth.to_json(),
            "highest_version": max(self.publisher.candidate.highest, self.published.version),
            "random": self.random.bit_generator.state,
            "memory": memory,
            "locations": self.intake.locations(keys_in(memory)),
            "offsets": self.intake.offsets(),
        }

    def _has_all_steps(self) -> bool:
        most = self.settings.trainer.max_steps
        return most is not None and self.learner.step >= most

    def _restore_weights(self) -> None:
        """Restore the last checkpoint or, if that did not help, the last published version. What is
        wrong then may be the graphs of the updates, so these are not captured any more."""
        self.end_candidate()
        self.report_checkpoint(wait=True)
        broken = self.learner.not_finite()
        state = f"nor is {broken[0]} ({len(broken)} in all)" if broken else "though its state is"
        why = f"{MAX_SKIPS} updates in a row were not finite, {state}"
        if self.restored and self.learner.give_up_graphs():
            why += "; updates are not captured in graphs any more"
        self.restore_from(None if self.restored else self._last_checkpoint(), why)

    def restore_from(self, saved: Checkpoint | None, why: str) -> None:
        """
        Args:
            saved: ``None``: restore the last published version.
        """
        if saved is None:
            self.learner.load_weights(self.judge.incumbent.state_dict())
        else:
            self.learner.load_state_tensors(saved.tensors)
        self.learner.lr_scale /= 2
        self.restored = True
        self.journal.event(
            "restored",
            step=self.learner.step,
            source="checkpoint" if saved else f"version {self.published.version}",
            text=f"{why}; learning rate halved",
            lr_scale=self.learner.lr_scale,
        )

    def _last_checkpoint(self) -> Checkpoint | None:
        try:
            return read_checkpoint(self.saver.root)
        except CheckpointError as error:
            self.journal.event("checkpoint_unreadable", text=str(error))
            return None

    def follow_roll_back(self) -> None:
        """Continue from the newest version that no server rolled back.

        Live traffic contradicted the gate's held-out traces, so both the weights and the incumbent
        are replaced.
        """
        rejected = self.published
        manifest, model = newest_drafter(
            self.settings,
            self.publisher.store,
            self.learner.head,
            self.intake.expected.target_fingerprint,
        )
        self.published = manifest
        policy_turns.withdraw(self)
        if manifest.files.get(TENSORS) == rejected.files.get(TENSORS):
            # The policy was at fault, not the weights, from which learning goes on.
            self.pace.cool(self.settings.trainer.cool_down_s)
            self.journal.event(
                "policy_rolled_back", version=manifest.version, rejected=rejected.version
            )
            return
        self.learner.load_weights(model.state_dict())
        self.judge.promote(self.learner.model)
        self.pace.cool(self.settings.trainer.cool_down_s)
        self.journal.event(
            "rolled_back",
            step=self.learner.step,
            version=manifest.version,
            rejected=rejected.version,
        )

    def _follow(self, reports: Sequence[UpdateReport]) -> None:
        """Act on figures that arrived."""
        for report in reports:
            self.updates.add(report)
            self.pace.saw(report)
        if reports and self.learner.skips_in_row >= MAX_SKIPS:
            self._restore_weights()
        if self.updates.is_due():
            self.write_updates()

    def write_updates(self) -> None:
        """One event for the updates since the last one."""
        with self.updates.times.during("reporting"):
            self._write_updates()

    def _write_updates(self) -> None:
        if values := self.updates.taken(self.published.version):
            shown = ("loss", "alpha", "agree", "staleness", "staleness_max")
            self.updates.latest |= {name: values[name] for name in shown}
            sharing = self.pace.duty.figures()
            self.journal.event("update", version=self.published.version, sharing=sharing, **values)

    def _write_status(self, state: str) -> None:
        if not self.journal.status_is_due(state):
            return
        with self.updates.times.during("reporting"):
            self.journal.status(self._status(state))

    def _status(self, state: str) -> dict[str, Any]:
        memory, counts = self.memory, self.intake.counts
        return {
            "state": state,
            "step": self.learner.step,
            "skipped": self.learner.num_skipped,
            "version": self.published.version,
            "refused_in_row": self.pace.refused_in_row,
            "traces": {
                "read": counts.read,
                "duplicate": counts.duplicate,
                "quarantined": counts.quarantined,
                "damaged": counts.damaged,
                "evicted_unread": counts.evicted_unread,
                "deleted": counts.deleted + self.intake.num_deleted,
                "refused": dict(self.intake.num_refused),
                "taken_in": memory.num_samples,
                "held": len(memory.samples()),
                "stale": memory.num_stale,
                "held_out": memory.num_held_out,
                "judging": len(memory.held_out) + len(memory.held_out_older),
            },
            "fresh_rows": memory.fresh_rows,
            "trained_rows": memory.trained_rows,
            "lr": self.learner.lr,
            **self.updates.latest,
            **self.worth.figures(),
            "policy": self.publisher.fits.figures(),
            "sharing": self.pace.duty.figures(),
            "time": self.updates.times.figures(),
        }
