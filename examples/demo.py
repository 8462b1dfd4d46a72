"""Serve, learn, swap and report on this machine.

    python -m examples.demo            # or: make demo
    python -m examples.demo --prompts mine.jsonl
    python -m examples.demo --buffer redis         # or: make demo BUFFER=redis
    python -m examples.demo --set wandb.mode=offline
    python -m examples.demo --requests 20000 --order both   # a stream of so many, however long

Starts a server and a trainer, sends traffic that shifts from domain to domain and back through the
HTTP API, then replays held-out prompts of each phase by every arm (``examples/arms.py``). On a GPU,
once ``make real`` has fetched it, the target is a real one that answers chat requests; else it is
the bundled one, which continues Python, C headers and documentation.

Exit code 0: the demo ran to its end, no request failed and no output changed, whatever the speeds.
1: it could not finish, a request failed or an output changed. 2: wrong usage. 130: interrupted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from configs.choices import SettingsError
from configs.load import load_settings
from configs.schema import Settings
from examples.arms import ArmsError, setups
from examples.clients import Replayer, Reply, Server, Traffic, replay_rounds
from examples.live import Now, View, summary
from examples.machine import machine
from examples.picture import write
from examples.plan import (
    ORDERS,
    DemoSettings,
    default_settings,
    with_prompts,
    with_requests,
    with_seed,
)
from examples.processes import Child, ChildDiedError, check_alive, start, stop
from examples.recording import (
    Answer,
    PhaseSpan,
    Recording,
    Replay,
    VersionChange,
    learning_of,
)
from examples.report import build_report
from examples.run_folder import DemoError, own_folder
from examples.services import SERVICES, services
from examples.shared_gpu import MpsError
from examples.texts import Phase, Texts, gather
from examples.traffic.prompts import Prompt, PromptError
from reporting.catalog import asked_for, check_writers, writer_kind

# Traffic


@dataclass(slots=True)
class Scene:
    """Running state of the demo: what it started and what it has observed."""

    settings: DemoSettings
    view: View
    texts: Texts
    began_s: float
    server: Server
    children: list[Child]
    answers: list[Answer] = field(default_factory=list)
    spans: list[PhaseSpan] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    """Status of the drafter, from the last ``look``."""
    live_swaps: dict[str, int] | None = None
    """Counts at the end of the traffic. Later swaps are the replay's own."""

    def now_s(self) -> float:
        return time.monotonic() - self.began_s

    def look(self) -> None:
        """Update the drafter's status.

        Raises:
            ChildDiedError: the server or the trainer ended.
        """
        check_alive(self.children)
        self.status = self.server.drafter()

    @property
    def swaps(self) -> dict[str, int]:
        """Counts of the traffic: ``swapped``, ``rolled_back`` and others."""
        counts: dict[str, int] = self.live_swaps or self.status["swaps"]
        return counts

    @property
    def newest_version(self) -> int:
        return max(self.status["versions"], default=0)

    def note(self, phase: str, prompt: Prompt, reply: Reply) -> None:
        self.answers.append(
            Answer(
                phase=phase,
                finished_s=self.now_s(),
                num_tokens=len(reply.token_ids),
                acceptance=reply.acceptance,
                version=reply.version,
                newest_version=max(self.newest_version, reply.version),
                domain=prompt.domain,
            )
        )

    def show(self, phase: str, began_s: float, share: float, failed: int = 0) -> None:
        swaps = self.swaps
        self.view.show(
            Now(
                phases=tuple(phase.name for phase in self.settings.phases),
                phase=phase,
                phase_s=self.now_s() - began_s,
                share=min(share, 1.0),
                at_s=self.now_s(),
                answers=tuple(self.answers),
                version=self.status["version"],
                newest_version=self.newest_version,
                swaps=swaps["swapped"],
                rollbacks=swaps["rolled_back"],
                failed=len(self.failures) + failed,
            )
        )


