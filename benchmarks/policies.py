"""Draft policies on traces of the bundled target: regret, learning, off-policy estimates, time.

    python -m benchmarks.policies                       # about ten minutes on two cores
    python -m benchmarks.policies --seconds 30 --batches 1 --batches 4

The engine decodes sampled text (temperature 0.7) of three domains with a policy that takes every K
with the same probability, at several loads, and writes traces. On them:

- every policy of the catalog is judged as ``policies evaluate`` does;
- ``ltd`` is fitted, from full information and by PPO, on three quarters of the steps, and judged on
  the rest against the best fixed K of each load on those three quarters;
- predicted speeds of fixed K, doubly robust, are compared with live turns of the same K on the same
  engine afterwards, interleaved, relative to plain decoding at the same load;
- ``plan`` is timed alone, with 256 requests, in time of the thread.

The target and its drafter are small and the machine has two cores: figures are of policies against
each other on one log, not of a server. Step times are medians of the traces themselves. Writes
``policies.json`` and ``rows/policies.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.harness.arms import LEARNED
from benchmarks.harness.engines import DEMO, build
from benchmarks.harness.loops import Feed, clear
from benchmarks.harness.policy import PolicySwitch
from benchmarks.harness.results import RESULTS, Out, Row, at_least, at_most, say, write_result
from benchmarks.harness.results import write_rows as write_rows_of
from configs.load import load_settings
from configs.schema import PolicySettings, Settings
from drafters.catalog import kind_of
from examples import corpus
from policies.catalog import CATALOG, build_policy
from policies.cli import table
from policies.evaluation import Evaluation, Judged, evaluate, off_policy_rate
from policies.fixed import FixedPolicy
from policies.interface import Outcome, RowOutcomes, StepObs
from policies.logged import hazards_of
from policies.picture import picture
from policies.replayed_log import ReplayedLog
from policies.run_log import log_of_run, read_steps
from serving.build import load_target
from serving.engine.loop import Engine
from serving.requests import Request, SamplingParams
from serving.service import Service
from trainer.ltd import (
    FullInformation,
    Ppo,
    fit_full_information,
    fit_ppo,
    judge_network,
    split,
)

SOURCE = "python -m benchmarks.policies"
DOMAINS: tuple[corpus.Domain, ...] = ("python", "docs", "c")
TEMPERATURE, MAX_TOKENS, PROMPTS = 0.7, 64, 40
LIVE_KS, LIVE_TURNS, LIVE_S = (0, 1, 2, 4, 8), 4, 3.0
PLAN_STEPS, PLAN_BATCH = 4000, 256
KNOWN_ROUNDS = 1000
"""Rounds after which predicted survival is judged."""


def settings_of(folder: Path, max_batch: int) -> Settings:
    """Any K as likely, with the bundled drafter alone."""
    return load_settings(
        [DEMO],
        [
            f"run_dir={folder}",
            f"engine.max_batch={max_batch}",
            "engine.max_model_len=512",
            "drafter.suffix.enabled=false",
            "policy.kind=exp3s",
            "policy.exp3s.mixing=1",
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


def live(
    engine: Engine, switch: PolicySwitch, settings: Settings, batch: int, name: str
) -> dict[int, float]:
    """Tokens per second of steps without prompts, by K, of interleaved turns."""
    totals = {k: np.zeros(2) for k in LIVE_KS}
    for turn in range(LIVE_TURNS):
        ks = LIVE_KS if turn % 2 == 0 else LIVE_KS[::-1]
        for k in ks:
            switch.play(FixedPolicy(LEARNED, k, needs_match=False))
            feed = Feed(engine, requests(settings, f"{name}-{turn}-{k}"), batch)
            feed.run(LIVE_S)
            steps = [step for step in switch.steps if step.batch == batch]
            tokens = sum(step.batch + step.num_accepted for step in steps)
            totals[k] += tokens, sum(step.seconds for step in steps)
            clear(engine)
    return {k: float(tokens / seconds) for k, (tokens, seconds) in totals.items()}


def estimates(log: ReplayedLog, batch: int) -> dict[int, dict[str, float]]:
    """Doubly robust speed of each K at one load, with its interval."""
    part = log.rows(np.array([step.batch == batch for step in log.steps]))
    found = {}
    for k in LIVE_KS:
        one = off_policy_rate(part, np.full(len(part.steps), k, np.int64))
        if one is not None:
            found[k] = asdict(one)
    return found


def plan_times(kind: str, settings: PolicySettings, network: bytes, folder: Path) -> dict[str, Any]:
    """Microseconds of ``plan`` and ``observe``, of a policy that has decoded a while."""
    weights = folder / "ltd.safetensors"
    weights.write_bytes(network)
    own = settings.model_copy(
        update={"kind": kind, "ltd": settings.ltd.model_copy(update={"weights": weights})}
    )
    policy = build_policy(own, {LEARNED: kind_of(LEARNED).traits}, 0, 8)
    plans, learns = [], []
    caps = (8,) * PLAN_BATCH
    rng = np.random.default_rng(0)
    accepted = np.minimum(rng.geometric(0.4, (64, PLAN_BATCH)) - 1, 8).tolist()
    for step in range(PLAN_STEPS):
        obs = StepObs(step, PLAN_BATCH, caps, None, (LEARNED,), 8, 0)
        decision = policy.rest()
        if decision is None:
            started = time.thread_time()
            decision = policy.plan(obs)
            plans.append(time.thread_time() - started)
        k = decision.draft_k
        kept = [min(one, k) for one in accepted[step % 64]]
        outcome = Outcome(
            decision, PLAN_BATCH, RowOutcomes([k] * PLAN_BATCH, kept), 0.01 + 0.0005 * k, 0.0,
            False, 0,
        )  # fmt: skip
        started = time.thread_time()
        policy.observe(outcome)
        learns.append(time.thread_time() - started)
    half = len(plans) // 2
    return {
        "plan_p50_us": 1e6 * float(np.percentile(plans[half:], 50)),
        "plan_p99_us": 1e6 * float(np.percentile(plans[half:], 99)),
        "observe_p50_us": 1e6 * float(np.percentile(learns[PLAN_STEPS // 2 :], 50)),
    }


def survival_error(log: ReplayedLog) -> float:
    """Largest difference over positions between survival as predicted after some rounds and as it
    was in the same number of rounds after them, at the load with the most steps."""
    sizes = log.sizes
    steps = list(np.array(log.steps, dtype=object)[sizes == np.bincount(sizes).argmax()])
    num = np.cumsum([len(step.rows) for step in steps])
    first = int(np.searchsorted(num, KNOWN_ROUNDS)) + 1
    before, _ = hazards_of(steps[:first], log.max_draft)
    after, _ = hazards_of(steps[first:], log.max_draft)
    return float(np.abs(np.cumprod(before) - np.cumprod(after)).max())


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
    return found


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
    for kind, times in results["plan"].items():
        yield at_most(f"{kind}, 256 requests", "plan, us, p99", times["plan_p99_us"], 50)
    yield at_most(
        where,
        "largest error of predicted survival after 1,000 rounds",
        results["survival_error"],
        0.02,
    )
    yield at_most(
        where,
        "largest error of off-policy speed over plain, against live turns",
        results["worst_live_error"],
        0.02,
    )


def regret_row(where: str, one: Judged) -> Row:
    """Only the default is held to a goal."""
    speed = 1 - one.regret_fixed
    goal = 0.98 if one.name == "goodput" else None
    return at_least(
        f"{where}: {one.name}, replayed", "speed over the best fixed K of each load", speed, goal
    )


def main(
    seconds: Annotated[float, typer.Option(help="seconds of traces at each load")] = 60.0,
    batches: Annotated[list[int] | None, typer.Option(help="loads")] = None,
    out: Out = RESULTS / "policies.json",
) -> None:
    """Make traces, judge every policy on them, and compare estimates with live turns."""
    torch.set_num_threads(1)
    loads = batches or [1, 4, 8]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = settings_of(folder, max(loads))
        service, switch = build(settings)
        generate(service, settings, loads, seconds)
        steps = read_steps(settings.buffer.url, folder, 1_000_000)
        log = log_of_run(steps, LEARNED, folder, "traces", settings.drafter.max_draft)
        fitted = learned(log)
        networks = {method: one.pop("network") for method, one in fitted.items()}
        weights = folder / "fitted.safetensors"
        weights.write_bytes(networks["full information"])
        judged_settings = PolicySettings.model_validate({"ltd": {"weights": weights}})
        found = evaluate(log, judged_settings)
        for line in table(found):
            print(line)
        alive = {
            batch: {
                "live": live(service.engine, switch, settings, batch, f"live-{batch}"),
                "estimated": estimates(log, batch),
            }
            for batch in loads
        }
        plans = {
            kind: plan_times(kind, PolicySettings(), networks["full information"], folder)
            for kind in CATALOG
        }
        service.engine.stop()
    results = {
        "batches": loads,
        "seconds": seconds,
        "evaluation": asdict(found),
        "ltd": fitted,
        "live": alive,
        "worst_live_error": worst_error(alive),
        "survival_error": survival_error(log),
        "plan": plans,
    }
    write_result(out, results)
    out.with_suffix(".svg").write_text(picture(found))
    write_rows_of("policies", rows_of(found, results), SOURCE, out.parent)
    say(f"written: {out}")


def worst_error(alive: dict[int, dict[str, Any]]) -> float:
    """Largest relative difference, over loads and K, between estimated and live speed over plain
    decoding."""
    errors = [
        abs(one["estimated"][k]["value"] / one["estimated"][0]["value"]
            / (one["live"][k] / one["live"][0]) - 1)
        for one in alive.values()
        for k in LIVE_KS
        if k and k in one["estimated"]
    ]  # fmt: skip
    return max(errors)


if __name__ == "__main__":
    typer.run(main)
