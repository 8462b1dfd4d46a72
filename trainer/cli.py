"""Train the drafter of a run on the traces its server writes, and publish what is better.

Exit code 0: told to stop, or all steps done. 1: it could not start, or could not go on. 2: wrong
usage or settings, or nothing to train.
"""

from __future__ import annotations

import signal
import threading

import typer

from configs.cli import ConfigOption, PrintConfigOption, SetOption, settings_from_cli
from drafters.trainable import learning_kinds
from trainer.lock import only_trainer

app = typer.Typer(no_args_is_help=True, help=__doc__, add_completion=False)


@app.callback()
def main() -> None:
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
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        with only_trainer(settings.run_dir / "trainer"):
            # torch and transformers take seconds to import; whoever is refused does without.
            from trainer.build import build_trainer
            from trainer.loop import run

            run(build_trainer(settings, stop))
    except (ValueError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=1) from error
