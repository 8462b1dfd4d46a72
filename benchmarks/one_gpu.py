"""The loop at load on one GPU: 10,000 requests, server and trainer sharing the card.

    python -m benchmarks.one_gpu --start bundled --out benchmarks/results/one_gpu_bundled.json
    python -m benchmarks.one_gpu --start random  --out benchmarks/results/one_gpu_random.json

The demo with more clients: Python, C headers, documentation, Python again; then held-out
prompts of each phase by all three arms at the same load, interleaved. Afterwards the learning curve
is computed from the run's own log: every published version, the bundled drafter and the
index are simulated at K = 4 on the same held-out traces of each phase.

float32, so that greedy outputs do not depend on the shape of a batch (see docs/operations.md).
"""

from __future__ import annotations

import bisect
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import openai
import torch
import typer
from rich.console import Console

from benchmarks.harness.results import write_result
from benchmarks.harness.run_traces import JUDGED_TRACES, all_traces, by_index, held_out, new_index
from buffer.backends import open_backend
from buffer.records import Acceptance, Trace
from configs.load import load_settings
from configs.schema import Settings
from drafters.trainable import trainable
from examples import demo
from examples.live import View
from examples.processes import Child, start, stop
from examples.report import ARMS, Arm
from examples.traffic import Reply, Server
from targets.head import load_target_head
from targets.load import target_folder
from trainer.gate import Judge
from trainer.learner import batch_dtype
from trainer.start import read_drafter

DRAFT_K = 4
JUDGED_VERSIONS = 8
DEVICE = torch.device("cuda")


