"""The draft policy that is fitted beside the drafter: when it is fitted, and how it is published.

Consumes: the traces that the trainer has read, of which those of late are kept.
Waits for: enough of them, and for its process to answer. Nothing waits for it: the trainer looks in
between two updates. A network that passes its gate lies in ``run_dir/policy``, whole or not at all,
and comes with the drafter's next version; if there is none for a while, with a version that has the
weights in force.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from buffer.bundles import BundleError
from buffer.interface import ServiceAwayError
from buffer.records import Manifest
from trainer.fitted_policy import KINDS, fitted_policy
from trainer.fitting import NotYetError
from trainer.publish import publish_policy

if TYPE_CHECKING:
    from trainer.fits import Fits
    from trainer.fitting import Fitted
    from trainer.loop import Trainer

MOST_S = 3600.0
"""After which a process that fits is given up: it takes seconds to minutes, more on a busy host."""
_RETRY_S = 10.0
"""Seconds after a version could not be published before that is tried again."""


def attend(trainer: Trainer) -> None:
    """Go on with the policy as far as that is possible at present. Cheap, and never waits."""
    fits = trainer.publisher.fits
    if fits.plan is None or not fits.is_time():
        return
    if fits.process is not None:
        if fits.process.is_over:
            _answered(trainer, fits)
        elif time.monotonic() - fits.process.began_s > MOST_S:
            fits.close()
            _failed(trainer, fits, f"its process was ended after {MOST_S:g} s")
    elif (awaited := fits.waits_for()) is None:
        _begin(trainer, fits)
    else:
        _tell_what_is_awaited(trainer, fits, awaited)
    if fits.publishing is not None:
        if fits.publishing.done():
            _published(trainer, fits)
        return
    fits.look(trainer.published)
    if _is_due(trainer, fits):
        publish(trainer)


def publish(trainer: Trainer) -> None:
    """Begin to publish the network with the weights in force. If the published version was rolled
    back, go on from an older one instead."""
    publisher, fits = trainer.publisher, trainer.publisher.fits
    try:
        is_denied = trainer.published.version in publisher.store.read_denied()
    except ServiceAwayError:
        _put_off(fits)
        return
    if is_denied:
        trainer.follow_roll_back()
        return
    parent, above = trainer.published, publisher.candidate.highest
    settings = trainer.settings

    def work() -> Manifest:
        return publish_policy(
            publisher.store,
            parent,
            fitted_policy(settings.run_dir, settings.drafter.kind),
            without=[kind.key for kind in KINDS.values()],
            keep=settings.trainer.keep_versions,
            epoch=publisher.epoch,
            above=above,
        )

    fits.publishing = publisher.candidate.pool.submit(work)


def settle(trainer: Trainer) -> None:
    """End what is under way: a fit is dropped, a version is waited for."""
    fits = trainer.publisher.fits
    fits.close()
    if fits.publishing is not None:
        _published(trainer, fits)


def end(trainer: Trainer) -> None:
    """Where all steps are done, publish a network that has passed and came with no version."""
    fits = trainer.publisher.fits
    if fits.plan is None or trainer.stop.is_set():
        return
    fits.look(trainer.published)
    if fits.passed_s is not None:
        publish(trainer)
    settle(trainer)


def withdraw(trainer: Trainer) -> None:
    """A version was rolled back: the network of the one that is the newest now is taken again."""
    fits = trainer.publisher.fits
    try:
        fits.withdraw(trainer.published)
    except (OSError, ValueError) as error:
        _tell_failure(
            trainer, fits, f"the network of a version that was rolled back stays: {error}"
        )


def _is_due(trainer: Trainer, fits: Fits) -> bool:
    """A network waits for the drafter's next version, which is not to be expected soon."""
    assert fits.plan is not None
    if fits.passed_s is None or trainer.publisher.candidate.is_busy or trainer.pace.is_cooling:
        return False
    now_s = time.monotonic()
    is_over = now_s - fits.passed_s >= fits.plan.settings.wait_s
    return now_s >= fits.not_before_s and (is_over or trainer.worth.rests is not None)


