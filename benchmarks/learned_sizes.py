"""What a learned verification budget brings over a learned K alone, in replay and live.

    python -m benchmarks.learned_sizes                     # about twenty minutes on two cores
    python -m benchmarks.learned_sizes --seconds 20 --live-seconds 0 --batches 1 --batches 4

The bundled target decodes sampled text of three domains, 32 requests at a time, drafts K = 8 in
every round, and notes the drafter's figures of every position. So every K, and every share of the
draft tokens that could have been verified, is scored exactly. What a round brings does not depend
on how many others are decoded beside it, so a log of each load is made of the same rounds: as many
requests as the batch has, each followed by the next one when it ends. Times are of a profile of an
engine at each load; those of packed rows follow from it.

On three quarters of the steps ``ltd`` is fitted with K alone and with a size, from full information
with four shares, those of a GPU, and by PPO; the best fixed K and the best fixed pairs of K and
share of each load, of four shares and of eight, are chosen there, too. All are judged on the last
quarter, and so are ``goodput`` and ``ragged``, which learn on their way.

Then engines decode in turns of some steps, in random order: the best fixed K, ``ltd`` with K alone
and with a size, the best fixed pair, ``ragged``, and a log in which the pair takes any K and any
budget in half of the steps. Live speeds are tokens over time of the engine's thread, because other
work that shares the machine makes wall times of neighbouring turns differ by more than any K does.
On the log the pair's gain over the best fixed K is estimated off-policy. Writes
``learned_sizes.json`` and ``rows/learned_sizes.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.harness.arms import LEARNED
from benchmarks.harness.engines import build
from benchmarks.harness.loops import Feed
from benchmarks.harness.results import (
    RESULTS,
    Out,
    Row,
    at_least,
    at_most,
    say,
    write_result,
    write_rows,
)
from benchmarks.policies import MAX_DRAFT, generate, plan_times, requests, settings_of
from benchmarks.policy_comparison import EVERY_K, PROFILE_CONTEXT, PROFILE_REPEATS
from buffer.traces import traces_in
from configs.schema import PolicySettings, Settings
from drafters.catalog import kind_of
from policies.budgets import BudgetScores, allocation_of
from policies.catalog import build_policy
from policies.cut_estimate import off_policy_gain_of
from policies.evaluation import best_ks, speed_of
from policies.interface import CostSample, Decision, DraftPolicy, Outcome, StepObs
from policies.logged import LoggedRow, LoggedStep, steps_of
from policies.network import Network
from policies.off_policy import Reward, throughput
from policies.played_pair import PairPlay
from policies.replayed_log import ReplayedLog, play
from policies.run_log import open_traces, read_steps
from serving.profile import profile_steps
from trainer.ltd import FullInformation, compare, fit_full_information, lower_bound, split
from trainer.ltd_networks import played
from trainer.ppo import Ppo
from trainer.sizes import Fitted, fit_both

SOURCE = "python -m benchmarks.learned_sizes"
LOADS = [1, 4, 8, 32]
MOST_STEPS = {1: 1500, 4: 1000, 8: 800, 32: 400}
"""Steps of a load that are used; they are about as many rounds as there are."""
TRACED_BATCH = 32
QUARTERS, EIGHTHS = 4, 8
HELD_OUT = 0.25
PPO_STEPS = 6144
"""Of each stage: a sixteenth of the paper's shortest one."""
TURN_STEPS, SKIPPED = 16, 3
"""Steps of a live turn, and those that still show what the turn before did."""
FIXED, ALONE, PAIR = "best fixed K", "ltd, K alone", "ltd, K and size"
TRIED = "ltd, K and size by PPO"
FIXED_PAIR, FIXED_EIGHTH = "best fixed K and share", "best fixed K and share, eighths"
RAGGED, GOODPUT, LOG = "ragged", "goodput", "log"


@dataclass(frozen=True, slots=True)
class Fits:
    """All that was fitted to the log."""

    alone: Network
    pair: Fitted
    tried: Fitted


def rounds_of(seconds: float, folder: Path) -> list[list[LoggedRow]]:
    """Rounds of each request whose drafts were whole, in order."""
    settings = settings_of(folder, TRACED_BATCH, EVERY_K)
    service, _ = build(settings)
    generate(service, settings, [TRACED_BATCH], seconds)
    service.engine.stop()
    traces = traces_in(open_traces(settings.buffer.url, folder))
    found = [[step.rows[0] for step in steps_of([trace])] for trace in traces]
    return [
        [row for row in rows if row.considered is not None and row.num_verified == MAX_DRAFT]
        for rows in found
    ]


