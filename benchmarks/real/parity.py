"""Simulated tokens per step against live ones, on the same whole answers.

    python -m benchmarks.real.parity --kind KIND --run-dir runs/real/drafters/KIND
    ... --drafter examples/drafter/0 --set target=examples/target --device cpu --run-dir runs/parity

The newest weights of a run, or those of ``--drafter``, draft K = 4 tokens in every round of a fixed
set of chat requests, each answered to the end that the target gives it: greedily, at a temperature
with a seed (whose drafts are kept by match), and at the same temperature without one. Live tokens
per step are the tokens of these answers behind the first, which comes with the prompt, over their
rounds. The simulation is the trainer's own, on the traces of the same answers. So both are of the
same texts, and what is left is what chance does in the rounds of requests without a seed, and how
numbers are rounded.

What a window of time brings is something else: it also has steps that compute prompts, and with one
client one that is launched before an answer's end is known.

Writes ``parity.json`` and ``rows/parity.json`` in ``benchmarks/results``; other kinds stay.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness.arms import LEARNED
from benchmarks.harness.engines import build, release
from benchmarks.harness.loops import Feed
from benchmarks.harness.results import RESULTS, Out, Row, say, write_result, write_rows
from benchmarks.real.choosing import ARM_DOMAINS, TRAINED_AT, prompt_ids, settings_for
from benchmarks.real.train_drafter import WRITING_S, read_samples
from buffer.backends import open_backend
from buffer.fingerprint import target_fingerprint
from buffer.records import Trace
from configs.schema import Settings
from drafters.samples import Sample
from drafters.trainable import trainable
from examples.traffic.chat import chat_prompts
from serving.requests import Request, SamplingParams
from targets.find import target_folder
from targets.head import load_target_head
from targets.tokenizer import load_tokenizer
from trainer.build import expected_of
from trainer.dataset import Refusal
from trainer.gate import GATE_DRAFT_K, Judge
from trainer.rows import RowStore, memory_bytes
from trainer.start import newest_drafter
from trainer.update import batch_dtype

PARITY = 0.03
"""Largest relative difference between simulated and live tokens per step."""
MAX_TOKENS = 512
GREEDY, SEEDED, DRAWN = "temperature 0", f"temperature {TRAINED_AT:g}, seeded", (
    f"temperature {TRAINED_AT:g}"
)  # fmt: skip
WAYS = (GREEDY, SEEDED, DRAWN)

Prompt = tuple[tuple[int, ...], int]
"""Token ids, and the seed of the answer."""


def by_turns(domains: Sequence[Sequence[Prompt]]) -> list[Prompt]:
    """The first prompt of each domain, then the second of each, as far as all have one."""
    return [one for group in zip(*domains, strict=False) for one in group]


def requests_of(prompts: Sequence[Prompt]) -> Iterator[Request]:
    """Each prompt asked in every way; the part of its id before the last dash is the way."""
    for number, (ids, seed) in enumerate(prompts):
        for way in WAYS:
            sampling = SamplingParams(
                temperature=0.0 if way == GREEDY else TRAINED_AT,
                max_tokens=MAX_TOKENS,
                seed=seed if way == SEEDED else None,
            )
            yield Request(f"{way}-{number}", ids, sampling)


def parity_settings(
    folder: Path, kind: str, drafter: Path, device: str, batch: int, chosen: Sequence[str]
) -> Settings:
    """Settings of an engine that always drafts K tokens and captures every row.

    Args:
        folder: of the run, which holds the traces; new.
        drafter: bundle folder.
    """
    return settings_for(
        folder, device, f"drafter.kind={kind}", f"drafter.path={drafter}",
        f"drafter.max_draft={GATE_DRAFT_K}", "drafter.suffix.enabled=false",
        "drafter.on_request=null", "policy.kind=fixed", f"policy.drafter={kind}",
        f"policy.draft_k={GATE_DRAFT_K}", f"engine.max_batch={batch}",
        "engine.draft_at_start=null", "trainer.memory_fraction=0.3",
        "capture.queue_traces=1000000", f"capture.ring_rows={batch * 3000}",
        f"buffer.max_bytes={batch * 300 << 20}", *chosen,
    )  # fmt: skip


def answer(settings: Settings, prompts: Sequence[Prompt], seconds: float) -> None:
    """Answer the requests that begin within so many seconds, all to their end, and write traces."""
    service, _ = build(settings)
    recorder = service.recorder
    assert recorder is not None, "capture is on"
    recorder.start()
    try:
        feed = Feed(service.engine, requests_of(prompts), settings.engine.max_batch)
        feed.run(seconds)
        feed.finish()
    finally:
        recorder.close(WRITING_S)
    say(f"{feed.num_finished} requests answered, {feed.num_tokens:,} tokens")
    del service
    release(torch.device(settings.device))


def live_of(traces: Sequence[Trace]) -> tuple[int, int]:
    """Tokens that rounds brought, and rounds."""
    drafted = [trace for trace in traces if len(trace.rounds)]
    tokens = sum(trace.token_ids.size - 1 - next(iter(trace.rounds)).anchor for trace in drafted)
    return tokens, sum(len(trace.rounds) for trace in drafted)


def compare(settings: Settings) -> dict[str, Any]:
    """Both figures of each way, from the traces of a run."""
    device = torch.device(settings.trainer.device)
    folder = target_folder(settings.target, settings.target_cache)
    head = load_target_head(folder, device, batch_dtype(device))
    store = open_backend(settings.buffer.url, settings.run_dir).open_weights()
    manifest, model = newest_drafter(settings, store, head, target_fingerprint(folder))
    rows = RowStore(device, memory_bytes(settings.trainer, device))
    by_block = settings.engine.verification == "block"
    learns, model = trainable(manifest.kind), model.to(device)
    judge = Judge(learns, head, rows, model, 1.0, 0.5, block=by_block)
    found: dict[str, list[tuple[Trace, Sample]]] = {way: [] for way in WAYS}
    for trace, sample in read_samples(settings, expected_of(manifest, head)):
        if not isinstance(sample, Refusal):
            found[trace.request_id.rpartition("-")[0]].append((trace, sample))
    figures: dict[str, Any] = {}
    for way, pairs in found.items():
        tokens, rounds = live_of([trace for trace, _ in pairs])
        held = rows.put([sample for _, sample in pairs])
        simulated = judge.judge(model, held).candidate
        rows.drop(held)
        figures[way] = {
            "requests": len(pairs),
            "rounds": rounds,
            "live": tokens / rounds if rounds else None,
            "simulated": simulated,
        }
    return figures


def claims(kinds: dict[str, Any]) -> list[Row]:
    """One claim for each kind and way."""
    rows = []
    for kind, figures in kinds.items():
        for way, one in figures.items():
            if one["live"] and one["simulated"]:
                off = one["simulated"] / one["live"] - 1
                about = f"{kind}, K = {GATE_DRAFT_K}, {way}, whole answers"
                measure = "tokens per step, simulated over live, less 1"
                goal = f"within {PARITY:g}"
                rows.append(Row(about, measure, off, goal, abs(off) <= PARITY))
    return rows


def measure(
    kind: str,
    drafter: Path,
    device: str,
    batch: int,
    prompts: Sequence[Prompt],
    seconds: float,
    chosen: Sequence[str],
) -> dict[str, Any]:
    """Answer and compare, in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        settings = parity_settings(Path(folder), kind, drafter.resolve(), device, batch, chosen)
        answer(settings, prompts, seconds)
        figures = compare(settings)
    release(torch.device(device))
    return figures