def phases(num_requests: int, seconds: float) -> tuple[demo.Phase, ...]:
    """Four phases with a quarter of the requests each; the time limit only ends runs that hang."""
    count = -(-num_requests // 4)
    return tuple(
        demo.Phase(name, domain, shifted, seconds, count)  # type: ignore[arg-type]
        for name, domain, shifted in (
            ("python", "python", False),
            ("c", "c", True),
            ("docs", "docs", True),
            ("python-again", "python", False),
        )
    )


# Replay at load


@dataclass(frozen=True, slots=True)
class Turn:
    """All prompts of a phase, answered by one arm."""

    seconds: float
    replies: list[Reply | None]
    """In the order of the prompts; ``None``: failed."""

    @property
    def answered(self) -> list[Reply]:
        return [reply for reply in self.replies if reply is not None]

    @property
    def tokens_per_s(self) -> float:
        return sum(len(reply.token_ids) for reply in self.answered) / self.seconds


def replay(
    server: Server,
    settings: demo.DemoSettings,
    texts: demo.Texts,
    arms: dict[Arm, int],
    rounds: int,
    failures: list[str],
) -> dict[str, Any]:
    """Every phase by every arm, ``num_clients`` requests at a time, arms in rotating order."""
    found: dict[str, Any] = {}

    def answer(prompts: Sequence[str], cap: int | None) -> list[Reply | None]:
        return list(pool.map(lambda p: ask(server, p, settings.max_tokens, cap, failures), prompts))

    with ThreadPoolExecutor(settings.num_clients) as pool:
        for phase in settings.phases:
            prompts = texts.held_out[phase.domain]
            turns: dict[Arm, list[Turn]] = {arm: [] for arm in ARMS}
            for number in range(rounds):
                for place in range(len(ARMS)):
                    arm = ARMS[(number + place) % len(ARMS)]
                    if arm != "plain":
                        server.swap(arms[arm])
                        answer(texts.warmup[phase.domain], None)
                    cap = 0 if arm == "plain" else None
                    started_s = time.perf_counter()
                    replies = answer(prompts, cap)
                    turns[arm].append(Turn(time.perf_counter() - started_s, replies))
            found[phase.name] = phase_figures(phase, turns)
    return found


def ask(
    server: Server, prompt: str, max_tokens: int, cap: int | None, failures: list[str]
) -> Reply | None:
    """A greedy completion; a failure is noted, and the run continues."""
    try:
        return server.ask(prompt, max_tokens, cap, capture=False)
    except openai.OpenAIError as error:
        failures.append(f"{type(error).__name__}: {error}")
        return None


def phase_figures(phase: demo.Phase, turns: dict[Arm, list[Turn]]) -> dict[str, Any]:
    """Median tokens/s of each arm's turns, and whether all gave the same tokens."""
    speeds = {arm: statistics.median(t.tokens_per_s for t in taken) for arm, taken in turns.items()}
    steps = {
        arm: sum((r.acceptance for t in taken for r in t.answered), Acceptance()).tokens_per_step
        for arm, taken in turns.items()
    }
    answers = zip(*(t.replies for taken in turns.values() for t in taken), strict=True)
    return {
        "name": phase.name,
        "shifted": phase.shifted,
        **{f"{arm}_tokens_per_s": speeds[arm] for arm in ARMS},
        "speedup_vs_plain": speeds["tuned"] / speeds["plain"],
        "speedup_vs_static": speeds["tuned"] / speeds["static"],
        "tokens_per_step": steps["tuned"],
        "static_tokens_per_step": steps["static"],
        "mismatched_outputs": sum(
            len({r.token_ids for r in same if r is not None}) > 1 for same in answers
        ),
    }


def harmonic(phases: Sequence[dict[str, Any]], name: str) -> float:
    """Speed over several phases of equally many tokens."""
    return statistics.harmonic_mean([phase[name] for phase in phases])


# Learning curve


def learning_curve(
    settings: Settings, static: Path, spans: list[tuple[str, float]]
) -> list[dict[str, Any]]:
    """For each phase, tokens_per_step at K = 4 of every version, the static drafter and the index.

    Args:
        spans: (phase, unix second at which it ended), in order.
    """
    traces = all_traces(settings)
    head = load_target_head(
        target_folder(settings.target, settings.target_cache), DEVICE, batch_dtype(DEVICE)
    )
    store = open_backend(settings.buffer.url, settings.run_dir).open_weights()
    initial = store.read_manifest(0)
    fingerprint = initial.target_fingerprint
    _, bundled = read_drafter(static, head, fingerprint)
    known = store.versions()
    chosen = sorted({0, *known[:: max(1, len(known) // JUDGED_VERSIONS)], *known[-1:]})
    ends = [int(unix_s * 1000) for _, unix_s in spans]
    by_lookup = index_figures(traces, ends, settings)
    curves = []
    for place, (name, _) in enumerate(spans):
        begin = ends[place - 1] if place else 0
        own = [t for t in traces if begin < t.finished_unix_ms <= ends[place]]
        samples = held_out(own, initial, head, settings)
        judge = Judge(trainable(initial.kind), head, DEVICE, bundled.to(DEVICE), margin=1.0)
        static_figure, points = None, []
        for version in chosen:
            manifest, model = read_drafter(
                settings.run_dir / "weights" / str(version), head, fingerprint
            )
            judged = judge.judge(model.to(DEVICE), samples)
            static_figure = judged.incumbent
            at = bisect.bisect([t.finished_unix_ms for t in traces], manifest.created_unix_ms)
            points.append(
                {
                    "version": version,
                    "requests": 0 if version == 0 else at,
                    "tokens_per_step_k4": judged.candidate,
                }
            )
        curves.append(
            {
                "phase": name,
                "num_traces": len(samples),
                "static_tokens_per_step_k4": static_figure,
                "index_tokens_per_step_k4": by_lookup[place],
                "versions": points,
                "requests_to_pass_static": first_above(points, static_figure),
                "requests_to_pass_index": first_above(points, by_lookup[place]),
            }
        )
    return curves


def index_figures(
    traces: Sequence[Trace], ends_ms: Sequence[int], settings: Settings
) -> list[float | None]:
    """tokens_per_step at K = 4 of the index alone on the last traces of each phase, filled with all
    traffic before them, at the positions where drafters are simulated."""
    index = new_index(settings)
    totals = [Acceptance() for _ in ends_ms]
    last = [bisect.bisect([t.finished_unix_ms for t in traces], end) for end in ends_ms]
    for number, trace in enumerate(traces):
        phase = bisect.bisect_right(last, number)
        if phase < len(last) and number >= last[phase] - JUDGED_TRACES * 4:
            kept = [count for _, count in by_index(index, trace, DRAFT_K).values()]
            totals[phase] += Acceptance(len(kept), DRAFT_K * len(kept), sum(kept))
        index.begin("seen", trace.token_ids.tolist())
        index.finish("seen", keep=True)
    return [total.tokens_per_step for total in totals]


def first_above(points: list[dict[str, Any]], figure: float | None) -> int | None:
    """Number of requests until a version first exceeded ``figure``; ``None`` if none did."""
    if figure is None:
        return None
    reached = [p["requests"] for p in points if (p["tokens_per_step_k4"] or 0) > figure]
    return min(reached, default=None)


# Command


def main(
    out: Annotated[Path, typer.Option(help="result file")],
    begin: Annotated[Literal["bundled", "random"], typer.Option("--start")] = "bundled",
    num_requests: int = 10_000,
    num_clients: int = 96,
    max_tokens: int = 64,
    rounds: int = 3,
    phase_s: float = 120.0,
    run_dir: Path = Path("runs/one_gpu"),
    set_: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    """Run, replay, compute the learning curve, write the result."""
    static = Path("examples/drafter/0")
    own = [
        "dtype=float32",
        "buffer.max_bytes=8589934592",
        *([f"drafter.path={static}"] if begin == "bundled" else []),
    ]
    settings = demo.DemoSettings(
        config=Path("configs/one_gpu.yaml"),
        run_dir=run_dir,
        overrides=(*own, *(set_ or ())),
        phases=phases(num_requests, phase_s),
        num_clients=num_clients,
        max_tokens=max_tokens,
        max_requests=-(-num_requests // 4) + num_clients,
        settle_s=0.0,
        replay_prompts=num_clients,
        replay_warmup=num_clients // 2,
        start_s=240.0,
    )
    children: list[Child] = []
    console = Console(width=150)
    if not torch.cuda.is_available():
        raise typer.BadParameter("this benchmark needs an NVIDIA GPU, and none is here")
    try:
        with demo.own_folder(run_dir), View(console) as view:
            result, spans = carry_out(settings, view, children, rounds, begin)
    finally:
        stop(children)
    write_result(out, result)  # before the curve, so that a cut-off run keeps its figures
    loaded = load_settings([settings.config], [f"run_dir={run_dir}", *settings.overrides], {})
    result["learning_curve"] = learning_curve(loaded, static, spans)
    write_result(out, result)
    console.print_json(json.dumps(result))


def carry_out(
    settings: demo.DemoSettings,
    view: View,
    children: list[Child],
    rounds: int,
    begin: str,
) -> tuple[dict[str, Any], list[tuple[str, float]]]:
    """Run everything; returns the figures and when each phase ended."""
    began_s = time.monotonic()
    children.append(demo.begin_server(settings))
    texts = demo.gather_texts(settings)
    server = demo.wait_for_server(settings, children[0])
    ready_s = time.monotonic() - began_s
    command = demo.command_of(settings, "trainer")
    children.append(start("trainer", command, demo.log_of(settings, "trainer")))
    scene = demo.Scene(settings, view, texts, began_s, server, children)
    scene.look()
    spans, first_version = [], 0
    traffic_s = time.monotonic()
    for phase in settings.phases:
        demo.run_phase(scene, replace(phase, shifted=False))
        spans.append((phase.name, time.time()))
        first_version = first_version if len(spans) > 1 else scene.status["version"]
    traffic_s = time.monotonic() - traffic_s
    swaps = scene.status["swaps"]
    stop([children.pop()])
    time.sleep(1.0)
    tuned = server.swap(None)["version"]
    arms: dict[Arm, int] = {"static": first_version, "tuned": tuned}
    replayed = replay(server, settings, texts, arms, rounds, scene.failures)
    policy = server.policy()
    shifted = [replayed[p.name] for p in settings.phases if p.shifted]
    stop([children.pop()])
    answers = scene.answers
    figures = {
        "start": begin,
        "requests": len(answers),
        "failed_requests": len(scene.failures),
        "mismatched_outputs": sum(p["mismatched_outputs"] for p in replayed.values()),
        "swaps": swaps["swapped"],
        "rollbacks": swaps["rolled_back"],
        "static_version": first_version,
        "newest_version": tuned,
        "num_clients": settings.num_clients,
        "max_tokens": settings.max_tokens,
        "dtype": "float32",
        "ready_s": ready_s,
        "traffic_s": traffic_s,
        "traffic_tokens_per_s": sum(a.num_tokens for a in answers) / traffic_s,
        "seconds": time.monotonic() - began_s,
        **{f"{arm}_tokens_per_s": harmonic(shifted, f"{arm}_tokens_per_s") for arm in ARMS},
        "speedup_vs_plain": statistics.fmean(p["speedup_vs_plain"] for p in shifted),
        "speedup_vs_static": statistics.fmean(p["speedup_vs_static"] for p in shifted),
        "phases": list(replayed.values()),
        "policy": policy,
    }
    return figures, spans


if __name__ == "__main__":
    typer.run(main)
