"""The training loop under load on one GPU: 10,000 requests, server and trainer on one card.

    python -m benchmarks.one_gpu --start bundled --out benchmarks/results/one_gpu_bundled.json
    python -m benchmarks.one_gpu --start random  --out benchmarks/results/one_gpu_random.json

The demo with more clients: Python, C headers, documentation, Python again. Then all three arms
answer held-out prompts of each phase at the same load, interleaved. Finally the learning curve is
computed from the run's own log, simulated at K = 4: published versions and the bundled drafter on
held-out traces of each phase, the index on the last traces of each phase.

float32, so that seeded outputs do not depend on the shape of a batch (see docs/operations.md).
"""

from __future__ import annotations

import bisect
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

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
from examples.plan import DemoSettings
from examples.processes import Child, stop
from examples.recording import Replay
from examples.report import mismatched_outputs, speeds, tokens_per_step
from examples.run_folder import own_folder
from examples.texts import Kept, Phase
from targets.find import target_folder
from targets.head import load_target_head
from trainer.gate import Judge
from trainer.rows import RowStore
from trainer.start import read_drafter
from trainer.update import batch_dtype

DRAFT_K = 4
JUDGED_VERSIONS = 8
DEVICE = torch.device("cuda")
_JUDGED_BYTES = 4 << 30
"""For the hidden rows of the traces that versions are judged on."""


def phases(num_requests: int, seconds: float) -> tuple[Phase, ...]:
    """Four phases with a quarter of the requests each; the time limit only ends runs that hang."""
    count = -(-num_requests // 4)
    return tuple(
        Phase(name, domain, shifted, seconds, count)
        for name, domain, shifted in (
            ("python", "python", False),
            ("c", "c", True),
            ("docs", "docs", True),
            ("python-again", "python", False),
        )
    )


def phase_figures(phase: Phase, replays: Sequence[Replay]) -> dict[str, Any]:
    """Speeds of all arms in a phase, and whether all gave the same tokens."""
    own = [replay for replay in replays if replay.domain == phase.domain]
    return {
        "name": phase.name,
        "shifted": phase.shifted,
        **speeds(own),
        "tokens_per_step": tokens_per_step(r for r in own if r.arm == "tuned"),
        "static_tokens_per_step": tokens_per_step(r for r in own if r.arm == "static"),
        "mismatched_outputs": mismatched_outputs(own),
    }


# Learning curve


def learning_curve(
    settings: Settings, static: Path, spans: list[tuple[str, float]]
) -> list[dict[str, Any]]:
    """tokens_per_step at K = 4 by phase: selected versions, the bundled drafter and the index.

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
        rows = RowStore(DEVICE, _JUDGED_BYTES)
        judged_rows = rows.put(samples)
        judge = Judge(trainable(initial.kind), head, rows, bundled.to(DEVICE), 1.0, 0.5)
        static_figure, points = None, []
        for version in chosen:
            manifest, model = read_drafter(
                settings.run_dir / "weights" / str(version), head, fingerprint
            )
            judged = judge.judge(model.to(DEVICE), judged_rows)
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
    """tokens_per_step at K = 4 of the index alone on the last traces of each phase, at the
    positions where drafters are simulated. Before each trace the index holds all earlier
    traffic."""
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
    """Requests before the first version that exceeds ``figure``; ``None`` if none does."""
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
    settings = DemoSettings(
        configs=(Path("configs/one_gpu.yaml"), Path("configs/compare.yaml")),
        run_dir=run_dir,
        overrides=(*own, *(set_ or ())),
        phases=phases(num_requests, phase_s),
        num_clients=num_clients,
        sampling=replace(DemoSettings().sampling, max_tokens=max_tokens),
        max_requests=-(-num_requests // 4) + num_clients,
        settle_s=0.0,
        kept=Kept(replayed=rounds * num_clients, warmup=num_clients // 2),
        replay_clients=num_clients,
        replay_block=num_clients,
        replay_s=phase_s,
        start_s=240.0,
        on_gpu=True,
    )
    children: list[Child] = []
    console = Console(width=150)
    if not torch.cuda.is_available():
        raise typer.BadParameter("this benchmark needs an NVIDIA GPU, but none was found")
    try:
        with own_folder(run_dir), View(console) as view:
            result, spans = carry_out(settings, view, children, begin)
    finally:
        stop(children)
    write_result(out, result)  # before the curve, so that a cut-off run keeps its figures
    loaded = load_settings(list(settings.configs), [f"run_dir={run_dir}", *settings.overrides], {})
    result["learning_curve"] = learning_curve(loaded, static, spans)
    write_result(out, result)
    console.print_json(json.dumps(result))


def carry_out(
    settings: DemoSettings,
    view: View,
    children: list[Child],
    begin: str,
) -> tuple[dict[str, Any], list[tuple[str, float]]]:
    """Run everything; returns the figures and the time at which each phase ended."""
    began_s = time.monotonic()
    children.append(demo.begin_server(settings))
    texts = demo.gather_texts(settings)
    server = demo.wait_for_server(settings, children)
    ready_s = time.monotonic() - began_s
    children.append(demo.begin_trainer(settings))
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
    server.swap(None)
    newest_version = server.drafter()["version"]
    replayer = demo.replayer_for(scene, first_version, newest_version)
    replays = demo.run_replay(scene, replayer)
    scene.failures += replayer.failures
    policy = server.policy()
    shifted = {phase.domain for phase in settings.phases if phase.shifted}
    stop([children.pop()])
    answers = scene.answers
    figures = {
        "start": begin,
        "requests": len(answers),
        "failed_requests": len(scene.failures),
        "mismatched_outputs": mismatched_outputs(replays),
        "swaps": swaps["swapped"],
        "rollbacks": swaps["rolled_back"],
        "static_version": first_version,
        "newest_version": newest_version,
        "num_clients": settings.num_clients,
        "max_tokens": settings.sampling.max_tokens,
        "temperature": settings.sampling.temperature,
        "dtype": "float32",
        "ready_s": ready_s,
        "traffic_s": traffic_s,
        "traffic_tokens_per_s": sum(a.num_tokens for a in answers) / traffic_s,
        "seconds": time.monotonic() - began_s,
        **speeds([replay for replay in replays if replay.domain in shifted]),
        "phases": [phase_figures(phase, replays) for phase in settings.phases],
        "policy": policy,
    }
    return figures, spans


if __name__ == "__main__":
    typer.run(main)
