"""Every drafter on one real target, after the same number of trained rows: the table in
docs/drafters.md.

    python -m benchmarks.real.drafters --run-dir runs/real/drafters               # all of them
    python -m benchmarks.real.drafters --run-dir runs/real/drafters --kinds mtp   # the others stay
    ... --kinds KIND --set drafter.draft_model.target_layers=2       # a row of its own in the table
    ... --set target=FILE.gguf                                       # likewise, of another target
    ... --rows 8000000                                               # likewise, learnt from more

For each kind: decodes chat requests of four domains, captures what the drafter reads, and trains
new weights on them until they have seen ``--rows`` positions, judged on held-out requests as they
learn. Then other requests are answered in the engine's own loop, without HTTP, with a batch that
stays full: by plain decoding, at every fixed K, and with the policy. Arms take turns in rotating
order on the same seeded prompts, whose answers end where the target ends them; speeds are medians
over the turns of an arm's tokens per second relative to plain decoding of the same turn.

The trainer's simulation is compared with rounds of whole answers (``benchmarks.real.parity``).

The index, which learns nothing, says what the others must pass: a drafter's day 0 ends when its
simulated tokens per step at K = 4 are above the index's measured ones.

Writes ``drafters.json`` and ``rows/drafters.json`` in ``benchmarks/results``, prints the tables.
"""

from __future__ import annotations

import copy
import json
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.harness.arms import LOOKUP
from benchmarks.harness.engines import build, release, round_seconds
from benchmarks.harness.loops import full_window
from benchmarks.harness.results import (
    RESULTS,
    Out,
    known,
    say,
    write_result,
    write_rows,
)
from benchmarks.real import parity
from benchmarks.real.choosing import (
    ARM_DOMAINS,
    PLAIN,
    TRAINED_AT,
    Traffic,
    Watched,
    collecting_settings,
    prompt_ids,
    settings_for,
)
from benchmarks.real.drafters_table import (
    POLICY,
    ROWS,
    claims,
    day_0,
    model_name,
    row_name,
    table,
)
from benchmarks.real.train_drafter import Ask, TrainingData, collect, read_data
from buffer.backends import open_backend
from buffer.fingerprint import target_fingerprint
from configs.schema import Settings
from drafters.catalog import CATALOG
from drafters.trainable import trainable
from examples.machine import commit
from examples.traffic.chat import chat_prompts
from policies.catalog import build_policy
from policies.fixed import FixedPolicy
from policies.interface import DraftPolicy
from serving.engine.loop import Engine
from serving.profile import profile_steps
from serving.service import Service
from targets.find import target_folder
from targets.head import load_target_head
from targets.tokenizer import load_tokenizer
from trainer.build import expected_of
from trainer.gate import GATE_DRAFT_K, Judge
from trainer.learner import Learner
from trainer.publish import bundle_content, publish_version
from trainer.rows import RowStore, memory_bytes
from trainer.start import newest_drafter
from trainer.update import batch_dtype

KINDS = (*(kind for kind in CATALOG if CATALOG[kind].trainable), LOOKUP)
MAX_DRAFT = 8
JUDGED = 96
"""Held-out requests that a drafter is judged on."""


# Training


@dataclass(frozen=True, slots=True)
class Judged:
    """How good a drafter was on the way."""

    rows: int
    """Trained so far."""
    seconds: float
    """Spent on updates so far."""
    tokens_per_step: float | None
    """Simulated at K = 4 on held-out requests."""


def judged_at(num_rows: int) -> list[int]:
    """Rows after which a drafter is judged: by powers of two, and at the end."""
    return [0, *(num_rows >> shift for shift in range(8, -1, -1))]


def learn(
    learner: Learner, judge: Judge, data: TrainingData, num_rows: int, seconds: float
) -> list[Judged]:
    """Train on ``num_rows`` rows, or for at most so many ``seconds``."""
    numbers, held = np.random.default_rng(0), data.held_out[:JUDGED]
    found: list[Judged] = []
    rows, spent_s = 0, 0.0
    for goal in judged_at(num_rows):
        started = time.monotonic()
        while rows < goal and spent_s + time.monotonic() - started < seconds:
            drawn = data.draw(learner.settings.batch_tokens, numbers)
            learner.update(drawn)
            rows += sum(len(piece.rows) for piece in drawn)
        learner.settle()
        spent_s += time.monotonic() - started
        found.append(Judged(rows, spent_s, judge.judge(learner.average, held).candidate))
        say(f"  {found[-1]}")
        if rows < goal:
            break
    return found


