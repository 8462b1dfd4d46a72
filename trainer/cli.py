"""Train the drafter of a run on the traces its server writes, and publish better versions.

Exit code 0: told to stop, or all steps done. 1: it could not start, or could not continue. 2: wrong
usage or settings, or nothing to train.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from buffer.audit import audit
from buffer.files import forbid_core_dumps
from configs.choices import SettingsError
from configs.cli import (
    Commands,
    ConfigOption,
    PrintConfigOption,
    SetOption,
    VersionOption,
    exit_code,
    settings_from_cli,
)
from configs.logs import set_up_logging
from configs.options import ANYTHING
from configs.schema import Settings
from drafters.catalog import chosen
from drafters.trainable import learning_kinds
from reporting.catalog import check_writers
from targets.find import checked_folder
from trainer.places import (
    TORCHRUN_WAITS,
    TORCHRUN_WAITS_S,
    Job,
    local_command,
    plan_for,
    shown_locally,
)
from trainer.policy_command import fit_policy
from trainer.process import TrainerDiedError, run_alone, run_among
from trainer.processes import supervise
from trainer.watch import NoSuchRunError, RunStatus, log_lines, status_of, stop

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help=__doc__,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def main(version: VersionOption = False) -> None:
    """What is common to all commands."""


LifelineOption = Annotated[
    int | None, typer.Option("--lifeline", help="File descriptor that ends with the parent.")
]


class Place(StrEnum):
    """Where a trainer runs."""

    LOCAL = "local"
    TORCHRUN = "torchrun"
    DEEPSPEED = "deepspeed"
    SLURM = "slurm"
    KUBERNETES = "kubernetes"


@app.command(context_settings=ANYTHING)
def launch(
    context: typer.Context,
    config: ConfigOption = None,
    set_: SetOption = None,
    print_config: PrintConfigOption = False,
    on: Annotated[
        Place,
        typer.Option(help="In this process, or as the settings of the section launch say."),
    ] = Place.LOCAL,
    processes: Annotated[
        int,
        typer.Option(min=1, help="With --on local: processes that share each update."),
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be started, and start nothing.")
    ] = False,
) -> None:
    """Learn from the traces of ``run_dir`` until told to stop."""
    settings = _settings(config, set_, print_config, context.args)
    job = Job(settings, tuple(map(str, config or ())), tuple(set_ or ()))
    if on is not Place.LOCAL:
        if processes > 1:
            typer.echo("--processes is for --on local; set launch.processes_per_node", err=True)
            raise typer.Exit(code=2)
        _start(on, job, dry_run)
    elif dry_run:
        _check_names(settings)
        typer.echo(shown_locally(job, processes, Path.cwd()), nl=False)
    elif processes > 1:
        command = local_command(job, Path.cwd())
        raise typer.Exit(code=supervise(command, processes, os.environ))
    else:
        with _exit_codes():
            run_alone(settings)


def _check_names(settings: Settings) -> None:
    """What a trainer checks once it has imported torch: a job elsewhere would wait for its turn
    only to be refused.

    Raises:
        typer.Exit: with code 2 if a name is unknown.
    """
    from drafters.objectives import objective_of
    from policies.draws.catalog import entry
    from targets.device import check_device

    try:
        objective_of(settings.trainer)
        entry(settings.trainer.draw)
        check_device(settings.trainer.device, "trainer.device")
    except SettingsError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=2) from error


def _start(place: Place, job: Job, dry_run: bool) -> None:
    """
    Raises:
        typer.Exit: with the code of what was started; 2 if a setting is missing.
    """
    try:
        plan = plan_for(place.value, job, Path.cwd())
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=2) from error
    _check_names(job.settings)
    if dry_run:
        typer.echo(plan.shown(), nl=False)
        return
    if shutil.which(plan.command[0]) is None:
        typer.echo(f"{plan.command[0]} is not installed on this host", err=True)
        raise typer.Exit(code=1)
    if plan.text is None:
        os.environ.setdefault(TORCHRUN_WAITS, str(TORCHRUN_WAITS_S))
        os.execvp(plan.command[0], plan.command)  # it gets the signals
    raise typer.Exit(code=subprocess.run(plan.command, input=plan.text.encode()).returncode)


RunArgument = Annotated[Path, typer.Argument(help="Run folder, as in run_dir.")]


@app.command()
def status(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every second.")] = False,
) -> None:
    """Show what a run's trainer does, or why it does not run.

    Exit code 0: it runs. 1: it does not. 2: there is no such run.
    """
    if watch and as_json:
        typer.echo("--watch is for people: give it or --json", err=True)
        raise typer.Exit(code=2)
    with _words():
        found = status_of(run)
        if watch:
            found = _show_live(run, found)
        elif as_json:
            typer.echo(json.dumps(found.to_json()))
        else:
            typer.echo("\n".join(found.to_lines()))
    raise typer.Exit(code=0 if found.owner is not None else 1)


def _show_live(run: Path, found: RunStatus) -> RunStatus:
    """Returns what was shown last."""
    from rich.live import Live
    from rich.text import Text

    with contextlib.suppress(KeyboardInterrupt), Live(refresh_per_second=4) as live:
        while True:
            live.update(Text("\n".join(found.to_lines())), refresh=True)
            if found.owner is None:
                break
            time.sleep(1)
            found = status_of(run)
    return found


@app.command()
def logs(
    run: RunArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Wait for more while a trainer runs.")
    ] = False,
) -> None:
    """Print a run's events: candidates, versions, checkpoints, and a line for every ten seconds of
    learning."""
    with _words(), contextlib.suppress(KeyboardInterrupt):
        for line in log_lines(run, follow):
            typer.echo(line)


@app.command("stop")
def stop_command(
    run: RunArgument,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for its end.")] = 120.0,
) -> None:
    """Stop a run's trainer after its update, with a checkpoint, and wait for that.

    Exit code 0: it stopped. 1: none runs on this host, or it did not stop in time. 2: there is no
    such run.
    """
    with _words():
        typer.echo(stop(run, timeout))


@contextlib.contextmanager
def _words() -> Iterator[None]:
    """
    Raises:
        typer.Exit: 2 for a run that is not there, 1 for all else that went wrong.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(_text_of(error), err=True)
        raise typer.Exit(code=2 if isinstance(error, NoSuchRunError) else 1) from error