def steps_at(batch: int, requests: Sequence[Sequence[LoggedRow]]) -> list[LoggedStep]:
    """Steps of a batch that is full of these requests, one after another. K as logged is drawn, so
    that features of the log are those of any policy."""
    rng, waiting = random.Random(batch), iter(requests)
    lanes: list[list[LoggedRow]] = [[] for _ in range(batch)]
    steps: list[LoggedStep] = []
    while len(steps) < MOST_STEPS.get(batch, 1000):
        for at in range(batch):
            while not lanes[at]:
                following = next(waiting, None)
                if following is None:
                    return steps
                lanes[at] = list(reversed(following))
        rows = tuple(lane.pop() for lane in lanes)
        k = rng.randint(1, MAX_DRAFT)
        steps.append(LoggedStep(LEARNED, k, batch, 1.0, "", 0, 0.01, rows, is_timed=False))
    return steps


def profile_of(batch: int, folder: Path) -> list[CostSample]:
    """What steps take at a load, and at batch 1."""
    service, _ = build(settings_of(folder, batch, EVERY_K))
    samples = profile_steps(service.engine.parts, PROFILE_REPEATS, PROFILE_CONTEXT)
    service.engine.stop()
    return samples


def fitted_to(log: ReplayedLog, rows: Any, four: BudgetScores) -> tuple[Fits, dict[str, float]]:
    """Fit everything, and how long each took."""
    took, how = {}, FullInformation()

    def timed(name: str, fit: Any) -> Any:
        started = time.monotonic()
        found = fit()
        took[name] = round(time.monotonic() - started, 1)
        if isinstance(found, Fitted):
            for line in found.to_lines():
                say(f"{name}: {line}")
        return found

    return Fits(
        timed(ALONE, lambda: fit_full_information(log, rows, how)),
        timed(PAIR, lambda: fit_both(log, rows, four, how)),
        timed(TRIED, lambda: fit_both(log, rows, four, Ppo(total_steps=PPO_STEPS))),
    ), took


def best_pairs(
    log: ReplayedLog, budgets: BudgetScores, rows: Any, where: Any
) -> tuple[PairPlay, dict[int, tuple[int, int]]]:
    """The best K and share of each load on the fitted steps, played on others."""
    ks, shares = np.zeros((2, len(log.steps)), np.int64)
    best: dict[int, tuple[int, int]] = {}
    for size in np.unique(log.sizes).tolist():
        own = log.sizes == size
        fitted = own & rows
        rates = budgets.tokens[fitted].sum(0) / budgets.seconds[fitted].sum(0)
        k, share = np.unravel_index(int(rates.argmax()), rates.shape)
        ks[own], shares[own] = k, share
        best[2**size] = int(k), int(share)
    return PairPlay.of(log, ks, shares, budgets).rows(where), best


def online(kind: str, log: ReplayedLog, where: Any) -> PairPlay:
    """A policy that learns on its way, over all steps, judged on some."""
    policy = build_policy(PolicySettings(kind=kind, drafter=LEARNED), log.traits, 0, log.max_draft)
    found = play(policy, log)
    tokens, _, seconds = found.columns(log)
    whole = PairPlay.of(log, found.ks)
    return replace(whole, tokens=tokens, seconds=seconds).rows(where)


