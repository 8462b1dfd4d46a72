"""Where training adds to looking up matches: tokens_per_step by kind of match.

    python -m benchmarks.demo                       # or: make demo
    python -m benchmarks.by_match runs/bench_demo

Uses held-out traces of a demo. At every position, the index (filled with all other traffic of the
run), the drafter from before the first shift and the newest drafter each draft 4 tokens, and the
tokens that would be accepted are counted. Greedy and simulated, without a server; takes about a
minute on one core. Writes ``benchmarks/results/by_match.json``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness.results import RESULTS, Out, write_result
from benchmarks.harness.run_traces import all_traces, by_index, held_out, new_index
from buffer.bundles import read_manifest
from buffer.records import Sampling, Trace
from configs.load import load_settings
from configs.schema import Settings
from drafters.batch import collate
from drafters.eagle3.model import Eagle3
from drafters.eagle3.training import chain_acceptance
from drafters.protocol import HostDrafter
from drafters.samples import Sample
from drafters.suffix.kinds import KINDS, LENGTHS
from targets.head import TargetHead, load_target_head
from trainer.dataset import key_of
from trainer.start import read_drafter

DRAFT_K = 4
MATCHES = (
    "none",
    *(f"{place}, {least} and more" for place in ("recent", "own") for least in LENGTHS),
)
"""Matches by where they were found, and their shortest length."""

Accepted = dict[tuple[str, int], int]
"""(trace, position of the last committed token) -> drafted tokens that would be kept."""


def traces_by_phase(settings: Settings) -> dict[str, list[Trace]]:
    """The run's traces by phase, in order: one trace per answer of the phase."""
    answers = json.loads((settings.run_dir / "recording.json").read_text())["answers"]
    phases: dict[str, list[Trace]] = defaultdict(list)
    for trace, answer in zip(all_traces(settings), answers, strict=False):
        phases[answer["phase"]].append(trace)
    return phases


def by_drafter(model: Eagle3, head: TargetHead, samples: Sequence[Sample]) -> Accepted:
    """Accepted tokens of a neural drafter at every position followed by at least K tokens."""
    accepted: Accepted = {}
    for sample in samples:
        for piece in sample.pieces:
            greedy = Sampling({"temperature": 0.0})
            batch = collate([(replace(sample, sampling=greedy), piece)])
            found = chain_acceptance(model, head.embed_VH, head.lm_head, batch, DRAFT_K)
            is_full = found.is_full_R
            anchors = batch.positions_T[batch.row_R[is_full]]
            counts = found.overlap_RK[is_full].cumprod(dim=1).sum(dim=1).int().tolist()
            accepted |= {(sample.key, p): n for p, n in zip(anchors.tolist(), counts, strict=True)}
    return accepted


def table(
    judged: Sequence[Trace], index: HostDrafter, static: Accepted, newest: Accepted
) -> list[dict[str, Any]]:
    """One row per place and length of matches, and one for all positions."""
    rows: dict[str, list[tuple[int, int, int]]] = {name: [] for name in (*MATCHES, "all")}
    for trace in judged:
        for p, (match, kept) in by_index(index, trace, DRAFT_K).items():
            key = (key_of(trace), p)
            if key in static and key in newest:
                figures = (kept, static[key], newest[key])
                rows[_name(match)].append(figures)
                rows["all"].append(figures)
    total = len(rows["all"])
    return [
        {
            "match": name,
            "share": len(found) / total,
            **{
                arm: 1 + sum(figures[place] for figures in found) / len(found)
                for place, arm in enumerate(("index", "static", "newest"))
            },
        }
        for name, found in rows.items()
        if found
    ]


def _name(match: int) -> str:
    """Which of ``MATCHES`` a kind of match is of."""
    if not match:
        return MATCHES[0]
    kind = KINDS[match - 1]
    return f"{'own' if kind.is_own else 'recent'}, {kind.least} and more"


def main(
    run_dir: Annotated[Path, typer.Argument(help="folder of a finished demo")],
    out: Out = RESULTS / "by_match.json",
) -> None:
    """Judge both versions of a demo, and its index, on held-out traces."""
    if not (run_dir / "report.json").is_file():
        raise typer.BadParameter(f"{run_dir} holds no report.json; name the folder of a demo")
    torch.set_num_threads(1)
    settings = load_settings([Path("configs/demo.yaml")], [f"run_dir={run_dir}"], {})
    report = json.loads((run_dir / "report.json").read_text())
    head = load_target_head(Path(settings.target), torch.device("cpu"), torch.float32)
    root = run_dir / "weights"
    manifest = read_manifest(root / "0")
    models = {}
    for arm in ("static", "newest"):
        path = root / str(report[f"{arm}_version"])
        _, models[arm] = read_drafter(path, head, manifest.target_fingerprint)
    phases = traces_by_phase(settings)
    result: dict[str, Any] = {"draft_k": DRAFT_K, "phases": {}}
    for name in report["shifted_phases"]:
        samples = held_out(phases[name], manifest, head, settings)
        judged = {sample.key for sample in samples}
        index = new_index(settings)
        for trace in (t for traces in phases.values() for t in traces):
            if key_of(trace) not in judged:
                index.begin("other", trace.token_ids.tolist())
                index.finish("other", keep=True)
        accepted = {arm: by_drafter(model, head, samples) for arm, model in models.items()}
        rows = table(
            [t for t in phases[name] if key_of(t) in judged],
            index,
            accepted["static"],
            accepted["newest"],
        )
        result["phases"][name] = {"held_out_traces": len(samples), "by_match": rows}
        print(name, len(samples), "held-out traces")
        for row in rows:
            figures = (f"{row[key]:6.2f}" for key in ("share", "index", "static", "newest"))
            print(f"  {row['match']:>18}", *figures)
    write_result(out, result)


if __name__ == "__main__":
    typer.run(main)