def _text_of(error: Exception) -> str:
    """What to say of an error that ends a command."""
    if isinstance(error, PermissionError) and error.filename is not None:
        return (
            f"{error.filename}: permission denied. Server, trainer and these commands must be run "
            f"by the user who owns the run's files"
        )
    return str(error)


@app.command(hidden=True)
def rank(
    config: ConfigOption = None, set_: SetOption = None, lifeline: LifelineOption = None
) -> None:
    """Be one process of a trainer: what the other ways to launch start."""
    settings = _settings(config, set_, False, ())
    with _exit_codes():
        run_among(settings, lifeline)


def _settings(
    config: list[Path] | None, set_: list[str] | None, print_config: bool, unknown: Sequence[str]
) -> Settings:
    """Settings with which there is something to train; logging follows them.

    Raises:
        typer.Exit: see ``settings_from_cli``; or with code 2 if there is nothing to train.
    """
    settings = settings_from_cli(
        config, set_, print_config, unknown=unknown, check=lambda found: chosen(found.drafter)
    )
    if settings.drafter.kind not in learning_kinds():
        typer.echo(
            f"drafter.kind is {settings.drafter.kind!r}: there is nothing to train. Set it to one "
            f"that learns ({', '.join(learning_kinds())}), or run the server alone",
            err=True,
        )
        raise typer.Exit(code=2)
    try:
        check_writers(settings)
    except SettingsError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=2) from error
    set_up_logging(settings.log_level)
    if settings.capture.memory_only:
        forbid_core_dumps()
    return settings


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """
    Raises:
        typer.Exit: in place of what a trainer ends with.
    """
    try:
        yield
    except TrainerDiedError as error:
        raise typer.Exit(code=1) from error
    except (ValueError, OSError) as error:
        typer.echo(_text_of(error), err=True)
        raise typer.Exit(code=exit_code(error)) from error


app.command("policy")(fit_policy)


@app.command()
def vocabulary(
    size: Annotated[int, typer.Option(help="number of tokens")],
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Write the tokens that the traces of ``run_dir`` use most, for ``drafter.draft_vocab``."""
    settings = settings_from_cli(config, set_, False)
    if settings.capture.memory_only:
        typer.echo(
            "capture.memory_only is true, and a vocabulary says which tokens the traffic used: not "
            "writing it",
            err=True,
        )
        raise typer.Exit(code=2)
    audit(settings.run_dir, "vocabulary", settings.buffer.url)
    from buffer.backends import open_backend
    from buffer.fingerprint import target_fingerprint
    from buffer.traces import TraceReader, traces_in
    from targets.config import load_config
    from trainer.vocabulary import count_generated, coverage, most_used

    try:
        folder = checked_folder(settings.target, settings.target_cache)
        num_tokens = load_config(folder).get_text_config().vocab_size
        reader = TraceReader(open_backend(settings.buffer.url, settings.run_dir))
        counts = count_generated(traces_in(reader), num_tokens, target_fingerprint(folder))
        ids = most_used(counts, size)
        out.write_text(json.dumps(ids))
    except (ValueError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=exit_code(error)) from error
    typer.echo(f"{out}: {size} of {num_tokens} tokens, {coverage(counts, ids):.2%} of the traffic")
