"""Draft policies on traces of the bundled target: regret, learning, off-policy estimates, time.

    python -m benchmarks.policies                       # about ten minutes on two cores
    python -m benchmarks.policies --seconds 30 --batches 1 --batches 4

The engine decodes sampled text (temperature 0.7) of three domains with a policy that takes every K
with the same probability, at several loads, and writes traces. On them:

- every policy of the catalog is judged as ``policies evaluate`` does;
- ``ltd`` is fitted, from full information and by PPO, on three quarters of the steps, and judged on
  the rest against the best fixed K of each load on those three quarters;
- ``plan`` is timed alone, with 256 requests, in time of the thread; ``--only-plan`` times that of
  the default policy, and keeps all other figures;
- so is what the device does to cut drafts (``benchmarks.harness.allocate_times``), on the device
  that ``--device`` names; ``--only-allocate`` measures nothing else, and keeps all other figures.

The target and its drafter are small and the machine has two cores: figures are of policies against
each other on one log, not of a server. Step times are medians of the traces themselves. Writes
``policies.json`` and ``rows/policies.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.harness.allocate_times import (
    Times,
    allocate_times,
    confidence_times,
    packing_times,
)
from benchmarks.harness.arms import LEARNED
from benchmarks.harness.engines import DEMO, build
from benchmarks.harness.loops import Feed
from benchmarks.harness.results import RESULTS, Out, Row, at_least, at_most, say, write_result
from benchmarks.harness.results import write_rows as write_rows_of
from configs.load import load_settings
from configs.schema import PolicySettings, Settings
from drafters.catalog import CATALOG as DRAFTERS
from drafters.catalog import kind_of
from examples import corpus
from policies.acceptance import AcceptanceModel
from policies.catalog import CATALOG, build_policy
from policies.cli import table
from policies.evaluation import Evaluation, Judged, evaluate
from policies.groups import group_of
from policies.interface import Outcome, RowOutcomes, StepObs
from policies.picture import picture
from policies.replayed_log import ReplayedLog
from policies.run_log import log_of_run, read_steps
from serving.build import load_target
from serving.requests import Request, SamplingParams
from serving.service import Service
from specops import allocation
from trainer.ltd import (
    FullInformation,
    fit_full_information,
    judge_network,
    split,
)
from trainer.ppo import Ppo, fit_ppo

SOURCE = "python -m benchmarks.policies"
DOMAINS: tuple[corpus.Domain, ...] = ("python", "docs", "c")
TEMPERATURE, MAX_TOKENS, PROMPTS = 0.7, 64, 40
MAX_DRAFT = 8
PLAN_STEPS, PLAN_BATCH, PLAN_TURNS = 4000, 256, 5
DEFAULT = "goodput"
AS_BEFORE, CAPPED, MATCHED = "alike", "a fifth near their ends", "with matches"
GROUPED = "with matches, of eight groups"
"""What the requests of a plan are like; most steps are as the one before them."""
SHORT_SHARE = 0.2
GROUPS = np.array([group_of(tenant, t) for tenant in (0, 1, 2, 3) for t in (0.0, 0.7)])
"""Of requests of four tenants, greedy and sampled."""
INDEXES = [kind for kind in DRAFTERS if kind_of(kind).traits.needs_match][:1]
SMALL = 4
"""Largest batch of those at which Learning to Draft is to gain."""
KNOWN_ROUNDS = 1000
"""Rounds after which predicted survival is judged,"""
BINS = 10
"""by tenths of the prediction."""


ANY_K = ("policy.kind=exp3s", "policy.exp3s.mixing=1")
"""A policy for which any K is as likely."""


def settings_of(folder: Path, max_batch: int, policy: Sequence[str] = ANY_K) -> Settings:
    """The bundled drafter alone, without a guard."""
    return load_settings(
        [DEMO],
        [
            f"run_dir={folder}",
            f"engine.max_batch={max_batch}",
            "engine.max_model_len=512",
            "drafter.suffix.enabled=false",
            *policy,
            "policy.guard=false",
            "swap.enabled=false",
        ],
        {},
    )


def requests(settings: Settings, name: str) -> Iterator[Request]:
    """Endless requests, ten of a domain after another ten."""
    tokenizer = load_target(settings).tokenizer
    texts = [corpus.prompts(domain, PROMPTS, seed=7) for domain in DOMAINS]
    bouts = [text[i : i + 10] for i in range(0, PROMPTS, 10) for text in texts]
    ids = [tuple(tokenizer(text)["input_ids"]) for text in itertools.chain(*bouts)]
    for number, prompt in enumerate(itertools.cycle(ids)):
        sampling = SamplingParams(temperature=TEMPERATURE, max_tokens=MAX_TOKENS)
        yield Request(f"{name}-{number}", prompt, sampling)


def generate(service: Service, settings: Settings, batches: Sequence[int], seconds: float) -> None:
    """Decode at every load, and write the traces."""
    recorder = service.recorder
    assert recorder is not None
    recorder.start()
    for batch in batches:
        feed = Feed(service.engine, requests(settings, f"log-{batch}"), batch)
        window = feed.run(seconds)
        feed.finish()
        say(f"batch {batch}: {window.num_steps} steps, {feed.num_finished} requests")
    recorder.close(60)


def plan_times(
    kind: str, settings: PolicySettings, network: bytes, folder: Path, case: str = AS_BEFORE
) -> dict[str, Any]:
    """Microseconds of ``plan`` and ``observe``, of a policy that has decoded a while."""
    weights = folder / "ltd.safetensors"
    weights.write_bytes(network)
    own = settings.model_copy(
        update={"kind": kind, "ltd": settings.ltd.model_copy(update={"weights": weights})}
    )
    has_index = case in (MATCHED, GROUPED)
    drafters = [LEARNED, *(INDEXES if has_index else ())]
    policy = build_policy(own, {one: kind_of(one).traits for one in drafters}, 0, 8)
    plans, learns = [], []
    rng = np.random.default_rng(0)
    caps = _caps(rng, case)
    found_kinds = rng.choice([0, 0, 0, 0, 1, 3, 5, 7, 12], (64, PLAN_BATCH)).tolist()
    matches = [bytes(row) for row in found_kinds]
    accepted = np.minimum(rng.geometric(0.4, (64, PLAN_BATCH)) - 1, 8).tolist()
    groups = _groups(rng) if case == GROUPED else [None] * 64
    for step in range(PLAN_STEPS):
        decision = policy.rest()
        found = None
        if decision is None:
            looks = has_index and policy.wants_matches()
            found = matches[step % 64] if looks else None
            kinds = tuple(drafters) if looks else (LEARNED,)
            obs = StepObs(
                step, PLAN_BATCH, caps[step % 64], found, kinds, 8, 0, groups=groups[step % 64]
            )
            started = time.thread_time()
            decision = policy.plan(obs)
            plans.append(time.thread_time() - started)
        k = decision.draft_k
        lens = [min(k, cap) for cap in caps[step % 64]]
        kept = [min(pair) for pair in zip(accepted[step % 64], lens, strict=True)]
        rows = RowOutcomes(lens, kept, found, groups=groups[step % 64])
        outcome = Outcome(decision, PLAN_BATCH, rows, 0.01 + 0.0005 * k, 0.0, False, 0)
        started = time.thread_time()
        policy.observe(outcome)
        learns.append(time.thread_time() - started)
    half = len(plans) // 2
    return {
        "plan_p50_us": 1e6 * float(np.percentile(plans[half:], 50)),
        "plan_p99_us": 1e6 * float(np.percentile(plans[half:], 99)),
        "observe_p50_us": 1e6 * float(np.percentile(learns[PLAN_STEPS // 2 :], 50)),
    }


def _caps(rng: np.random.Generator, case: str) -> list[bytes]:
    """[64] steps, after which they come again."""
    caps = np.full((64, PLAN_BATCH), 8)
    if case == CAPPED:
        short = rng.random(caps.shape) < SHORT_SHARE
        caps = np.where(short, rng.integers(0, 9, caps.shape), caps)
    return [bytes(row) for row in caps.tolist()]


def _groups(rng: np.random.Generator) -> list[bytes | None]:
    """[64] steps, after which they come again: in each, 16 requests make room for others, and the
    share of greedy ones comes and goes."""
    now = rng.choice(GROUPS, PLAN_BATCH)
    steps: list[bytes | None] = []
    for step in range(64):
        is_greedy = 0.5 + 0.4 * np.sin(step / 32 * np.pi)
        odds = np.where(np.arange(len(GROUPS)) % 2 == 0, is_greedy, 1 - is_greedy) / 4
        now[rng.integers(0, PLAN_BATCH, 16)] = rng.choice(GROUPS, 16, p=odds)
        steps.append(bytes(now.tolist()))
    return steps


def calibration_error(log: ReplayedLog) -> float | None:
    """Expected calibration error of the survival that the default's model predicts for the next
    step, once it has seen some rounds: over all draft positions that were verified, the mean
    difference between predicted and observed survival in bins of the prediction. ``None`` if the
    log has no rounds after those."""
    model = AcceptanceModel(PolicySettings().half_life_rounds, log.traits, log.max_draft)
    predicted: list[float] = []
    was_kept: list[bool] = []
    num_rounds = 0
    for step in log.steps:
        model.tick(step.batch)
        if not step.draft_k:
            continue
        if num_rounds >= KNOWN_ROUNDS:
            survival = np.diff(model.expected_tokens(log.drafter)[0]).tolist()
            for row in step.rows:
                predicted += survival[: row.num_verified]
                was_kept += [row.num_accepted >= j for j in range(1, row.num_verified + 1)]
        num_rounds += len(step.rows)
        rounds = Counter((row.num_verified, row.num_accepted) for row in step.rows)
        del rounds[0, 0]
        if rounds:
            model.observe(log.drafter, {None: rounds}, step.batch)
    if not predicted:
        return None
    bins = np.minimum((np.array(predicted) * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(bins, np.array(predicted) - was_kept)
    return float(np.abs(gaps).sum() / len(predicted))


def learned(log: ReplayedLog) -> dict[str, Any]:
    """Both ways to fit ``ltd``, judged on held-out steps."""
    rows = split(log, 0.25)
    found: dict[str, Any] = {}
    for name, fit in (
        ("full information", lambda: fit_full_information(log, rows, FullInformation())),
        ("PPO", lambda: fit_ppo(log, rows, Ppo())),
    ):
        started = time.monotonic()
        network = fit()
        gate = judge_network(network, log, rows)
        say(f"ltd, {name}: {gate.to_line()}")
        found[name] = {
            **asdict(gate), "gain": gate.gain, "passed": gate.passed,
            "fit_s": time.monotonic() - started, "network": network.to_bytes(),
        }  # fmt: skip
        is_small = np.array([step.batch <= SMALL for step in log.steps])
        if is_small.any() and not is_small.all():
            small = judge_network(network, log.rows(is_small), rows[is_small])
            say(f"ltd, {name}, batch 1 to {SMALL}: {small.to_line()}")
            found[name]["small"] = {**asdict(small), "gain": small.gain, "passed": small.passed}
    return found


def headroom(log: ReplayedLog, settings: PolicySettings) -> dict[str, float | None]:
    """Share of the gap between the best fixed K and the oracle that policies close at batch 1;
    empty if the log has no such steps."""
    is_single = np.array([step.batch == 1 for step in log.steps])
    if not is_single.any():
        return {}
    found = evaluate(log.rows(is_single), settings, (DEFAULT, "ltd"))
    return {x.name: x.headroom for x in found.policies if x.name in (DEFAULT, "ltd")}


def rows_of(found: Evaluation, results: dict[str, Any]) -> Iterator[Row]:
    """The claims."""
    where = "bundled target, temperature 0.7, batch " + ", ".join(map(str, results["batches"]))
    for one in found.policies:
        if not one.name.startswith("fixed"):
            yield regret_row(where, one)
    for name, gate in results["ltd"].items():
        yield at_least(
            f"{where}: ltd by {name}, held-out steps",
            "speed over the best fixed K of each load",
            1 + gate["gain"],
            1.02,
        )
        if "small" in gate:
            yield at_least(
                f"bundled target, temperature 0.7, batch 1 to {SMALL}: ltd by {name}, held-out "
                f"steps",
                "speed over the best fixed K of each load",
                1 + gate["small"]["gain"],
                1.02,
            )
    for name, share in results["headroom"].items():
        if share is not None:
            yield at_least(
                f"bundled target, temperature 0.7, batch 1: {name}, replayed",
                "share of the gap between best fixed K and oracle",
                share,
                0.3,
            )
    yield from plan_rows(results["plan"])
    if results["calibration_error"] is not None:
        yield at_most(
            where,
            "expected calibration error of predicted survival after 1,000 rounds",
            results["calibration_error"],
            0.02,
        )


def plan_rows(plans: dict[str, Any]) -> Iterator[Row]:
    """What deciding takes."""
    for kind, times in plans.items():
        yield at_most(f"{kind}, 256 requests", "plan, us, p99", times["plan_p99_us"], 50)


def allocate_rows(times: Times, device: str) -> Iterator[Row]:
    """What cutting takes. The goal is for GPUs: a CPU's step takes a hundred times as long."""
    for score, us in times.items():
        yield at_most(
            f"allocate by {score}, 256 requests, K = 8, {device}",
            "scores and lengths, us, median",
            us,
            30 if device == "cuda" else None,
        )


