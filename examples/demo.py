"""The whole loop on this machine: serve, learn, swap, report.

    python -m examples.demo            # or: make demo

Starts a server and a trainer on the bundled target, sends Python, C headers, documentation and
Python again through the HTTP API, then replays held-out prompts of each phase three ways: without
drafting, with the drafter as it was before the first shift, and with the newest one.

Exit code 0: it ran to its end, nothing failed and no output changed, whatever the speeds. 1: it did
not, or something did. 2: wrong usage. 130: interrupted.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from examples import corpus
from examples.live import Now, View
from examples.machine import machine
from examples.picture import write
from examples.processes import Child, ChildDiedError, check_alive, start, stop
from examples.report import (
    Answer,
    Arm,
    PhaseSpan,
    Recording,
    Replay,
    checks,
    phase_rows,
    shown,
    verdict,
)
from examples.traffic import Replayer, Reply, Server, Traffic, replay_rounds

MARKER = ".slipstream-demo"
OWN = ("traces", "weights", "trainer", "logs")
OWN_FILES = ("server.json", "recording.json", "report.json", "report.html", "report.svg")


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of traffic."""

    name: str
    domain: corpus.Domain
    shifted: bool
    """The first drafter was not trained on such text."""
    seconds: float
    """The phase ends then at the latest."""
    enough_requests: int
    """It may end earlier, after so many and when the trainer has caught up."""


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Everything one may want to turn. The whole fits ten minutes on two cores."""

    config: Path = Path("configs/demo.yaml")
    run_dir: Path = Path("runs/demo")
    overrides: tuple[str, ...] = ()
    """``--set`` of server and trainer."""
    phases: tuple[Phase, ...] = (
        Phase("python", "python", False, seconds=45, enough_requests=60),
        Phase("c", "c", True, seconds=90, enough_requests=250),
        Phase("docs", "docs", True, seconds=90, enough_requests=250),
        Phase("python-again", "python", False, seconds=60, enough_requests=120),
    )
    num_clients: int = 4
    """Requests under way at a time."""
    max_tokens: int = 96
    max_requests: int = 400
    """Prompts prepared for a phase."""
    settle_s: float = 20.0
    """Without a new version for so long, the trainer has caught up; on shifted traffic a first one
    must have come."""
    replay_prompts: int = 24
    """Held-out prompts of a domain, each answered by each arm ..."""
    replay_block: int = 4
    """... so many at a time ..."""
    replay_s: float = 45.0
    """... until this time is over, for each phase. One round is always finished."""
    replay_warmup: int = 2
    """Unmeasured prompts after each swap."""
    seed: int = 0
    start_s: float = 120.0
    """Longest wait for the server."""

    @property
    def server_overrides(self) -> tuple[str, ...]:
        """What the demo needs beyond the settings file.

        No prefix cache: the replay asks every prompt three times, and only the first would pay for
        its prompt. Live prompts are all different, so to them it changes nothing.
        """
        return ("server.port=0", "engine.prefix_cache=false")

    @property
    def shared_overrides(self) -> tuple[str, ...]:
        """The static version is replayed at the end: it must not be pruned."""
        return (f"run_dir={self.run_dir}", "trainer.keep_versions=1000", *self.overrides)


class DemoError(Exception):
    """The demo cannot go on; the text says why and what to do."""


# Text


@dataclass(frozen=True, slots=True)
class Texts:
    """Prompts of the whole demo, none of them twice but those of a first and a last phase that
    share their domain: these are replayed on the same held-out prompts, so that they compare."""

    live: dict[str, list[str]]
    """Phase -> prompts."""
    held_out: dict[corpus.Domain, list[str]]
    """Domain -> prompts for the replay."""
    warmup: dict[corpus.Domain, list[str]]
    """Domain -> prompts for the replay that are not measured."""


def gather_texts(settings: DemoSettings) -> Texts:
    """Read all prompts before the traffic: it costs seconds of a core."""
    texts = Texts({}, {}, {})
    for domain in dict.fromkeys(phase.domain for phase in settings.phases):
        phases = [phase.name for phase in settings.phases if phase.domain == domain]
        num_replay, num_warmup = settings.replay_prompts, settings.replay_warmup
        num_live = settings.max_requests * len(phases)
        found = corpus.prompts(domain, num_replay + num_warmup + num_live, settings.seed)
        texts.held_out[domain] = found[:num_replay]
        texts.warmup[domain] = found[num_replay : num_replay + num_warmup]
        rest = found[num_replay + num_warmup :]
        texts.live.update({name: rest[i :: len(phases)] for i, name in enumerate(phases)})
    return texts


# Folder


@contextlib.contextmanager
def own_folder(run_dir: Path) -> Iterator[None]:
    """An empty run folder that is ours alone while the demo runs. Deletes only what an earlier demo
    left in a folder that bears its marker.

    Raises:
        DemoError: the folder is somebody else's, or another demo runs in it.
    """
    marker = run_dir / MARKER
    if run_dir.exists() and any(run_dir.iterdir()) and not marker.exists():
        raise DemoError(
            f"{run_dir} was not made by the demo (it holds no {MARKER}), so nothing in it was "
            f"touched. Move it away, or choose another folder with --run-dir."
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    with marker.open("a") as file:
        _lock(file, run_dir)
        for name in OWN:
            shutil.rmtree(run_dir / name, ignore_errors=True)
        for name in OWN_FILES:
            (run_dir / name).unlink(missing_ok=True)
        yield


def _lock(file: IO[str], run_dir: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DemoError(
            f"another demo runs in {run_dir}. Wait for it, or choose another folder with --run-dir."
        ) from None


# Traffic


@dataclass(slots=True)
class Scene:
    """The running state of the demo: what it started, what it has seen."""

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
    """Of the drafter, when last asked."""
    live_swaps: dict[str, int] | None = None
    """Counts at the end of the traffic; those of the replay are ours, not the system's."""

    def now_s(self) -> float:
        return time.monotonic() - self.began_s

    def look(self) -> None:
        """Ask for the drafter's status; stop the demo if a process died."""
        check_alive(self.children)
        self.status = self.server.drafter()

    @property
    def swaps(self) -> dict[str, int]:
        """Of the traffic: ``swapped``, ``rolled_back``, ..."""
        counts: dict[str, int] = self.live_swaps or self.status["swaps"]
        return counts

    @property
    def newest_version(self) -> int:
        return max(self.status["versions"], default=0)

    def note(self, phase: str, reply: Reply) -> None:
        self.answers.append(
            Answer(
                phase=phase,
                finished_s=self.now_s(),
                num_tokens=len(reply.token_ids),
                acceptance=reply.acceptance,
                version=reply.version,
                newest_version=max(self.newest_version, reply.version),
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
    """Send one phase's traffic until its time is over or there is nothing left to see."""
    settings = scene.settings
    started_s = scene.now_s()
    newest, num_before = scene.newest_version, len(scene.answers)
    changed_s = None if phase.shifted else started_s
    traffic = Traffic(
        scene.server,
        scene.texts.live[phase.name],
        settings.num_clients,
        settings.max_tokens,
        lambda reply: scene.note(phase.name, reply),
    )
    traffic.start()
    try:
        while not traffic.is_over():
            time.sleep(0.25)
            scene.look()
            now_s = scene.now_s()
            if scene.newest_version != newest:
                newest, changed_s = scene.newest_version, now_s
            share = (now_s - started_s) / phase.seconds
            scene.show(phase.name, started_s, share, len(traffic.failures))
            has_caught_up = changed_s is not None and now_s - changed_s >= settings.settle_s
            num_answers = len(scene.answers) - num_before
            if is_enough(phase, now_s - started_s, num_answers, has_caught_up):
                break
    finally:
        traffic.stop()
    scene.failures += traffic.failures
    scene.spans.append(PhaseSpan(phase.name, started_s, scene.now_s()))
    scene.look()


def is_enough(phase: Phase, elapsed_s: float, num_answers: int, has_caught_up: bool) -> bool:
    """Its time is over, or it has its requests and the trainer has caught up."""
    return elapsed_s >= phase.seconds or (num_answers >= phase.enough_requests and has_caught_up)


# Replay


def run_replay(scene: Scene, replayer: Replayer) -> list[Replay]:
    """Replay every phase, for its share of time."""
    settings = scene.settings
    replays: list[Replay] = []
    rounds = replay_rounds(settings.replay_prompts, settings.replay_block)
    for place, phase in enumerate(settings.phases):
        held_out, warmup = scene.texts.held_out[phase.domain], scene.texts.warmup[phase.domain]
        started_s = scene.now_s()
        for done, turns in enumerate(rounds):
            for turn in turns:
                replays += replayer.take(phase.name, turn, held_out, warmup)
                scene.look()
                part = (place + (done + 1) / len(rounds)) / len(settings.phases)
                scene.show("replay", started_s, part, len(replayer.failures))
            if scene.now_s() - started_s >= settings.replay_s:
                break
    return replays


# Story


def begin_server(settings: DemoSettings) -> Child:
    """Start the server; it takes some seconds to load and to measure its step times."""
    return start("server", command_of(settings, "serving"), log_of(settings, "server"))


def wait_for_server(settings: DemoSettings, child: Child) -> Server:
    """
    Raises:
        ChildDiedError: it ended.
        DemoError: it does not get ready in time.
    """
    deadline_s = time.monotonic() + settings.start_s
    while time.monotonic() < deadline_s:
        check_alive([child])
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
    return ["-m", room, "launch", "--config", str(settings.config), *overrides]


def log_of(settings: DemoSettings, name: str) -> Path:
    """The log file of a process of the run."""
    return settings.run_dir / "logs" / f"{name}.log"


def run(settings: DemoSettings, view: View, children: list[Child]) -> Recording:
    """The demo, from reading text to the last replayed prompt.

    Args:
        children: filled with the processes that were started, for the caller to stop.

    Raises:
        DemoError, ChildDiedError: it could not be carried out.
    """
    began_s = time.monotonic()
    view.say("Starting the server, and reading prompts from this Python installation ...")
    children.append(begin_server(settings))
    texts = gather_texts(settings)
    server = wait_for_server(settings, children[0])
    view.say(f"Serving on {server.url}; starting the trainer ...")
    children.append(start("trainer", command_of(settings, "trainer"), log_of(settings, "trainer")))
    scene = Scene(settings, view, texts, began_s, server, children)
    scene.look()

    run_phase(scene, settings.phases[0])
    static_version = scene.status["version"]
    for phase in settings.phases[1:]:
        run_phase(scene, phase)
    scene.live_swaps = scene.status["swaps"]

    view.say("Stopping the trainer; replaying held-out prompts three ways ...")
    stop([children.pop()])
    newest_version = server.swap(None)["version"]
    versions: dict[Arm, int] = {"static": static_version, "tuned": newest_version}
    replayer = Replayer(server, versions, settings.max_tokens, settings.replay_warmup)
    replays = run_replay(scene, replayer)
    scene.failures += replayer.failures
    for failure in scene.failures[:3]:
        view.say(f"failed request: {failure}")
    return Recording(
        phases=tuple(scene.spans),
        shifted=tuple(phase.name for phase in settings.phases if phase.shifted),
        answers=tuple(scene.answers),
        replays=tuple(replays),
        static_version=static_version,
        newest_version=newest_version,
        swaps=scene.swaps["swapped"],
        rollbacks=scene.swaps["rolled_back"],
        failed_requests=len(scene.failures),
        warmup_requests=replayer.num_warmed,
        seconds=scene.now_s(),
        machine=machine(),
    )


SHORT_COLUMNS = (
    "phase",
    "plain",
    "static",
    "tuned",
    "× plain",
    "× static",
    "static/step",
    "tuned/step",
)
"""``PHASE_COLUMNS`` for 80 characters."""


def summary(report: dict[str, Any]) -> list[Table]:
    """The figures and the verdicts, for a terminal."""
    phases = Table(*SHORT_COLUMNS, box=None, title="tokens/s, speedups, tokens per step")
    verdicts = Table(box=None)
    for row in phase_rows(report):
        phases.add_row(*row[: len(SHORT_COLUMNS)])
    for name in ("", "measured", "wanted", ""):
        verdicts.add_column(name)
    for check in checks(report):
        colour = "green" if check.passed else "red"
        wanted = f"{check.kind} {check.limit:g}"
        text = f"[{colour}]{verdict(check)}[/]"
        verdicts.add_row(check.name, shown(check.value), wanted, text)
    return [phases, verdicts]


def carry_out(settings: DemoSettings, console: Console) -> int:
    """Run the demo, write its report, end every process; returns the exit code."""
    children: list[Child] = []
    try:
        with own_folder(settings.run_dir):
            try:
                with View(console) as view:
                    recording = run(settings, view, children)
            finally:
                stop(children)
            report = write(settings.run_dir, recording)
    except KeyboardInterrupt:
        console.print("Interrupted: server and trainer are stopped; no report was written.")
        return 130
    except (ChildDiedError, DemoError) as error:
        console.print(str(error), markup=False, highlight=False)
        return 1
    console.print(*summary(report), sep="\n\n")
    console.print(f"\n{settings.run_dir / 'report.json'}\n{settings.run_dir / 'report.html'}")
    return 1 if report["failed_requests"] or report["mismatched_outputs"] else 0


# Command

DEFAULTS = DemoSettings()


def main(
    config: Annotated[
        Path, typer.Option(exists=True, help="settings of server and trainer")
    ] = DEFAULTS.config,
    run_dir: Annotated[
        Path, typer.Option(help="folder of the run; what an earlier demo left there goes")
    ] = DEFAULTS.run_dir,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="setting of both")
    ] = None,
) -> None:
    """Serve, learn, swap and report on this machine, in under ten minutes."""
    signal.signal(signal.SIGTERM, interrupt)
    settings = DemoSettings(config=config, run_dir=run_dir, overrides=tuple(set_ or ()))
    raise typer.Exit(carry_out(settings, Console()))


def interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends the demo as Ctrl-C does."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    typer.run(main)