def run_phase(scene: Scene, phase: Phase) -> None:
    """Send one phase's traffic until its time is over or the trainer has caught up."""
    settings = scene.settings
    started_s = scene.now_s()
    newest, num_before = scene.newest_version, len(scene.answers)
    changed_s = None if phase.shifted else started_s
    traffic = Traffic(
        scene.server,
        scene.texts.live[phase.name],
        settings.num_clients,
        settings.sampling,
        partial(scene.note, phase.name),
    )
    traffic.start()
    try:
        while not traffic.is_over():
            time.sleep(0.25)
            scene.look()
            now_s = scene.now_s()
            if scene.newest_version != newest:
                newest, changed_s = scene.newest_version, now_s
            num_answers = len(scene.answers) - num_before
            share = max(
                (now_s - started_s) / phase.seconds,
                num_answers / len(scene.texts.live[phase.name]),
            )
            scene.show(phase.name, started_s, share, len(traffic.failures))
            has_caught_up = changed_s is not None and now_s - changed_s >= settings.settle_s
            if is_enough(phase, now_s - started_s, num_answers, has_caught_up):
                break
    finally:
        traffic.stop()
    scene.failures += traffic.failures
    scene.spans.append(
        PhaseSpan(phase.name, phase.domain, started_s, scene.now_s(), phase.mixed_with)
    )
    scene.look()


def is_enough(phase: Phase, elapsed_s: float, num_answers: int, has_caught_up: bool) -> bool:
    """The phase's time is over, or it has enough requests and the trainer has caught up."""
    return elapsed_s >= phase.seconds or (num_answers >= phase.enough_requests and has_caught_up)


# Replay


def replayer_for(scene: Scene, static_version: int, newest_version: int) -> Replayer:
    """A replayer of all arms with these weights."""
    settings = scene.settings
    return Replayer(
        scene.server,
        setups(scene.status["drafters"], static_version, newest_version),
        settings.sampling,
        num_clients=settings.replay_clients,
        num_warmup=settings.kept.warmup,
    )


def run_replay(scene: Scene, replayer: Replayer) -> list[Replay]:
    """Replay the held-out prompts of every domain, each for at most ``replay_s``."""
    settings = scene.settings
    replays: list[Replay] = []
    rounds = replay_rounds(settings.kept.replayed, settings.replay_block)
    domains = settings.domains
    for place, domain in enumerate(domains):
        held_out, warmup = scene.texts.held_out[domain], scene.texts.warmup[domain]
        started_s = scene.now_s()
        for done, turns in enumerate(rounds):
            for turn in turns:
                replays += replayer.take(domain, turn, held_out, warmup)
                scene.look()
                part = (place + (done + 1) / len(rounds)) / len(domains)
                scene.show("replay", started_s, part, len(replayer.failures))
            if scene.now_s() - started_s >= settings.replay_s:
                break
    return replays


# The whole run


def gather_texts(settings: DemoSettings) -> Texts:
    """All prompts of the demo.

    Raises:
        DemoError: there are too few.
    """
    try:
        return gather(
            settings.source, settings.phases, settings.max_requests, settings.kept, settings.seed
        )
    except ValueError as error:
        raise DemoError(f"{error}. Give more prompts with --prompts FILE.jsonl.") from None


def begin_server(settings: DemoSettings) -> Child:
    """Start the server; it takes some seconds to load and to measure its step times."""
    return start("server", command_of(settings, "serving"), log_of(settings, "server"))


def begin_trainer(settings: DemoSettings) -> Child:
    """Start the trainer; it takes about as long."""
    return start("trainer", command_of(settings, "trainer"), log_of(settings, "trainer"))


def wait_for_server(settings: DemoSettings, children: list[Child]) -> Server:
    """
    Raises:
        ChildDiedError: the server or the trainer ended.
        DemoError: the server was not ready in time.
    """
    deadline_s = time.monotonic() + settings.start_s
    while time.monotonic() < deadline_s:
        check_alive(children)
        with contextlib.suppress(FileNotFoundError):
            server = Server(settings.run_dir / "server.json")
            if server.is_ready():
                return server
        time.sleep(0.1)
    raise DemoError(
        f"the server is not ready after {settings.start_s:.0f} s; see {log_of(settings, 'server')}"
    )


def command_of(settings: DemoSettings, room: str) -> list[str]:
    """Arguments of ``python`` that launch the server (``serving``) or the ``trainer``."""
    own = settings.server_overrides if room == "serving" else ()
    overrides = [part for item in (*own, *settings.shared_overrides) for part in ("--set", item)]
    configs = [part for config in settings.configs for part in ("--config", str(config))]
    return ["-m", room, "launch", *configs, *overrides]


