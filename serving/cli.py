"""Serve a model with speculative decoding over HTTP.

Exit code 0: drained and stopped. 1: failed to start, or was stopped before it had drained. 2: wrong
usage or settings.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from buffer.backends import open_backend
from buffer.files import forbid_core_dumps
from buffer.signed_weights import check_keys
from configs.ahead import Ahead
from configs.choices import known
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
from configs.phases import seconds_of_life, timed, took, uncollected
from configs.schema import Settings
from drafters.catalog import CATALOG as DRAFTERS
from drafters.catalog import chosen
from policies.catalog import check_policy, policy_class
from reporting.catalog import check_writers
from serving.capture.redaction import load_redact
from serving.disk import warn_without_disk

if TYPE_CHECKING:
    from serving.border.processes import Spawner
    from serving.service import Service
    from targets.files import TargetFiles

log = logging.getLogger(__name__)
app = typer.Typer(cls=Commands, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)


@app.callback()
def main(version: VersionOption = False) -> None:
    """Keeps ``launch`` a subcommand while it is the only one."""


@app.command(context_settings=ANYTHING)
def launch(
    context: typer.Context,
    config: ConfigOption = None,
    set_: SetOption = None,
    print_config: PrintConfigOption = False,
) -> None:
    """Load the target and its drafter, and answer requests until told to stop."""
    settings = settings_from_cli(
        config, set_, print_config, unknown=context.args, check=_check_names
    )
    _check_kinds(settings)
    if settings.capture.memory_only:
        forbid_core_dumps()
    set_up_logging(settings.log_level)
    log.info("starting: target %s, run_dir %s", settings.target, settings.run_dir)
    if (begun_s := seconds_of_life()) is not None:
        took("started Python and read the settings", begun_s)
    with ExitStack() as stack:
        try:
            loaded = _load(settings, stack)
        except (OSError, ValueError) as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(code=exit_code(error)) from error
        code = _serve(settings, loaded)
    raise typer.Exit(code)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """All that a server consists of."""

    bound: socket.socket
    """The listening socket."""
    service: Service
    folder: Path
    """Of the target."""
    spawner: Spawner
    """Of its HTTP processes, which import while the model loads."""


def _load(settings: Settings, stack: ExitStack) -> _Loaded:
    """Take the port, then load everything. What can be refused at once is refused before that.

    Args:
        stack: gets what is to be closed in the end.

    Raises:
        ValueError, OSError: the server cannot start; the message says why.
    """
    # --help and --print-config skip these imports: FastAPI, torch and transformers take seconds.
    from serving.http.connections import raise_limit
    from serving.http.port import bind
    from targets.find import refuse_early

    raise_limit()
    bound = bind(settings)
    refuse_early(settings.target)
    with uncollected():
        importing = Ahead("imported torch and the engine", partial(_import_engine, settings))
        with timed("imported HTTP"):
            from serving.http.loading import answering_503

            if not _may_have_gpu(settings):  # HTTP is in this process, most likely
                import serving.http.app
                import serving.http.uvicorn_server  # noqa: F401
        with answering_503(bound):
            with timed("read the target's files"):
                from targets.files import read_target

                files = read_target(settings.target, settings.target_cache)
            warn_without_disk(settings)
            with timed("waited for torch and the engine"):
                engine = importing.result()
            spawner = engine.spawner(settings, bound)
            stack.callback(spawner.close)
            with timed("woke the device"):
                engine.wait()
            return _Loaded(bound, engine.build(settings, files), files.folder, spawner)


@dataclass(frozen=True, slots=True)
class _Engine:
    """What was imported, with the device that it runs on."""

    is_on_gpu: bool
    waking: list[threading.Thread]
    build: Callable[[Settings, TargetFiles], Service]

    def spawner(self, settings: Settings, bound: socket.socket) -> Spawner:
        from serving.border.processes import Spawner
        from serving.border.server import num_processes

        return Spawner(num_processes(settings, self.is_on_gpu), bound)

    def wait(self) -> None:
        """Until the device is awake."""
        for thread in self.waking:
            thread.join()


def _import_engine(settings: Settings) -> _Engine:
    """Import torch, wake the device, and import the rest meanwhile."""
    from targets.device import pick_device
    from targets.waking import wake

    device = pick_device(settings.device)
    waking = wake(device)
    import serving.border.server  # noqa: F401
    from serving.build import build_service

    def build(settings: Settings, files: TargetFiles) -> Service:
        return build_service(settings, files=files)

    return _Engine(device.type == "cuda", waking, build)


def _may_have_gpu(settings: Settings) -> bool:
    """Whether the device may turn out to be a GPU, as far as one can say without torch."""
    return settings.device != "cpu" and Path("/dev/nvidiactl").exists()


def _serve(settings: Settings, loaded: _Loaded) -> int:
    """Answer requests until told to stop; returns the exit code."""
    from serving.border.server import serve_http
    from serving.periodic import periodic_stats
    from serving.reporting import reported

    service = loaded.service
    service.start()
    try:
        with (
            periodic_stats(service.figures, settings.server.log_stats_s),
            reported(service, settings),
        ):
            code = serve_http(service, settings, loaded.bound, loaded.folder, loaded.spawner)
    finally:
        service.stop()
    log.info("stopped")
    return code


def _check_names(settings: Settings) -> None:
    """
    Raises:
        SettingsError: a name is in no catalog.
    """
    chosen(settings.drafter)
    policy_class(settings.policy)
    known("policy.drafter", settings.policy.drafter, DRAFTERS)


def _check_kinds(settings: Settings) -> None:
    """Refuse names that are in no catalog, and files that cannot be used, before torch is imported.

    Raises:
        typer.Exit: with code 2 after printing what is wrong.
    """
    try:
        open_backend(settings.buffer.url, settings.run_dir)
        check_keys(settings.swap.public_key)
        check_policy(settings.policy)
        if settings.capture.redact is not None:
            load_redact(settings.capture.redact)
        check_writers(settings)
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=2) from error
