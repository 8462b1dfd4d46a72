"""Judge draft policies by the traces of a run.

Exit code 0: done. 1: the traces do not say enough. 2: wrong usage or settings, a damaged profile,
or a buffer or folder that cannot be used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from buffer.command_line import RunArgument, located
from configs.cli import ConfigOption, SetOption, VersionOption, exit_code, settings_from_cli
from policies.catalog import policy_class
from policies.evaluation import Evaluation, Judged, evaluate
from policies.picture import picture
from policies.predictions import predictions_of
from policies.run_log import (
    Times,
    log_of_run,
    num_mixed,
    read_steps,
    replays,
    time_doubts,
)

app = typer.Typer(
    no_args_is_help=True, help=__doc__, add_completion=False, pretty_exceptions_enable=False
)


@app.callback()
def main(version: VersionOption = False) -> None:
    """Judge draft policies by the traces of a run."""  # keeps `evaluate` a subcommand


@app.command("evaluate")
def evaluate_run(
    run: RunArgument = None,
    drafter: Annotated[
        str | None, typer.Option(help="judge K of this drafter; the one with most steps by default")
    ] = None,
    times: Annotated[
        Times,
        typer.Option(
            help="step times: of the profile in the run folder, or medians of the traces; auto: "
            "the profile if it has the drafter"
        ),
    ] = "auto",
    seeds: Annotated[int, typer.Option(min=1, help="runs of policies that draw")] = 3,
    most_steps: Annotated[int, typer.Option(min=1, help="newest steps that are judged")] = 20_000,
    out: Annotated[
        Path | None, typer.Option(help="folder for evaluation.json and .svg; RUN/policies")
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Regret of every policy on the traces of a run, as a table, JSON and a picture.

    Every K up to the one that ran is scored exactly; longer ones by what `trainer policy` has
    replayed, or by the hazards of the run, which the table shows as a share. The settings are those
    of each policy that is judged.
    """
    settings = settings_from_cli(config, set_, False)
    try:
        policy_class(settings.policy)  # what is not judged must be spelled right, too
        url, run_dir = located(run, settings)
        folder = run_dir / "policies" if out is None else out
        check_can_hold_files(folder)
        steps, counts = read_steps(url, run_dir, most_steps)
    except (ValueError, OSError) as error:
        _refuse(str(error), 2)
    try:
        log = log_of_run(steps, drafter, run_dir, times, settings.drafter.max_draft)
        found = evaluate(log, settings.policy, seeds=range(seeds))
    except ValueError as error:
        _refuse("\n".join(filter(None, (str(error), counts.lost()))), exit_code(error))
    if (doubts := time_doubts(log)) is not None:
        typer.echo(f"{doubts}\n")  # first: whoever has read the table has believed it
    for line in table(found):
        typer.echo(line)
    if (told := replays(log)) is not None:
        typer.echo(f"\n{told}")
    if mixed := num_mixed(steps):
        typer.echo(f"\nleft out: {mixed} steps in which several drafters drafted")
    if (lost := counts.lost()) is not None:
        typer.echo(f"\n{lost}")
    for one in predictions_of(steps):
        typer.echo(one.to_line())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(json.dumps(asdict(found), indent=1) + "\n")
        (folder / "evaluation.svg").write_text(picture(found))
    except OSError as error:
        _refuse(f"{folder} cannot be written: {error}", 2)
    typer.echo(f"\nwritten: {folder / 'evaluation.json'}, {folder / 'evaluation.svg'}")


def check_can_hold_files(folder: Path) -> None:
    """Before the work, and without making anything.

    Raises:
        ValueError: files cannot be written there.
    """
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not there.is_dir():
        raise ValueError(f"{folder} cannot be a folder: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{folder} cannot be written: no permission in {there}")


def _refuse(message: str, code: int) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code=code)


def table(found: Evaluation) -> Iterator[str]:
    """Lines for a terminal."""
    yield (
        f"{found.num_steps} steps, {found.num_rounds} rounds of {found.drafter}; measured "
        f"{found.measured_rate:.1f} tokens/s, by the step table {found.table_rate:.1f}"
    )
    yield "acceptance by position (rounds that reached it): " + ", ".join(
        f"{hazard:.3f} ({reached})"
        for hazard, reached in zip(found.hazards, found.reached, strict=True)
    )
    yield ""
    yield f"{'batch from':>10} {'steps':>7} {'best K':>6} {'over plain':>10} {'oracle':>7}"
    for load in found.loads:
        yield (
            f"{load.smallest_batch:>10} {load.num_steps:>7} {load.best_k:>6} "
            f"{load.best_rate / load.plain_rate:>10.3f} {load.oracle_rate / load.plain_rate:>7.3f}"
        )
    yield ""
    yield " ".join(f"{title:>{width}}" for title, width, _ in _COLUMNS)
    for one in found.policies:
        yield " ".join(f"{show(one):>{width}}" for _, width, show in _COLUMNS)
    yield ""
    yield (
        "regret: against the best fixed K of each load in hindsight, and the oracle of each "
        "round. headroom: share of the gap between both that is closed. verified: share of the "
        "draft tokens that the device leaves to be verified. by hazards: share of the "
        "tokens that is extrapolated, because K was longer than the one that ran. off-policy: "
        "doubly robust, from the steps in which the log did the same, with 95 % interval."
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _off_policy(one: Judged) -> str:
    found = one.off_policy
    return "-" if found is None else f"{found.value:.1f} ({found.low:.1f} to {found.high:.1f})"


_COLUMNS: tuple[tuple[str, int, Callable[[Judged], str]], ...] = (
    ("policy", 20, lambda one: one.name),
    ("tokens/s", 9, lambda one: f"{one.rate:.1f}"),
    ("over plain", 10, lambda one: f"{one.over_plain:.3f}"),
    ("regret", 8, lambda one: _percent(one.regret_fixed)),
    ("to oracle", 9, lambda one: _percent(one.regret_oracle)),
    ("headroom", 9, lambda one: _percent(one.headroom)),
    ("mean K", 6, lambda one: f"{one.mean_k:.2f}"),
    ("verified", 8, lambda one: _percent(one.verified)),
    ("by hazards", 10, lambda one: _percent(one.extrapolated)),
    ("plan p99 us", 11, lambda one: "-" if one.plan_us is None else f"{one.plan_us:.0f}"),
    ("off-policy tokens/s", 26, _off_policy),
)
"""Title, width and text of each column."""