def newest_bundle(run_dir: Path) -> Path:
    """Folder of the newest version of a run on this disk.

    Raises:
        typer.BadParameter: it has none.
    """
    folders = [path for path in (run_dir / "weights").glob("*") if path.name.isdecimal()]
    if not folders:
        raise typer.BadParameter(f"{run_dir} has no versions; train a drafter, or name --drafter")
    return max(folders, key=lambda path: int(path.name))


def main(
    run_dir: Annotated[Path, typer.Option(help="run whose newest weights are measured")],
    kind: str = LEARNED,
    drafter: Annotated[Path | None, typer.Option(help="bundle folder instead")] = None,
    out: Out = RESULTS / "parity.json",
    prompts: Annotated[int, typer.Option(help="of each of four domains, at most")] = 48,
    batch: int = 32,
    seconds: Annotated[float, typer.Option(help="in which requests may begin")] = 20.0,
    device: str = "cuda",
    chosen: Annotated[
        list[str] | None, typer.Option("--set", help="a setting of the engine, a.b=c")
    ] = None,
) -> None:
    """Measure one kind, and write figures and rows."""
    began, more = time.monotonic(), chosen or []
    settings = settings_for(run_dir, device, *more)
    tokenizer = load_tokenizer(target_folder(settings.target, settings.target_cache))
    found = chat_prompts(dict.fromkeys(ARM_DOMAINS, prompts), seed=7, may_lack=True)
    ids = [[(prompt_ids(tokenizer, p), p.seed(0)) for p in asked] for asked in found.values()]
    bundle = newest_bundle(run_dir) if drafter is None else drafter
    kinds: dict[str, Any] = json.loads(out.read_text())["kinds"] if out.exists() else {}
    kinds[kind] = measure(kind, bundle, device, batch, by_turns(ids), seconds, more)
    for row in claims({kind: kinds[kind]}):
        say(f"{row.row}: {row.value:+.4f}")
    say(f"{kinds[kind]}, {time.monotonic() - began:.0f} s")
    write_result(out, {"target": Path(settings.target).name, "kinds": kinds})
    write_rows("parity", claims(kinds), "python -m benchmarks.real.parity", out.parent)


if __name__ == "__main__":
    typer.run(main)