def log_of(settings: DemoSettings, name: str) -> Path:
    """The log file of a process of the run."""
    return settings.run_dir / "logs" / f"{name}.log"


def run(settings: DemoSettings, view: View, children: list[Child]) -> Recording:
    """Run the demo, from reading text to the last replayed prompt.

    Args:
        children: filled with the started processes, for the caller to stop.

    Raises:
        ArmsError, DemoError, ChildDiedError: the demo could not be carried out.
    """
    began_s, began_unix_s, load_before = time.monotonic(), time.time(), os.getloadavg()[0]
    view.say("Starting server and trainer, and reading prompts from this Python installation ...")
    # Both at once: a trainer takes as long to start as a server, and traffic that comes meanwhile
    # would teach nothing. Version 0 is published by whichever needs it first.
    children += [begin_server(settings), begin_trainer(settings)]
    texts = gather_texts(settings)
    server = wait_for_server(settings, children)
    view.say(f"Serving on {server.url}.")
    scene = Scene(settings, view, texts, began_s, server, children)
    scene.look()
    setups(scene.status["drafters"], 0, 0)  # a missing drafter is an error before the traffic

    run_phase(scene, settings.phases[0])
    static_version = scene.status["version"]
    for phase in settings.phases[1:]:
        run_phase(scene, phase)
    scene.live_swaps = scene.status["swaps"]
    changes = version_changes(scene.status["history"], began_unix_s)

    view.say("Stopping the trainer; replaying held-out prompts by all arms ...")
    stop([children.pop()])
    server.swap(None)
    newest_version = server.drafter()["version"]
    replayer = replayer_for(scene, static_version, newest_version)
    replays = run_replay(scene, replayer)
    scene.failures += replayer.failures
    for failure in scene.failures[:3]:
        view.say(f"failed request: {failure}")
    journal = settings.run_dir / "trainer" / "log.jsonl"
    return Recording(
        phases=tuple(scene.spans),
        shifted=tuple(phase.name for phase in settings.phases if phase.shifted),
        answers=tuple(scene.answers),
        changes=tuple(changes),
        replays=tuple(replays),
        static_version=static_version,
        newest_version=newest_version,
        swaps=scene.swaps["swapped"],
        rollbacks=scene.swaps["rolled_back"],
        failed_requests=len(scene.failures),
        warmup_requests=replayer.num_warmed,
        seconds=scene.now_s(),
        learning=learning_of(journal, "GPU" if settings.on_gpu else "CPU"),
        target=server.model,
        temperature=settings.sampling.temperature,
        num_clients=settings.num_clients,
        replay_clients=settings.replay_clients,
        goals=settings.goals,
        load_before=load_before,
        machine=machine(),
    )


def version_changes(history: list[dict[str, Any]], began_unix_s: float) -> list[VersionChange]:
    """Swaps and rollbacks in the history that ``GET /admin/drafter`` returns. A trial of the former
    version is neither.

    Args:
        began_unix_s: start of the demo.
    """
    return [
        VersionChange(
            at_s=entry["unix_s"] - began_unix_s,
            version=entry["version"],
            rolled_back=entry["event"].startswith("rolled back"),
        )
        for entry in history
        if entry["event"].startswith(("swapped", "rolled back"))
    ]


def carry_out(
    settings: DemoSettings, console: Console, buffer: str = "log", *, mps: bool = False
) -> int:
    """Run the demo, write its report and stop its processes; returns the exit code.

    Args:
        buffer: where traces and weights are: ``log`` or a service of ``examples.services``.
        mps: server and trainer share the GPU by CUDA MPS.
    """
    children: list[Child] = []
    try:
        with own_folder(settings.run_dir), services(buffer, settings.run_dir, mps=mps) as url:
            settings = replace(settings, overrides=(f"buffer.url={url}", *settings.overrides))
            try:
                with View(console) as view:
                    recording = run(settings, view, children)
            finally:
                stop(children)
            report, problem = build_report(recording), why_not_written(settings.run_dir, recording)
    except KeyboardInterrupt:
        console.print("Interrupted: server and trainer are stopped; no report was written.")
        return 130
    except (ArmsError, ChildDiedError, DemoError, MpsError) as error:
        console.print(str(error), markup=False, highlight=False)
        return 1
    console.print(*summary(report), sep="\n\n")
    if problem is not None:
        console.print(f"\n{problem}", markup=False, highlight=False, soft_wrap=True)
        return 1
    console.print(f"\n{settings.run_dir / 'report.json'}\n{settings.run_dir / 'report.html'}")
    for line in how_to_look(settings):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 1 if report["failed_requests"] or report["mismatched_outputs"] else 0