def train(settings: Settings, num_rows: int, seconds: float) -> dict[str, Any]:
    """Train new weights on the traces of the run, and publish them as version 1."""
    device = torch.device(settings.trainer.device)
    folder = target_folder(settings.target, settings.target_cache)
    head = load_target_head(folder, device, batch_dtype(device))
    store = open_backend(settings.buffer.url, settings.run_dir).open_weights()
    manifest, model = newest_drafter(settings, store, head, target_fingerprint(folder))
    learns, incumbent = trainable(manifest.kind), copy.deepcopy(model).to(device)
    rows = RowStore(device, memory_bytes(settings.trainer, device))
    data = read_data(settings, expected_of(manifest, head), rows, 60.0)
    say(f"{len(data.pieces)} pieces, {data.num_rows:,} rows to train on")
    learner = Learner(learns, model, head, settings.trainer, rows)
    margin = settings.trainer.gate_margin
    by_block = settings.engine.verification == "block"
    judge = Judge(
        learns, head, rows, incumbent, margin, settings.trainer.gate_confidence, block=by_block
    )
    curve = learn(learner, judge, data, num_rows, seconds)
    judged = judge.judge(learner.average, data.held_out[:JUDGED])
    content = bundle_content(learns, learner.average)
    publish_version(
        store, content, manifest, judged,
        step=learner.step, keep=settings.trainer.keep_versions,
    )  # fmt: skip
    return {
        "parameters": sum(p.numel() for p in learner.model.parameters()),
        "requests": len(data.held_out) + len(data.pieces),
        "updates": learner.step,
        "updates_skipped": learner.num_skipped,
        "curve": [{"rows": j.rows, "seconds": j.seconds, "tokens_per_step": j.tokens_per_step}
                  for j in curve],
        "acceptance": judged.acceptance,
    }  # fmt: skip


# Measuring


@dataclass(slots=True)
class Arm:
    """One way to decode."""

    name: str
    kinds: frozenset[str]
    policy: Watched
    engine: Engine
    turns: list[dict[str, tuple[float, float]]] = field(default_factory=list)
    """Of each turn by domain: tokens per second, tokens per step and request."""


def arms_of(service: Service, settings: Settings, kind: str, fixed_ks: Sequence[int]) -> list[Arm]:
    """All arms of one drafter, over the parts of one engine."""
    traits = service.engine.drafting.drafters[kind].traits
    own = build_policy(settings.policy, {kind: traits}, settings.seed, MAX_DRAFT)
    own.calibrate(profile_steps(service.engine.parts, 5, 128))

    def arm(name: str, policy: DraftPolicy, *kinds: str) -> Arm:
        watched = Watched(policy)
        engine = Engine(service.engine.parts, watched, None, lambda _kinds: watched)
        return Arm(name, frozenset(kinds), watched, engine)

    fixed = [
        arm(f"K = {k}", FixedPolicy(kind, k, needs_match=traits.needs_match), kind)
        for k in fixed_ks
    ]
    return [arm(PLAIN, FixedPolicy("none", 0)), *fixed, arm(POLICY, own, kind)]


def take_turn(
    arm: Arm, traffic: Traffic, domain: Any, start: int, clients: int, seconds: float
) -> tuple[float, float]:
    """Tokens per second, and tokens per step and request, after a tenth of the time."""
    requests = traffic.requests(domain, start, arm.kinds, arm.name)
    window = full_window(arm.engine, requests, clients, seconds / 10, seconds)
    steps = max(1, window.num_steps)
    return window.num_tokens / window.seconds, window.num_tokens / steps / clients