def _put_off(fits: Fits) -> None:
    """Try to publish again later."""
    fits.not_before_s = time.monotonic() + _RETRY_S


def _begin(trainer: Trainer, fits: Fits) -> None:
    fits.told = None
    try:
        fits.begin(trainer.published)
    except OSError as error:
        _failed(trainer, fits, f"its process could not be started: {error}")


def _tell_what_is_awaited(trainer: Trainer, fits: Fits, awaited: str) -> None:
    """Once for each that is not the same with other numbers."""
    kind = "".join(letter for letter in awaited if not letter.isdigit())
    if kind == fits.told:
        return
    fits.told = kind
    assert fits.plan is not None
    trainer.journal.event(
        "policy_waits",
        kind=fits.plan.kind,
        text=f"the policy {fits.plan.kind} waits for {awaited}",
    )


def _answered(trainer: Trainer, fits: Fits) -> None:
    assert fits.process is not None and fits.plan is not None
    process, fits.process = fits.process, None
    seconds = time.monotonic() - process.began_s
    try:
        found = process.answer()
        fits.plan.fitted.check(found.network)
    except NotYetError as error:
        fits.counts["not_yet"] += 1
        fits.awaits = str(error)
    except ValueError as error:
        _failed(trainer, fits, str(error))
    else:
        fits.awaits = None
        _judged(trainer, fits, found, seconds, is_overtaken=fits.is_overtaken(process))
    finally:
        process.end()


def _judged(
    trainer: Trainer, fits: Fits, found: Fitted, seconds: float, *, is_overtaken: bool
) -> None:
    assert fits.plan is not None
    kept, text = found.passed, "; ".join(found.lines)
    if found.passed and is_overtaken:
        kept = False
        text += "; another network has come meanwhile, so it is fitted again later"
    elif found.passed:
        try:
            fits.keep(found.network)
        except OSError as error:
            kept = False
            text += f"; it cannot be kept ({error}) and is fitted again later"
    fits.counts["passed" if kept else "refused" if not found.passed else "failed"] += 1
    origin = found.origin
    fits.last = {
        "kind": fits.plan.kind,
        "drafter": origin.drafter,
        "passed": found.passed,
        "kept": kept,
        "gain": found.gain,
        "at_least": found.low,
        "steps": found.num_steps,
        "judged_by": found.num_judged,
        "oldest": origin.oldest,
        "newest": origin.newest,
        "seconds": seconds,
        "text": text,
    }
    trainer.journal.event("policy_gate", version=trainer.published.version, **fits.last)


def _failed(trainer: Trainer, fits: Fits, text: str) -> None:
    fits.counts["failed"] += 1
    _tell_failure(trainer, fits, text)


def _tell_failure(trainer: Trainer, fits: Fits, text: str) -> None:
    kind = "none" if fits.plan is None else fits.plan.kind
    trainer.journal.event("policy_failed", kind=kind, text=text)


def _published(trainer: Trainer, fits: Fits) -> None:
    """It is known what became of the version with the weights in force.

    Raises:
        ValueError: another trainer has taken over.
    """
    assert fits.publishing is not None and fits.plan is not None
    job, fits.publishing = fits.publishing, None
    try:
        manifest = job.result()
    except (OSError, BundleError) as error:
        _put_off(fits)
        _tell_failure(
            trainer, fits, f"what has passed could not be published: {error}; trying again"
        )
        return
    candidate = trainer.publisher.candidate
    parent = trainer.published
    fingerprint = parent.target_fingerprint  # the target may have been replaced meanwhile
    trainer.published = replace(manifest, target_fingerprint=fingerprint)
    candidate.highest = max(candidate.highest, manifest.version)
    fits.passed_s = None
    trainer.journal.event(
        "policy_published",
        kind=fits.plan.kind,
        step=trainer.learner.step,
        version=manifest.version,
        parent=parent.version,
    )