def replayed(
    log: ReplayedLog, rows: Any, fits: Fits, four: BudgetScores, eight: BudgetScores
) -> tuple[dict[str, Any], dict[int, tuple[int, int]], dict[int, int]]:
    """Speeds on held-out steps by load, and the best fixed choices by load."""
    where = ~rows
    held_out = log.rows(where)
    fixed_ks = best_ks(held_out, log.rows(rows))
    pairs, best = best_pairs(log, four, rows, where)
    plays = {
        FIXED: PairPlay.of(held_out, fixed_ks),
        ALONE: played(fits.alone, log).rows(where),
        PAIR: played(fits.pair.network, log, four).rows(where),
        TRIED: played(fits.tried.network, log, four).rows(where),
        FIXED_PAIR: pairs,
        FIXED_EIGHTH: best_pairs(log, eight, rows, where)[0],
        GOODPUT: online(GOODPUT, log, where),
        RAGGED: online(RAGGED, log, where),
    }
    at_sizes = {2**size: held_out.sizes == size for size in np.unique(held_out.sizes).tolist()}
    found: dict[str, Any] = {}
    for name, one in plays.items():
        found[name] = {
            "all": compared(held_out, one, plays),
            **{
                str(batch): compared(
                    held_out.rows(own), one.rows(own), {n: p.rows(own) for n, p in plays.items()}
                )
                for batch, own in at_sizes.items()
            },
        }
        total = found[name]["all"]
        say(f"replayed, {name}: {total['over_fixed']:.4f} of the best fixed K")
    ks = {int(batch): int(fixed_ks[own][0]) for batch, own in at_sizes.items()}
    for name in (GOODPUT, RAGGED):  # what these verify is no share of a size
        for one in found[name].values():
            one["verified"] = one["shares"] = None
    return found, best, ks


def compared(log: ReplayedLog, one: PairPlay, plays: Mapping[str, PairPlay]) -> dict[str, Any]:
    """One policy beside the best fixed K and beside K alone."""
    rate = speed_of(log, one.tokens, one.seconds)
    found: dict[str, Any] = {"rate": rate, "mean_k": float(one.ks.mean())}
    for key, name in (("over_fixed", FIXED), ("over_alone", ALONE)):
        other = plays[name]
        found[key] = rate / speed_of(log, other.tokens, other.seconds)
        found[f"{key}_low"] = lower_bound(log, one, other)
    found["verified"] = one.verified
    drafted = one.shares[one.ks > 0]
    counts = np.bincount(drafted, minlength=one.num_shares) / max(len(drafted), 1)
    found["shares"] = counts.round(4).tolist()
    found["ks"] = (np.bincount(one.ks, minlength=MAX_DRAFT + 1) / len(one.ks)).round(4).tolist()
    return found


class Always:
    """Draws nothing and learns nothing: one K and one share."""

    kind = "always"
    wants_profile = False

    def __init__(self, k: int, share: int, num_shares: int) -> None:
        self._k, self._share, self._num_shares = k, share, num_shares

    def rest(self) -> Decision | None:
        return None

    def wants_matches(self) -> bool:
        return False

    def plan(self, obs: StepObs) -> Decision:
        k = obs.longest(self._k)
        if not k:
            return Decision("none", 0, 1.0, False, self.kind, self.kind)
        cut = allocation_of(self._share, self._num_shares, obs.batch, k)
        allocation = cut if cut.may_cut else None
        return Decision(LEARNED, k, 1.0, False, self.kind, self.kind, allocation)

    def observe(self, outcome: Outcome) -> None: ...

    def calibrate(self, samples: Sequence[CostSample]) -> None: ...

    def on_swap(self, drafter: str, version: int, calibration: dict[str, Any]) -> None: ...

    def figures(self) -> dict[str, Any]:
        return {}


class Noting:
    """Passes everything on to a policy, and notes outcomes with the time of this thread."""

    def __init__(self, inner: DraftPolicy) -> None:
        self._inner = inner
        self.outcomes: list[Outcome] = []
        self._began_s = time.thread_time()

    def rest(self) -> Decision | None:
        # A step begins here; prompts are computed before it or behind it.
        self._began_s = time.thread_time()
        return self._inner.rest()

    def observe(self, outcome: Outcome) -> None:
        taken_s = time.thread_time() - self._began_s
        self.outcomes.append(replace(outcome, step_s=taken_s))
        self._inner.observe(outcome)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def learned(settings: Settings, network: Network, folder: Path, share: float) -> DraftPolicy:
    """``ltd`` with a network, without a guard."""
    path = folder / f"{id(network)}.safetensors"
    path.write_bytes(network.to_bytes())
    ltd = settings.policy.ltd.model_copy(update={"weights": path})
    own = settings.policy.model_copy(
        update={"kind": "ltd", "ltd": ltd, "random_share": share, "guard": False}
    )
    return _built(own)


def _built(own: PolicySettings) -> DraftPolicy:
    return build_policy(own, {LEARNED: kind_of(LEARNED).traits}, 0, MAX_DRAFT)