def cells_of(
    service: Service,
    settings: Settings,
    kind: str,
    plan: Plan,
    prompts: dict[Any, list[Any]],
    until: float,
) -> Iterator[dict[str, Any]]:
    """Every arm in every cell of temperature and number of clients."""
    cells = [(t, c) for t in plan.temperatures for c in plan.clients]
    for number, (temperature, clients) in enumerate(cells):
        ends = time.monotonic() + (until - time.monotonic()) / (len(cells) - number)
        arms = arms_of(service, settings, kind, plan.fixed)
        traffic = Traffic(prompts, temperature, 512)
        for turn in range(plan.turns):
            left_s = (ends - time.monotonic()) / (plan.turns - turn)
            seconds = min(plan.longest_s, left_s / len(arms) / len(ARM_DOMAINS) / 1.15)
            if seconds < plan.shortest_s and turn:
                break
            done: list[dict[str, tuple[float, float]]] = [{} for _ in arms]
            for place, domain in enumerate(ARM_DOMAINS):
                for offset in range(len(arms)):
                    at = (turn + place + offset) % len(arms)
                    done[at][domain] = take_turn(
                        arms[at], traffic, domain, 100 * turn, clients,
                        max(seconds, plan.shortest_s),
                    )  # fmt: skip
            for arm, speeds in zip(arms, done, strict=True):
                arm.turns.append(speeds)
        plain = arms[0]
        for arm in arms:
            yield {
                "temperature": temperature,
                "clients": clients,
                "arm": arm.name,
                "turns": len(arm.turns),
                "tokens_per_s": medians(arm, 0),
                "tokens_per_step": medians(arm, 1),
                "vs_plain": {
                    domain: statistics.median(
                        ours[domain][0] / base[domain][0]
                        for ours, base in zip(arm.turns, plain.turns, strict=True)
                    )
                    for domain in ARM_DOMAINS
                },
            }


def medians(arm: Arm, place: int) -> dict[str, float]:
    """Medians over the turns of one of the two figures, by domain."""
    return {d: statistics.median(turn[d][place] for turn in arm.turns) for d in ARM_DOMAINS}


def draft_seconds(engine: Engine, kind: str, sizes: Sequence[int]) -> dict[str, float]:
    """Seconds that drafting at K = 4 adds to a greedy round, by number of requests."""
    found = {}
    for size in sizes:
        both = [statistics.median(round_seconds(engine, size, who, GATE_DRAFT_K) for _ in range(5))
                for who in (kind, "none")]  # fmt: skip
        found[str(size)] = both[0] - both[1]
    return found


