"""One process of a trainer, from start to end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from buffer.files import why_unwritable
from configs.ahead import Ahead
from configs.phases import seconds_of_life, timed, took, uncollected
from configs.schema import Settings
from reporting.reports import Reports, reports_of
from targets.find import checked_folder
from trainer.lifeline import watch
from trainer.lock import STOP_SIGNAL, RunGoneError, RunLock, only_trainer
from trainer.run_target import Place, target_of_run

if TYPE_CHECKING:
    from trainer.duty import Duty

log = logging.getLogger(__name__)


class TrainerDiedError(Exception):
    """Training cannot continue; the log says why."""


def run_alone(settings: Settings) -> None:
    """Train in this process until told to stop.

    Raises:
        ValueError, OSError: it cannot start.
        TrainerDiedError: it could not continue.
    """
    stop = stop_on_signal()
    with _owned(settings) as lock, reports_of(settings, "trainer") as reports:
        _train(settings, stop, reports, lock)


def run_among(settings: Settings, lifeline: int | None) -> None:
    """Be one process of a trainer: the first is the trainer itself, the others compute for it. The
    environment says which of them; see ``trainer.group.joined``.

    Args:
        lifeline: file descriptor that ends when whoever started this process does; it then stops
            as if told to. ``None``: nobody is watched.

    Raises:
        ValueError, OSError: it cannot start.
        TrainerDiedError: it could not continue.
    """
    if os.environ.get("RANK", "0") == "0":
        stop = stop_on_signal()
        if lifeline is not None:
            watch(lifeline, stop.set)
        with _owned(settings) as lock, reports_of(settings, "trainer") as reports:
            _train(settings, stop, reports, lock, is_alone=False)
        return
    if lifeline is not None:
        # The first process stops and lets this one go; should it not, this one has no use.
        last_resort = threading.Timer(60, os._exit, (1,))
        last_resort.daemon = True  # else a process that has ended in time would wait for it
        watch(lifeline, last_resort.start)
    _work(settings)


@contextlib.contextmanager
def _owned(settings: Settings) -> Iterator[RunLock]:
    """The run folder, for this trainer alone.

    Raises:
        OSError: nothing can be written to it; says so in words.
        ValueError: another trainer works there.
    """
    problem = why_unwritable(settings.run_dir)
    if problem is not None:
        raise OSError(
            f"run_dir {settings.run_dir} cannot be written ({problem}): a trainer keeps its "
            f"checkpoints and versions there; not starting. Make room there, or choose another "
            f"run_dir"
        )
    with only_trainer(settings.run_dir / "trainer") as lock:
        yield lock


def stop_on_signal() -> threading.Event:
    """An event that SIGTERM and SIGINT set, a second of which ends the process at once; and
    ``STOP_SIGNAL``, which may come any number of times."""
    stop = threading.Event()

    # Not by logging: the interrupted code may hold its locks.
    def handle(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"stopping after this update; a second signal stops at once\n")

    def stop_gently(_number: int, _frame: object) -> None:
        if not stop.is_set():
            os.write(2, b"stopping after this update, as trainer stop asks\n")
        stop.set()

    signal.signal(STOP_SIGNAL, stop_gently)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
    return stop


def notice_suspension(duty: Duty) -> None:
    """Tell the trainer's duty when this process goes on after a signal had stopped it, so that the
    time in between counts neither as work nor as rest."""
    signal.signal(signal.SIGCONT, lambda _number, _frame: duty.was_suspended())


def _train(
    settings: Settings,
    stop: threading.Event,
    reports: Reports,
    lock: RunLock,
    is_alone: bool = True,
) -> None:
    log.info("starting: target %s, run_dir %s", settings.target, settings.run_dir)
    if (begun_s := seconds_of_life()) is not None:
        took("started Python, read the settings and locked the run", begun_s)
    place = _imported_and_found(settings)
    from trainer.build import build_trainers
    from trainer.group import joined, single
    from trainer.links import GroupError
    from trainer.loop import NotSavedError, run

    among = contextlib.nullcontext(single()) if is_alone else joined(settings.trainer.device)
    with _told("the trainer"), among as group:
        with timed("made the trainer"):
            trainers = build_trainers(settings, stop, reports, group, place)
        if stop.is_set():
            log.info("stopped before training began")
            for trainer in trainers:
                trainer.learner.end()
            return
        notice_suspension(trainers[0].pace.duty)
        try:
            run(*trainers, still_ours=lock.check)
        except Exception as error:
            # What another process, the run folder or the disk did says it all; a traceback would
            # hide it.
            is_told = isinstance(error, GroupError | RunGoneError | NotSavedError)
            text = "the trainer died: %s: %s"
            log.critical(text, type(error).__name__, error, exc_info=not is_told)
            for trainer in trainers:
                with contextlib.suppress(OSError):  # a full disk may be what it died of
                    trainer.journal.failed(error)
            raise TrainerDiedError from error


def _imported_and_found(settings: Settings) -> Place:
    """Import what trains, which takes a second of a core or more, and hash the target meanwhile.
    --help and whoever was refused do neither.

    Returns:
        The target's weights in this run.

    Raises:
        ValueError: they cannot be used; the message says why.
    """
    checked_folder(settings.target, settings.target_cache)
    with uncollected():
        finding = Ahead("found the target", partial(target_of_run, settings))
        with timed("imported torch and the trainer"):
            import trainer.build
            import trainer.group
            import trainer.loop  # noqa: F401
        return finding.result()


def _work(settings: Settings) -> None:
    place = _imported_and_found(settings)
    from targets.head import load_target_head
    from trainer.build import set_up_process
    from trainer.group import device_of, joined
    from trainer.team import work
    from trainer.update import batch_dtype

    set_up_process(settings)
    with _told("a worker"), joined(settings.trainer.device) as group:
        # The first process stops when told to, and says when this one has nothing left to do.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        device = device_of(settings.trainer.device, group)
        head = load_target_head(place.folder, device, batch_dtype(device))
        work(group, settings.trainer, head, device, fingerprint=place.fingerprint)


@contextlib.contextmanager
def _told(who: str) -> Iterator[None]:
    """Another process that is gone ends this one, in words."""
    from trainer.links import GroupError

    try:
        yield
    except GroupError as error:
        log.critical("%s ends: %s", who, error)
        raise TrainerDiedError from error