def live(
    batch: int,
    arms: Mapping[str, DraftPolicy],
    samples: Sequence[CostSample],
    seconds: float,
    folder: Path,
    table: ReplayedLog,
) -> tuple[dict[str, Any], list[LoggedStep]]:
    """Tokens per second of every arm in turns, and the steps of the arm that makes a log."""
    settings = settings_of(folder, batch, EVERY_K)
    service, switch = build(settings)
    assert service.recorder is not None
    service.recorder.start()
    feed = Feed(service.engine, requests(settings, f"live-{batch}"), batch)
    for policy in arms.values():
        policy.calibrate(samples)
    noted: dict[str, list[list[Outcome]]] = {name: [] for name in arms}
    luck, order = random.Random(batch), [*arms, LOG]
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        luck.shuffle(order)
        for name in order:
            noting = Noting(arms[name])
            switch.play(noting)  # type: ignore[arg-type]
            while len(noting.outcomes) < TURN_STEPS:
                feed.step()
            noted[name].append(noting.outcomes[SKIPPED:])
    feed.finish()
    service.recorder.close(60)
    service.engine.stop()
    steps, _ = read_steps(settings.buffer.url, folder, 1_000_000)
    own = [s for s in steps if s.batch == batch and s.policy == "ltd" and s.propensity < 1]
    rates = {name: live_rate(turns, batch) for name, turns in noted.items()}
    base = rates[FIXED]
    for name, one in rates.items():
        one["over_fixed"] = one["rate"] / base["rate"]
        one["measured_over_table"] = times_beside(noted[name], batch, table)
        bounds = "" if one["low"] is None else f" ({one['low']:.0f} to {one['high']:.0f} tokens/s)"
        say(f"live, batch {batch}, {name}: {one['over_fixed']:.3f} of the best fixed K{bounds}")
    return rates, own


def live_rate(turns: Sequence[Sequence[Outcome]], batch: int) -> dict[str, Any]:
    """Tokens per second of steps without prompts; without an interval if they are few."""
    kept = [
        one for turn in turns for one in turn if one.batch == batch and not one.has_prefill
    ]  # fmt: skip
    tokens = np.array([one.batch * one.rows.tokens_each for one in kept])
    taken = np.array([one.step_s for one in kept])
    found = throughput(Reward(tokens), Reward(taken), np.ones(len(kept)))
    told = None if found is None else found.estimate()
    ks = [one.decision.draft_k for one in kept]
    return {
        "rate": float(tokens.sum() / taken.sum()), "num_steps": len(kept),
        "low": None if told is None else told.low, "high": None if told is None else told.high,
        "mean_k": float(np.mean(ks)),
    }  # fmt: skip


def times_beside(
    turns: Sequence[Sequence[Outcome]], batch: int, log: ReplayedLog
) -> dict[str, float]:
    """Median time of steps relative to what the table expects, of whole and of packed rounds."""
    ratios: dict[str, list[float]] = {}
    for turn in turns:
        for one in turn:
            k, allocation = one.decision.draft_k, one.decision.allocation
            if one.batch != batch or one.has_prefill or k > MAX_DRAFT:
                continue
            wanted = float(log.table.seconds(batch)[k])
            is_cut = allocation is not None and allocation.budget_each is not None
            if is_cut and allocation is not None:
                each = allocation.budget(batch, k) / batch
                wanted -= log.table.saved(batch, k, each)
            ratios.setdefault("packed" if is_cut else "whole", []).append(one.step_s / wanted)
    return {name: round(median(found), 3) for name, found in ratios.items()}


def estimated(
    steps: Sequence[LoggedStep], samples: Sequence[CostSample], network: Network, k: int
) -> dict[str, Any] | None:
    """The pair's gain over the best fixed K, off-policy; ``None``: nothing was drafted."""
    if not any(step.draft_k for step in steps):
        return None
    log = ReplayedLog.of(steps, LEARNED, samples, MAX_DRAFT)
    budgets = BudgetScores.of(log, QUARTERS)
    ours = played(network, log, budgets)
    theirs = PairPlay.of(log, np.full(len(log.steps), k))
    gate = compare(log, ours, theirs)
    found = off_policy_gain_of(log, ours, theirs)
    own = None if found is None else asdict(found)
    return {"off_policy": own, "replayed": gate.rate / gate.fixed_rate, "num_steps": len(log.steps)}