def why_not_written(run_dir: Path, recording: Recording) -> str | None:
    """Write the report, whose figures must not be lost to a full disk; returns what went wrong."""
    try:
        write(run_dir, recording)
    except OSError as error:
        return f"The report could not be written to {run_dir}: {error}"
    return None


def settings_of(settings: DemoSettings) -> Settings:
    """Settings of the demo's trainer.

    Raises:
        SettingsError: they are no settings, or ask for a writer that is not installed.
    """
    found = load_settings(settings.configs, list(settings.shared_overrides), {})
    check_writers(found)
    return found


def how_to_look(settings: DemoSettings) -> list[str]:
    """What shows the reports that the settings asked for, for each writer."""
    found = settings_of(settings)
    wheres = (writer_kind(name).where(found) for name in asked_for(found))
    return [f"\n{where}" for where in wheres if where is not None]


# Command


def main(
    config: Annotated[
        list[Path] | None,
        typer.Option(help="settings of server and trainer, instead of the demo's own; repeatable"),
    ] = None,
    run_dir: Annotated[
        Path, typer.Option(help="folder of the run; removes what an earlier demo left there")
    ] = Path("runs/demo"),
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL file of prompts to send instead of the demo's own")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="end phases after so many in all, not by the clock")
    ] = None,
    order: Annotated[
        str, typer.Option(help=f"of the domains, with --requests: {', '.join(ORDERS)}")
    ] = "ordered",
    temperature: Annotated[
        float | None, typer.Option(min=0.0, max=2.0, help="0 is greedy; default: the demo's own")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of prompts, answers and weights")] = 0,
    buffer: Annotated[
        str, typer.Option(help=f"where traces and weights are: {', '.join(('log', *SERVICES))}")
    ] = "log",
    mps: Annotated[bool, typer.Option("--mps", help="share the GPU by CUDA MPS")] = False,
    own_gpu: Annotated[bool, typer.Option("--own-gpu", help="trainer on a second GPU")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="setting of server and trainer"),
    ] = None,
) -> None:
    """Serve, learn, swap and report on this machine, in under ten minutes."""
    if any(item.partition("=")[0].strip() == "run_dir" for item in set_ or ()):
        raise typer.BadParameter("name the folder of the run with --run-dir", param_hint="--set")
    signal.signal(signal.SIGTERM, interrupt)
    settings = with_seed(default_settings(own_gpu=own_gpu), seed)
    overrides = (*settings.overrides, *(set_ or ()))
    settings = replace(settings, run_dir=run_dir, overrides=overrides)
    if config:
        settings = replace(settings, configs=tuple(config))
    if temperature is not None:
        sampling = replace(settings.sampling, temperature=temperature)
        settings = replace(settings, sampling=sampling)
    try:
        settings = settings if prompts is None else with_prompts(settings, prompts)
    except PromptError as error:
        raise typer.BadParameter(str(error), param_hint="--prompts") from None
    if order not in ORDERS or (order != "ordered" and requests is None):
        known = f"{order!r} is none of {', '.join(ORDERS)}, or lacks --requests"
        raise typer.BadParameter(known, param_hint="--order")
    if requests is not None:
        settings = with_requests(settings, requests, order)
    if buffer != "log" and buffer not in SERVICES:
        known = ", ".join(("log", *SERVICES))
        raise typer.BadParameter(f"{buffer!r} is none of {known}", param_hint="--buffer")
    try:
        settings_of(settings)
    except SettingsError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=2) from None
    raise typer.Exit(carry_out(settings, Console(), buffer, mps=mps))


def interrupt(number: int, frame: FrameType | None) -> None:
    """Make SIGTERM end the demo like Ctrl-C."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    typer.run(main)
