"""What a demo does: on which target, with which traffic, for how long."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from configs.load import load_settings
from examples.clients import Sampling
from examples.machine import hardware
from examples.recording import Goals
from examples.texts import Kept, Phase, Source, chats, completions, of_file, phases_of
from examples.traffic.chat import DOMAINS

SAMPLING = Sampling(temperature=0.5, max_tokens=96)
"""Below 0.4 the bundled target repeats itself, which an index drafts without learning; from 0.7 on
it is too random to draft for. Tokens per step at K = 4 on C at 0.2, 0.4, 0.55 and 0.7: 2.07, 1.98,
1.98, 1.76 by its first drafter, 2.89, 2.49, 2.34, 2.04 by an index of the request. It seldom ends a
text by itself."""
KEPT = Kept(replayed=24, warmup=1)
GOALS = Goals()


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Settings of the demo. With the defaults, for the bundled target, it takes less than ten
    minutes on two cores."""

    configs: tuple[Path, ...] = (Path("configs/demo.yaml"), Path("configs/compare.yaml"))
    run_dir: Path = Path("runs/demo")
    overrides: tuple[str, ...] = ()
    """``--set`` options of server and trainer."""
    source: Source = completions
    """Where prompts come from."""
    phases: tuple[Phase, ...] = (
        Phase("python", "python", False, seconds=40, enough_requests=60),
        Phase("c", "c", True, seconds=75, enough_requests=250),
        Phase("docs", "docs", True, seconds=75, enough_requests=250),
        Phase("python-again", "python", False, seconds=45, enough_requests=120),
    )
    num_clients: int = 4
    """Concurrent requests."""
    sampling: Sampling = SAMPLING
    max_requests: int = 400
    """Prompts prepared for each phase."""
    settle_s: float = 20.0
    """The trainer has caught up after this time without a new version; on shifted traffic at least
    one version must have come."""
    kept: Kept = KEPT
    replay_clients: int = 1
    """Concurrent requests of the replay."""
    replay_block: int = 2
    """Prompts that an arm answers before the next arm's turn."""
    replay_s: float = 82.0
    """Longest replay of a domain; the first round is always finished."""
    seed: int = 0
    start_s: float = 120.0
    """Longest wait for the server to get ready."""
    on_gpu: bool = False
    """Server and trainer share a GPU."""
    goals: Goals = GOALS

    @property
    def domains(self) -> list[str]:
        """All domains, in the order in which they come."""
        return list(dict.fromkeys(domain for phase in self.phases for domain in phase.domains))

    @property
    def server_overrides(self) -> tuple[str, ...]:
        """What the demo's server needs beyond the settings files.

        No prefix cache: the replay sends every prompt once for each arm, and only the first would
        compute its prompt. All live prompts differ, so they lose nothing.
        """
        return ("server.port=0", "engine.prefix_cache=false")

    @property
    def shared_overrides(self) -> tuple[str, ...]:
        """Overrides of both processes. The static version is replayed at the end: keep it."""
        domains = json.dumps(self.domains)
        return (
            f"run_dir={self.run_dir}",
            "trainer.keep_versions=1000",
            f"reports.domains={domains}",
            *self.overrides,
        )


REAL_CONFIGS = tuple(Path("configs", f"{name}.yaml") for name in ("real", "one_gpu", "compare"))
"""In this order: ``real`` alone is for two CPU cores, and ``one_gpu`` replaces what that needs."""
TWO_GPU = Path("configs", "two_gpu.yaml")


def default_settings(*, own_gpu: bool = False) -> DemoSettings:
    """The demo of this machine: a real target where there is a GPU and ``make real`` has fetched
    it, else the bundled one.

    Args:
        own_gpu: the trainer uses a second GPU.
    """
    real = real_target_is_here() and hardware()["gpu"]
    settings = real_settings() if real else DemoSettings()
    return replace(settings, configs=(*settings.configs, TWO_GPU)) if own_gpu else settings


def real_target_is_here() -> bool:
    """``make real`` has been run."""
    if not all(config.exists() for config in REAL_CONFIGS):
        return False
    return Path(load_settings(REAL_CONFIGS, [], {}).target).exists()


def real_settings() -> DemoSettings:
    """Chat requests to a real target on one GPU, from random weights, in five minutes.

    Numerics are pinned, so that arms can be compared token by token: in bfloat16, two tokens tie
    now and then, and the shape of a batch would decide. The trainer never rests, as five minutes
    are short; by default it would hold what the server loses to 5 %.
    """
    return DemoSettings(
        configs=REAL_CONFIGS,
        overrides=("engine.numerics=pinned", "trainer.duty=1"),
        source=chats,
        phases=phases_of(DOMAINS[:4], seconds=36.0, enough_requests=4000),
        num_clients=32,
        sampling=Sampling(temperature=0.7, max_tokens=512),
        max_requests=3000,
        kept=Kept(replayed=256, warmup=64),
        replay_clients=32,
        replay_block=128,  # so that most of a turn has 32 requests at a time
        replay_s=15.0,
        on_gpu=True,
        goals=Goals(over_plain=1.3, over_static=1.15, seconds=360.0),
    )


def with_seed(settings: DemoSettings, seed: int) -> DemoSettings:
    """The same demo with other prompts, other draws of answers, and other random weights."""
    return replace(
        settings,
        seed=seed,
        sampling=replace(settings.sampling, seed=seed),
        overrides=(*settings.overrides, f"seed={seed}"),
    )


ORDERS = ("ordered", "mixed", "both")
_NO_END_S = 24 * 3600.0


def with_requests(settings: DemoSettings, num_requests: int, order: str) -> DemoSettings:
    """The same demo as a stream of so many requests: each phase ends when its prompts are answered.

    Args:
        num_requests: of all phases, which have the same number of them.
        order: ``ordered``: one domain after the other, then the first again. ``mixed``: all at
            once, and nothing else: no phase is shifted, and nothing is replayed. ``both``: one
            after the other, then all at once, then the first again.
    """
    domains = settings.domains
    first, *others = domains
    mixed = Phase("mixed", first, order != "mixed", _NO_END_S, num_requests + 1, tuple(others))
    phases = phases_of(domains, _NO_END_S, num_requests + 1)
    if order == "mixed":
        phases = (mixed,)
    elif order == "both":
        phases = (*phases[:-1], mixed, phases[-1])
    return replace(
        settings,
        phases=phases,
        max_requests=-(-num_requests // len(phases)),
        kept=Kept(0, 0) if order == "mixed" else settings.kept,
    )


def with_prompts(settings: DemoSettings, path: Path) -> DemoSettings:
    """The same demo with the prompts of a file: its domains in the order in which they come, and
    the first one again.

    Raises:
        PromptError: the file is not one of prompts.
    """
    source, domains = of_file(path)
    longest_s = max(phase.seconds for phase in settings.phases)
    enough = max(phase.enough_requests for phase in settings.phases)
    return replace(settings, source=source, phases=phases_of(domains, longest_s, enough))