# Running


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured of each drafter."""

    temperatures: tuple[float, ...]
    clients: tuple[int, ...]
    fixed: tuple[int, ...]
    turns: int
    longest_s: float
    shortest_s: float


def run_kind(
    kind: str,
    run_dir: Path,
    device: str,
    plan: Plan,
    asks: Sequence[Ask],
    prompts: dict[Any, list[Any]],
    spend: dict[str, float],
    num_rows: int,
    until: float,
    chosen: Sequence[str] = (),
) -> dict[str, Any]:
    """Collect, train and measure one drafter.

    Args:
        chosen: further settings of both engines, ``a.b=c``.
    """
    figures: dict[str, Any] = {}
    if CATALOG[kind].trainable is not None:
        collecting = collecting_settings(run_dir, device, 128, f"drafter.kind={kind}", *chosen)
        service, _ = build(collecting)
        say(f"{kind}: collecting")
        batch = collecting.engine.max_batch
        collected = collect(service, asks, 512, spend["collect"], batch, ends_early=True)
        del service
        release(torch.device(device))
        figures |= {"collected": collected, **train(collecting, num_rows, spend["train"])}
        release(torch.device(device))
        if spend["parity"]:
            bundle, mixed = parity.newest_bundle(run_dir), parity.by_turns(list(prompts.values()))
            given = kind, bundle, device, max(plan.clients), mixed, spend["parity"], chosen
            figures["parity"] = parity.measure(*given)
            say(f"{kind}: {figures['parity']}")
    settings = settings_for(
        run_dir, device, f"drafter.kind={kind}", f"drafter.max_draft={MAX_DRAFT}",
        f"drafter.suffix.enabled={str(kind == LOOKUP).lower()}", "drafter.on_request=null",
        f"engine.max_batch={max(plan.clients)}", *chosen,
    )  # fmt: skip
    service, _ = build(settings)
    say(f"{kind}: engine ready")
    if kind in service.engine.drafting.neural:
        figures["draft_seconds"] = draft_seconds(service.engine, kind, plan.clients)
    figures["cells"] = []
    for cell in cells_of(service, settings, kind, plan, prompts, until):
        figures["cells"].append(cell)
        say(f"  {json.dumps(cell)}")
    del service
    release(torch.device(device))
    return figures


def main(
    run_dir: Annotated[Path, typer.Option(help="folder of the runs, one for each drafter")],
    out: Out = RESULTS / "drafters.json",
    kinds: str = ",".join(KINDS),
    clients: str = "1,8,32",
    temperatures: str = "0,0.7",
    fixed: Annotated[str, typer.Option(help="values of K beside plain decoding")] = "2,4,7",
    rows: Annotated[int, typer.Option(help="positions that each drafter is trained on")] = ROWS,
    prompts: Annotated[int, typer.Option(help="of each domain, to train on and to answer")] = 3000,
    collect_s: float = 15.0,
    train_s: Annotated[float, typer.Option(help="longest time of one drafter's updates")] = 60.0,
    parity_s: Annotated[
        float, typer.Option(help="in which requests begin that are also simulated; 0: none")
    ] = 5.0,
    turns: int = 3,
    longest_s: Annotated[float, typer.Option(help="of an arm's turn on one domain")] = 1.5,
    shortest_s: Annotated[float, typer.Option(help="of the same")] = 0.4,
    budget_s: Annotated[float, typer.Option(help="seconds in all")] = 540.0,
    device: str = "cuda",
    chosen: Annotated[
        str,
        typer.Option("--set", help="settings of every kind, a.b=c,d.e=f; part of its row's name"),
    ] = "",
) -> None:
    """Train and measure each drafter; those of an earlier result that are not named stay."""
    began = time.monotonic()
    names = known("kinds", kinds.split(","), KINDS)
    plan = Plan(
        tuple(float(t) for t in temperatures.split(",")),
        tuple(int(c) for c in clients.split(",")),
        tuple(int(k) for k in fixed.split(",")),
        turns, longest_s, shortest_s,
    )  # fmt: skip
    more = chosen.split(",") if chosen else []
    settings = collecting_settings(run_dir, device, 128, *more)
    tokenizer = load_tokenizer(target_folder(settings.target, settings.target_cache))
    found = chat_prompts(dict.fromkeys(ARM_DOMAINS, prompts), seed=7, may_lack=True)
    ids = {
        domain: [(prompt_ids(tokenizer, p), p.seed(0)) for p in asked]
        for domain, asked in found.items()
    }
    kept = min(400, prompts // 4)
    mixed = [p for group in zip(*(p[kept:] for p in ids.values()), strict=False) for p in group]
    asks = [Ask(prompt, TRAINED_AT) for prompt, _ in mixed]
    answered = {domain: chats[:kept] for domain, chats in ids.items()}
    say(f"{len(asks)} prompts after {time.monotonic() - began:.1f} s")
    done: dict[str, Any] = json.loads(out.read_text())["kinds"] if out.exists() else {}
    spend = {"collect": collect_s, "train": train_s, "parity": parity_s}
    for number, kind in enumerate(names):
        left_s = budget_s - (time.monotonic() - began)
        until = time.monotonic() + left_s / (len(names) - number)
        num_rows = rows if CATALOG[kind].trainable is not None else None
        name = row_name(kind, settings.target, num_rows, more)
        folder = run_dir / re.sub("[^A-Za-z0-9_.]+", "-", name)
        done[name] = run_kind(
            kind, folder, device, plan, asks, answered, spend, rows, until, more
        )  # fmt: skip
        done[name] |= {"target": model_name(settings.target), "rows": num_rows, "commit": commit()}
        write_result(out, {"trained_at_temperature": TRAINED_AT, "kinds": done})
        source = "python -m benchmarks.real.drafters"
        write_rows("drafters", claims(done), source, out.parent, keeps_unchanged=True)
        took_s = time.monotonic() - began
        say(f"{kind}: done after {took_s:.0f} s\n{table(done)}\n\n{day_0(done)}")


if __name__ == "__main__":
    typer.run(main)
