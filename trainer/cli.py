"""Train the drafter of a run on the traces its server writes, and publish better versions.

Exit code 0: told to stop, or all steps done. 1: it could not start, or could not continue. 2: wrong
usage or settings, or nothing to train.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading

import typer

from configs.cli import (
    ConfigOption,
    PrintConfigOption,
    SetOption,
    VersionOption,
    exit_code,
    settings_from_cli,
)
from configs.logs import set_up_logging
from configs.schema import Settings
from drafters.trainable import learning_kinds
from trainer.lock import only_trainer

log = logging.getLogger(__name__)
app = typer.Typer(
    no_args_is_help=True, help=__doc__, add_completion=False, pretty_exceptions_enable=False
)


@app.callback()
def main(version: VersionOption = False) -> None:
    """Keeps ``launch`` a subcommand while it is the only one."""


@app.command()
def launch(
    config: ConfigOption = None,
    set_: SetOption = None,
    print_config: PrintConfigOption = False,
) -> None:
    """Learn from the traces of ``run_dir`` until told to stop."""
    settings = settings_from_cli(config, set_, print_config)
    if settings.drafter.kind not in learning_kinds():
        typer.echo(
            f"drafter.kind is {settings.drafter.kind!r}: there is nothing to train. Set it to one "
            f"that learns ({', '.join(learning_kinds())}), or run the server alone",
            err=True,
        )
        raise typer.Exit(code=2)
    set_up_logging(settings.log_level)
    stop = _stop_on_signal()
    try:
        with only_trainer(settings.run_dir / "trainer"):
            _train(settings, stop)
    except (ValueError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=exit_code(error)) from error


def _stop_on_signal() -> threading.Event:
    """An event that SIGTERM and SIGINT set; a second signal ends the process at once."""
    stop = threading.Event()

    def handle(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)
        # Not by logging: the interrupted code may hold its locks.
        os.write(2, b"stopping after this update; a second signal stops at once\n")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
    return stop


def _train(settings: Settings, stop: threading.Event) -> None:
    """
    Raises:
        ValueError, OSError: it cannot start.
        typer.Exit: 1 after logging why it cannot continue.
    """
    log.info("starting: target %s, run_dir %s", settings.target, settings.run_dir)
    # --help and a refused second trainer skip these imports: torch and transformers take seconds.
    from trainer.build import build_trainer
    from trainer.loop import run

    trainer = build_trainer(settings, stop)
    if stop.is_set():
        log.info("stopped before training began")
        return
    try:
        run(trainer)
    except Exception as error:
        log.critical("the trainer died: %s: %s", type(error).__name__, error, exc_info=True)
        with contextlib.suppress(OSError):  # a full disk may be what it died of
            trainer.journal.failed(error)
        raise typer.Exit(code=1) from error