def beside_rows(kind: str, times: Times, device: str) -> Iterator[Row]:
    """What else a round that is cut takes, for which there is no goal."""
    for size, us in times.items():
        yield at_most(f"{kind}, {size}, {device}", "us, median", us, None)


def publish_allocate(device: str, folder: Path) -> Times:
    """Measure cuts and what belongs to them, on a GPU also by the definitions in torch, and write
    figures and rows beside the others."""
    times = allocate_times(device)
    beside = {
        "confidence of a pass": confidence_times(device),
        "packed rows": packing_times(device),
    }
    found: dict[str, Any] = {"device": device, "microseconds": times, "beside": beside}
    if device == "cuda":
        found["definition"] = {
            "microseconds": allocate_times(device, allocation),
            "beside": {
                "confidence of a pass": confidence_times(device, allocation),
                "packed rows": packing_times(device, allocation),
            },
        }
    write_result(folder / f"allocate_{device}.json", found)
    source = f"{SOURCE} --only-allocate --device {device}"
    rows = list(allocate_rows(times, device))
    for kind, ones in beside.items():
        rows += beside_rows(kind, ones, device)
    write_rows_of("policies", rows, source, folder)
    for row in rows:
        say(f"{row.row}: {row.value} us")
    return times


def publish_plans(folder: Path) -> None:
    """Time plans of the default policy in several turns, and write the medians and their rows."""
    turns: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(PLAN_TURNS):
            for case in (AS_BEFORE, CAPPED, MATCHED, GROUPED):
                times = plan_times(DEFAULT, PolicySettings(), b"", Path(name), case)
                turns.setdefault(f"{DEFAULT}, {case}", []).append(times)
    found = {
        case: {what: float(np.median([one[what] for one in own])) for what in own[0]}
        for case, own in turns.items()
    }
    write_result(folder / "plans.json", {"plan": found, "turns": turns})
    write_rows_of("policies", plan_rows(found), f"{SOURCE} --only-plan", folder)
    for case, times in found.items():
        say(f"{case}: plan {times['plan_p50_us']:.1f} us, p99 {times['plan_p99_us']:.1f}")


