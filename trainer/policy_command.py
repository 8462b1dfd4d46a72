"""``trainer policy``: fits the draft policies ``ltd`` and ``specdecpp`` on the traces of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import numpy as np
import typer
from numpy.typing import NDArray

from buffer.command_line import located
from buffer.files import write_atomically
from buffer.records import Trace
from buffer.traces import traces_in
from configs.cli import ConfigOption, SetOption, exit_code, settings_from_cli
from configs.schema import Settings
from policies.budgets import BudgetScores
from policies.logged import LoggedStep, Replayed, drafters_of, of_newest_versions, steps_of
from policies.network import MAX_SHARES, Network
from policies.published import Origin
from policies.replayed_file import write_replayed
from policies.replayed_log import ReplayedLog
from policies.run_log import Times, log_of_run, open_traces, time_doubts
from trainer.fitted_policy import head_path, policy_path

if TYPE_CHECKING:
    from trainer.ltd import FullInformation
    from trainer.ppo import Ppo

Method = Literal["full", "ppo", "specdecpp"]
_LEAST_STEPS = 2000
"""Drafted by the newest version from which on those of former versions are left out."""


def fit_policy(
    method: Annotated[
        Method,
        typer.Option(
            help="of ltd, full: from what every K would have brought; ppo: by trying, in replay; "
            "specdecpp: the head of that policy"
        ),
    ] = "full",
    drafter: Annotated[
        str | None, typer.Option(help="fit K of this drafter; the one with most steps by default")
    ] = None,
    times: Annotated[
        Times, typer.Option(help="step times: of the run's profile, or of its traces")
    ] = "auto",
    most_steps: Annotated[int, typer.Option(min=1, help="newest steps that are used")] = 100_000,
    held_out: Annotated[
        float, typer.Option(min=0.05, max=0.5, help="share of steps that judge the policy")
    ] = 0.25,
    replay: Annotated[
        bool,
        typer.Option(
            help="score longer drafts than those that ran by replaying the drafter along the text; "
            "otherwise, and where that cannot be done, by the hazards of the log"
        ),
    ] = True,
    budgets: Annotated[
        int,
        typer.Option(
            min=0,
            max=MAX_SHARES,
            help="shares of the draft tokens among which a second network chooses how many are "
            "verified, kept if it pays; a GPU has programs for 4; 0: K alone",
        ),
    ] = 0,
    effort: Annotated[
        float,
        typer.Option(min=0.01, max=1.0, help="of ltd: share of the updates; fewer find less"),
    ] = 1.0,
    ungated: Annotated[
        bool, typer.Option("--ungated", help="write it even if its gate refuses it")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="file to write; in run_dir/policy, named after the policy")
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Fit ``policy.kind: ltd``, or ``specdecpp``, on the traces of ``run_dir``, and write it if it
    passes its gate.

    A trainer publishes what is in ``run_dir/policy`` with the next version of the drafter, and
    both are swapped at once. ``policy.ltd.weights`` and ``policy.specdecpp.weights`` load a file
    without a trainer. ``specdecpp`` and ``--budgets`` need traces that keep the drafter's figures:
    of a policy that cuts drafts on the device, best with a high ``policy.random_share``, or of
    ``ltd`` with ``policy.ltd.size=note``.

    What a drafter's drafts bring changes from version to version, so those of the newest are used
    alone where they are enough. The file says which they were, and a server how many versions ago.
    """
    settings = settings_from_cli(config, set_, False)
    if budgets == 1:
        _refuse("--budgets 1 leaves nothing to choose: the one share is everything; use 4, or 0", 2)
    try:
        url, run_dir = located(None, settings)
        reader = open_traces(url, run_dir)
        traces = list(traces_in(reader))
    except (ValueError, OSError) as error:
        _refuse(str(error), 2)
    if (lost := reader.counts.lost()) is not None:
        typer.echo(lost, err=True)
    steps, origin = _of_newest(steps_of(traces)[-most_steps:], drafter)
    if method == "specdecpp":
        path = head_path(run_dir) if out is None else out
        _fit_head(steps, drafter, held_out, settings.seed, ungated, path, origin)
        return
    if replay and origin is not None:
        chances = _replayed(settings.model_copy(update={"run_dir": run_dir}), origin, traces)
        steps, _ = _newest(steps_of(traces, chances)[-most_steps:], origin.drafter)
    # --help and whoever was refused skip this import of torch.
    from trainer.ltd import FullInformation, fit_full_information, judge_network, split
    from trainer.ppo import Ppo, fit_ppo

    try:
        log = log_of_run(steps, drafter, run_dir, times, settings.drafter.max_draft)
        rows = split(log, held_out)
        scores = BudgetScores.of(log, budgets) if budgets else None
    except ValueError as error:
        _refuse(str(error), exit_code(error))
    if (doubts := time_doubts(log)) is not None:
        typer.echo(doubts)
    how: FullInformation | Ppo
    if method == "full":
        how = FullInformation(seed=settings.seed).times(effort)
        network = fit_full_information(log, rows, how)
    else:
        how = Ppo(seed=settings.seed).times(effort)
        network = fit_ppo(log, rows, how)
    typer.echo(f"{rows.sum()} steps to fit on, {(~rows).sum()} held out; {method}")
    if scores is not None:
        network = _with_size(network, log, rows, scores, how, ungated)
    gate = judge_network(network, log, rows, scores)
    typer.echo(gate.to_line())
    if not gate.passed and not ungated:
        _refuse("not written: a fixed K for each load is as good; --ungated writes it anyway", 1)
    path = policy_path(run_dir) if out is None else out
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"method": method, "gain": f"{gate.gain:.4f}", "at_least": f"{gate.low - 1:.4f}"}
    write_atomically(path, network.to_bytes(about | _metadata(origin)))
    typer.echo(f"written: {path}")