def rows_of(results: Mapping[str, Any]) -> Iterator[Row]:
    """The claims."""
    where = "bundled target, temperature 0.7"
    for name, by_load in results["replayed"].items():
        if name == FIXED:
            continue
        for load, one in by_load.items():
            at = f"batch {load}" if load != "all" else "all loads"
            goal = 1.02 if name in (ALONE, PAIR) else None
            measure = "replayed speed over the best fixed K, held-out steps"
            yield at_least(f"{where}, {at}: {name}", measure, one["over_fixed"], goal)
    for load, rates in results["live"].items():
        for name, one in rates.items():
            if name not in (FIXED, LOG):
                measure = "live speed over the best fixed K"
                yield at_least(f"{where}, batch {load}: {name}", measure, one["over_fixed"], None)
    for name, times in results["plan"].items():
        yield at_most(f"{name}, 256 requests", "plan, us, p99", times["plan_p99_us"], 50)


def main(
    seconds: Annotated[float, typer.Option(help="seconds of traces")] = 120.0,
    live_seconds: Annotated[float, typer.Option(help="seconds of live turns at each load")] = 60.0,
    batches: Annotated[list[int] | None, typer.Option(help="loads")] = None,
    out: Out = RESULTS / "learned_sizes.json",
) -> None:
    """Make traces, fit, replay, and decode live in turns."""
    torch.set_num_threads(1)
    loads = batches or LOADS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        decoded = rounds_of(seconds, folder / "traces")
        say(f"{sum(map(len, decoded))} rounds of {len(decoded)} requests")
        samples = [one for load in loads for one in profile_of(load, folder / f"profile-{load}")]
        steps = [step for load in loads for step in steps_at(load, decoded)]
        log = ReplayedLog.of(steps, LEARNED, samples, MAX_DRAFT)
        rows = split(log, HELD_OUT)
        four, eight = (BudgetScores.of(log, num) for num in (QUARTERS, EIGHTHS))
        fits, took = fitted_to(log, rows, four)
        found, best, ks = replayed(log, rows, fits, four, eight)
        plans = {
            name: plan_times("ltd", PolicySettings(), network.to_bytes(), folder)
            for name, network in ((ALONE, fits.alone), (PAIR, fits.pair.network))
        }
        results: dict[str, Any] = {
            "batches": loads, "seconds": seconds, "num_rounds": sum(map(len, decoded)),
            "num_steps": {load: sum(s.batch == load for s in steps) for load in loads},
            "fit_s": took, "best_fixed_k": ks, "best_fixed_pair": best,
            "stages": {
                which: [asdict(stage) for stage in one.stages]
                for which, one in ((PAIR, fits.pair), (TRIED, fits.tried))
            },
            "hazards": log.hazards.round(4).tolist(), "replayed": found, "plan": plans,
            "live": {}, "off_policy": {}, "profile": [asdict(sample) for sample in samples],
        }  # fmt: skip
        publish(results, out)
        for load in loads if live_seconds else ():
            size = 2 ** (load.bit_length() - 1)
            arms = arms_of(fits, ks[size], best[size], settings_of(folder, load, EVERY_K), folder)
            rates, logged = live(load, arms, samples, live_seconds, folder / f"live-{load}", log)
            results["live"][str(load)] = rates
            gain = estimated(logged, samples, fits.pair.network, ks[size])
            results["off_policy"][str(load)] = gain
            say(f"batch {load}: {gain}")
            publish(results, out)
    say(f"written: {out}")


def arms_of(
    fits: Fits, k: int, pair: tuple[int, int], settings: Settings, folder: Path
) -> dict[str, DraftPolicy]:
    """What decodes live."""
    return {
        FIXED: Always(k, QUARTERS - 1, QUARTERS),
        ALONE: learned(settings, fits.alone, folder, 0.0),
        PAIR: learned(settings, fits.pair.network, folder, 0.0),
        FIXED_PAIR: Always(*pair, QUARTERS),
        RAGGED: _built(PolicySettings(kind=RAGGED, drafter=LEARNED)),
        LOG: learned(settings, fits.pair.network, folder, 0.5),
    }


def publish(results: Mapping[str, Any], out: Path) -> None:
    """Write figures and rows, as far as there are any yet."""
    write_result(out, results)
    write_rows("learned_sizes", rows_of(results), SOURCE, out.parent)


if __name__ == "__main__":
    typer.run(main)