def regret_row(where: str, one: Judged) -> Row:
    """Only the default is held to a goal."""
    speed = 1 - one.regret_fixed
    goal = 0.98 if one.name == DEFAULT else None
    return at_least(
        f"{where}: {one.name}, replayed", "speed over the best fixed K of each load", speed, goal
    )


def main(
    seconds: Annotated[float, typer.Option(help="seconds of traces at each load")] = 60.0,
    batches: Annotated[list[int] | None, typer.Option(help="loads")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda: where cutting is timed")] = "cpu",
    only_allocate: Annotated[
        bool, typer.Option("--only-allocate", help="time cutting, and nothing else")
    ] = False,
    only_plan: Annotated[
        bool, typer.Option("--only-plan", help="time plans of the default, and nothing else")
    ] = False,
    out: Out = RESULTS / "policies.json",
) -> None:
    """Make traces, judge every policy on them, and time what deciding takes."""
    torch.set_num_threads(1)
    if not only_plan:
        publish_allocate(device, out.parent)
    if not only_allocate:
        publish_plans(out.parent)
    if only_allocate or only_plan:
        return
    loads = batches or [1, 4, 8]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = settings_of(folder, max(loads))
        service, _ = build(settings)
        generate(service, settings, loads, seconds)
        steps, _ = read_steps(settings.buffer.url, folder, 1_000_000)
        log = log_of_run(steps, LEARNED, folder, "traces", settings.drafter.max_draft)
        fitted = learned(log)
        networks = {method: one.pop("network") for method, one in fitted.items()}
        weights = folder / "fitted.safetensors"
        weights.write_bytes(networks["full information"])
        judged_settings = PolicySettings.model_validate({"ltd": {"weights": weights}})
        found = evaluate(log, judged_settings)
        for line in table(found):
            print(line)
        closed = headroom(log, judged_settings)
        network = networks["full information"]
        others = (kind for kind in CATALOG if kind != DEFAULT)
        plans = {kind: plan_times(kind, PolicySettings(), network, folder) for kind in others}
        service.engine.stop()
    results = {
        "batches": loads,
        "seconds": seconds,
        "evaluation": asdict(found),
        "ltd": fitted,
        "headroom": closed,
        "calibration_error": calibration_error(log),
        "plan": plans,
    }
    write_result(out, results)
    out.with_suffix(".svg").write_text(picture(found))
    write_rows_of("policies", rows_of(found, results), SOURCE, out.parent)
    say(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