def _with_size(
    alone: Network,
    log: ReplayedLog,
    rows: NDArray[np.bool_],
    budgets: BudgetScores,
    how: FullInformation | Ppo,
    ungated: bool,
) -> Network:
    """The network with a size, where that brings more than K alone; else the one without."""
    from trainer.sizes import fit_both, judge_size

    fitted = fit_both(log, rows, budgets, how)
    for line in fitted.to_lines():
        typer.echo(line)
    gate = judge_size(fitted.network, alone, log, rows, budgets)
    typer.echo(f"size: {gate.to_line()}")
    if gate.passed or ungated:
        return fitted.network
    typer.echo("the size is left out: K alone is as good")
    return alone


def _replayed(settings: Settings, origin: Origin, traces: Sequence[Trace]) -> Replayed:
    """Replay the drafter, and say how far that went."""
    from trainer.replayed_drafts import replayed_drafts

    versions = range(origin.oldest, origin.newest + 1)
    try:
        found = replayed_drafts(settings, origin.drafter, traces, versions)
    except (ValueError, OSError) as error:
        typer.echo(f"nothing was replayed: {error}", err=True)
        return {}
    typer.echo(found.to_line())
    if found.chances:
        with contextlib.suppress(OSError):  # whatever is wrong with the folder is said later
            write_replayed(settings.run_dir, found.chances)
    return found.chances


def _fit_head(
    steps: Sequence[LoggedStep],
    drafter: str | None,
    held_out: float,
    seed: int,
    ungated: bool,
    path: Path,
    origin: Origin | None,
) -> None:
    from trainer.confidence_head import HeadFit, fit_head, judge_head, samples_of, split_samples

    try:
        samples = samples_of(steps, drafter)
        fitted_on, judged_by = split_samples(samples, held_out)
    except ValueError as error:
        _refuse(str(error), 1)
    head = fit_head(fitted_on, HeadFit(seed=seed))
    gate = judge_head(head, fitted_on, judged_by)
    typer.echo(f"{len(fitted_on)} positions to fit on, {len(judged_by)} held out; specdecpp")
    typer.echo(gate.to_line())
    if not gate.passed and not ungated:
        _refuse("not written: it does not tell more than a position; --ungated writes it anyway", 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"method": "specdecpp", "auc": f"{gate.auc:.4f}"}
    write_atomically(path, head.to_bytes(about | _metadata(origin)))
    typer.echo(f"written: {path}")


def _of_newest(
    steps: list[LoggedStep], drafter: str | None
) -> tuple[list[LoggedStep], Origin | None]:
    """The steps to fit to, and whose they are; all, and ``None``, where nothing can be fitted."""
    known = drafters_of(steps)
    chosen = drafter if drafter is not None else next(iter(known), None)
    if chosen is None or chosen not in known:
        return steps, None
    kept, (oldest, newest) = _newest(steps, chosen)
    if oldest == newest:
        typer.echo(f"fitted to version {newest} of {chosen}")
    else:
        typer.echo(
            f"fitted to versions {oldest} to {newest} of {chosen} together: the newest alone have "
            f"drafted fewer than {_LEAST_STEPS} steps"
        )
    return kept, Origin(chosen, oldest, newest)


def _newest(steps: Sequence[LoggedStep], drafter: str) -> tuple[list[LoggedStep], tuple[int, int]]:
    return of_newest_versions(steps, drafter, _LEAST_STEPS)


def _metadata(origin: Origin | None) -> dict[str, str]:
    return {} if origin is None else origin.metadata()


def _refuse(message: str, code: int) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code=code)
