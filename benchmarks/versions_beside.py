"""What a swap to a worse version costs, with and without its predecessor beside it.

    python -m benchmarks.versions_beside                # simulated, 6 minutes of one core
    python -m benchmarks.versions_beside --live 1       # and on the bundled target

A server swaps to a version that is random, worse or better, without a calibration, so that nothing
tells what it is worth before it drafts. Each swap is made under ``goodput`` and ``hedge`` (with its
guard), with ``drafter.former`` and without; the live watch tries, confirms and rolls back in all.

Simulated: the policies and the watch themselves, on the engine of ``tests/policies/simulated.py``
with the times of a small target on a GPU and of a tiny one on two cores. Acceptance is 0.7 at every
position before the swap (0.5 before a better one) and 0.02, 0.5 or 0.7 after it.

- ``lost``: what the steps after the swap would have brought at the speed of the same server without
  the swap, less what they brought, in steps of that server. Negative: gained;
- ``settled``: steps until the worse version drafts for at most a tenth of the requests of the next
  hundred steps that are drafted for, or the better one for nine tenths.

Live: what ``settled`` is on the bundled target with random weights, with a drafter spoilt by noise
(0.7 of the tokens_per_step), and from that back to the bundled drafter. ``hedge`` goes without its
guard there: on a busy machine drafts may not pay, which is not what is asked.

Writes ``benchmarks/results/versions_beside.json`` and, with ``--publish``,
``rows/versions_beside.json``.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load, save
from torch import Tensor

from benchmarks.candidates.world import World as LiveWorld
from benchmarks.candidates.world import world as live_world
from benchmarks.harness.arms import LEARNED
from benchmarks.harness.results import RESULTS, Out, Row, at_most, say, write_result, write_rows
from benchmarks.policy_simulation import CPU, SMALL
from buffer.bundles import read_bundle
from buffer.manifest import MANIFEST, TENSORS, encode_manifest
from buffer.records import FileDigest
from configs.load import load_settings
from configs.schema import PolicySettings, SwapSettings
from drafters.catalog import JOINED, former_name
from policies.catalog import build_policy
from policies.interface import Decision, Outcome, RowOutcomes
from policies.rollback import Action, SwapWatch
from tests.policies.simulated import NEURAL, Noise, Simulation, World

SOURCE = "python -m benchmarks.versions_beside"
FORMER = former_name(LEARNED)
BOTH = JOINED.join((LEARNED, FORMER))
POLICIES = ("goodput", "hedge")
SERVERS = {
    "gpu, 1 request": replace(SMALL, batch=1),
    "gpu, 8 requests": replace(SMALL, batch=8),
    "cpu, 4 requests": replace(CPU, batch=4),
}
SWAPS = {"random": (0.7, 0.02), "worse": (0.7, 0.5), "better": (0.5, 0.7)}
"""Acceptance of every draft token, before and after."""
BEFORE, AFTER, WINDOW = 600, 2000, 100
LIVE_BEFORE, LIVE_AFTER = 150, 400
MOST_LOST = 20
"""Goal: steps that a worse version may cost with its predecessor beside it."""
SETTLED = 150
SPOILT = 0.3
"""Standard deviations of each tensor that are added to it as noise."""
_DOMAIN = "python"


# ---- simulated -----------------------------------------------------------------------------------


@dataclass
class Server:
    """A policy, a live watch and versions of one drafter."""

    base: World
    policy: Any
    seed: int
    acceptance: dict[int, float]
    """By version."""
    has_former: bool
    in_force: tuple[int, ...] = (0,)
    """The version that the drafter has, and its predecessor if there is one."""
    denied: set[int] = field(default_factory=set)
    drafted: list[list[int]] = field(default_factory=list)
    """Of each step, the version that drafted for each request; empty: none did."""

    def __post_init__(self) -> None:
        swap = SwapSettings()
        self.watch = SwapWatch(swap.watch_rounds, swap.max_drop)
        self.engine = Simulation(self.policy, self.seed)
        self.policy.on_swap(LEARNED, 0, {})

    @property
    def world(self) -> World:
        """What the versions in force make of it."""
        newest, *former = [(self.acceptance[version],) * 8 for version in self.in_force]
        beside = self.has_former and bool(former) and self.in_force[1] not in self.denied
        return replace(
            self.base,
            eagle=newest,
            others={FORMER: former[0]} if beside else {},
            mixes={BOTH: (LEARNED, FORMER)} if beside else {},
        )

    def put(self, *versions: int) -> None:
        """Draft with the first of these versions from now on, and with the second beside it."""
        self.in_force = versions
        if self.has_former and len(versions) > 1:
            self.policy.on_swap(FORMER, versions[1], {})
        self.engine.swap(versions[0], {})

    def run(self, steps: int) -> tuple[float, float]:
        """Tokens and seconds of some steps."""
        tokens = seconds = 0.0
        for _ in range(steps):
            found = self.engine.run(self.world, 1, self._stepped)
            tokens, seconds = tokens + found.tokens, seconds + found.seconds
        return tokens, seconds

    def _stepped(self, decision: Decision, rows: RowOutcomes) -> None:
        kinds = list(rows.drafters or [decision.drafter] * len(rows)) if decision.draft_k else []
        number = {LEARNED: self.in_force[0], FORMER: self.in_force[-1]}
        self.drafted.append([number[kind] for kind in kinds])
        own = [at for at, kind in enumerate(kinds) if kind == LEARNED]
        proposed, accepted = (
            sum(column[at] for at in own) for column in (rows.num_verified, rows.num_accepted)
        )
        action = self.watch.observe(self.in_force[0], proposed, accepted, len(own))
        if action is Action.ROLL_BACK:
            self.denied.add(self.in_force[0])
        if action in (Action.TRY_FORMER, Action.RETURN_TO_NEW, Action.ROLL_BACK):
            self.put(*reversed(self.in_force))
            self.engine.forget(self.world)


def server(world: World, policy: str, seed: int, versions: Sequence[float], former: bool) -> Server:
    """A server before its swap."""
    base = replace(world, has_index=False, noise=Noise(0.1, 0.02, world.plain_s))
    traits = {LEARNED: NEURAL}
    if former:
        traits[FORMER] = replace(NEURAL, former_of=LEARNED)
    mixes = {BOTH: (LEARNED, FORMER)} if former else {}
    made = build_policy(PolicySettings(kind=policy), traits, seed, 8, mixes)
    everyone = {FORMER: (0.7,) * 8} if former else {}
    made.calibrate(replace(base, others=everyone, mixes=mixes).profile())
    return Server(base, made, seed, dict(enumerate(versions)), former)


def simulated(world: World, policy: str, seed: int, name: str, former: bool) -> dict[str, Any]:
    """One swap."""
    without = server(world, policy, seed, SWAPS[name], former)
    without.run(BEFORE)
    tokens, seconds = without.run(AFTER)
    one = server(world, policy, seed, SWAPS[name], former)
    one.run(BEFORE)
    one.put(1, 0)
    own_tokens, own_seconds = one.run(AFTER)
    lost = (own_seconds * tokens / seconds - own_tokens) / (tokens / AFTER)
    after = one.drafted[BEFORE:]
    return {"lost": lost, "settled": settled(after, name), "rolled_back": 1 in one.denied}


def settled(drafted: Sequence[Sequence[int]], name: str) -> int | None:
    """Steps until version 1 has the share that is due to it; ``None``: never."""
    for start in range(len(drafted) - WINDOW + 1):
        part = [version for step in drafted[start : start + WINDOW] for version in step]
        share = part.count(1) / len(part) if part else 0.0
        if share >= 0.9 if name == "better" else share <= 0.1:
            return start
    return None


def all_simulated(seeds: int) -> Iterator[dict[str, Any]]:
    """Every swap on every server, with and without the former version."""
    for where, world in SERVERS.items():
        for name in SWAPS:
            for policy in POLICIES:
                for former in (False, True):
                    each = [simulated(world, policy, seed, name, former) for seed in range(seeds)]
                    yield {
                        "server": where, "version": name, "policy": policy, "former": former,
                        "swaps": each,
                    }  # fmt: skip


# ---- live ----------------------------------------------------------------------------------------


def changed(
    tensors: Mapping[str, Tensor], seed: int, change: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Weights changed with noise of their own scale."""
    chance = torch.Generator().manual_seed(seed)
    return {
        name: change(one, one.std() * torch.randn(one.shape, generator=chance))
        if one.is_floating_point() and one.numel() > 1
        else one
        for name, one in tensors.items()
    }


def spoilt(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Weights with noise."""
    return changed(tensors, seed, lambda one, noise: one + SPOILT * noise)


def scattered(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Random weights of the same scale."""
    return changed(tensors, seed, lambda _one, noise: noise)


class Drafted:
    """Which version drafted for each request, step by step."""

    def __init__(self, one: LiveWorld) -> None:
        self.steps: list[list[int]] = []
        self.tokens: list[float] = []
        self._versions: dict[str, int] = {}
        self._inner = one.policy.own
        one.policy.own = one.policy.playing = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def observe(self, outcome: Outcome) -> None:
        """Note who drafted."""
        decision, rows = outcome.decision, outcome.rows
        kinds = (rows.drafters or [decision.drafter] * len(rows)) if decision.draft_k else ()
        self.steps.append([self._versions.get(kind, 0) for kind in kinds])
        self.tokens.append(rows.tokens_each)
        self._inner.observe(outcome)

    def on_swap(self, drafter: str, version: int, calibration: dict[str, Any]) -> None:
        """Note whose weights a drafter has."""
        self._versions[drafter] = version
        self._inner.on_swap(drafter, version, calibration)


def live(name: str, policy: str, seed: int, folder: Path) -> dict[str, Any]:
    """One swap of a server that keeps the former version."""
    chosen = [f"policy.kind={policy}", "policy.guard=false", "drafter.former=true", f"seed={seed}"]
    if name == "better":
        chosen.append(f"drafter.path={spoilt_first(folder, seed)}")
    with live_world((_DOMAIN,), seed, folder, chosen) as one:
        seen = Drafted(one)
        one.play(_DOMAIN, lambda: len(seen.steps) >= LIVE_BEFORE)
        before = fmean(seen.tokens[LIVE_BEFORE // 2 :])
        made = {"random": scattered, "worse": spoilt}
        tensors = made[name](one.tensors(), seed) if name in made else bundled()
        version, end = one.plant(tensors), len(seen.steps) + LIVE_AFTER
        one.play(_DOMAIN, lambda: len(seen.steps) >= end)
        assert one.service.swapper is not None
        status = one.service.swapper.status()
    began = next(at for at, step in enumerate(seen.steps) if version in step)
    return {
        "version": name, "policy": policy, "seed": seed,
        "settled": settled(seen.steps[began:], name), "tokens_per_step_before": before,
        "tokens_per_step": fmean(seen.tokens[began : began + LIVE_AFTER]),
        "rolled_back": version in status["denied"],
        "events": [event["event"] for event in status["history"]],
    }  # fmt: skip


def bundled() -> dict[str, Tensor]:
    """The bundled drafter."""
    return load(read_bundle(_bundled_path()).files[TENSORS])


def _bundled_path() -> Path:
    path = load_settings([Path("configs/demo.yaml")], [], {}).drafter.path
    assert path is not None
    return path


def spoilt_first(folder: Path, seed: int) -> Path:
    """A bundle to begin with that is worse than the bundled drafter."""
    bundle = read_bundle(_bundled_path())
    content = save(spoilt(load(bundle.files[TENSORS]), seed))
    digest = FileDigest(hashlib.sha256(content).hexdigest(), len(content))
    made = folder / "first" / "0"
    made.mkdir(parents=True)
    manifest = replace(bundle.manifest, files={TENSORS: digest}, policy={})
    (made / MANIFEST).write_bytes(encode_manifest(manifest))
    (made / TENSORS).write_bytes(content)
    return made


def all_live(seeds: int) -> Iterator[dict[str, Any]]:
    """Every swap of the bundled target's server, with the former version."""
    for seed in range(seeds):
        for name in SWAPS:
            for policy in POLICIES:
                with tempfile.TemporaryDirectory() as folder:
                    yield live(name, policy, seed, Path(folder))


# ---- claims --------------------------------------------------------------------------------------


def rows_of(found: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """The claims about simulated swaps."""
    for one in found:
        what = f"simulated, {one['server']}: {one['version']} version under {one['policy']}"
        what += ", its predecessor beside it" if one["former"] else ", without"
        lost = fmean(swap["lost"] for swap in one["swaps"])
        is_bound = one["former"] and one["version"] != "better"
        measure = f"steps lost of {AFTER}, mean of {len(one['swaps'])}"
        yield at_most(what, measure, round(lost, 1), MOST_LOST if is_bound else None)
        if one["former"]:
            yield _settled_row(what, one["version"], [swap["settled"] for swap in one["swaps"]])


def live_rows(found: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """The claims about real swaps."""
    for case in dict.fromkeys((one["version"], one["policy"]) for one in found):
        own = [one for one in found if (one["version"], one["policy"]) == case]
        what = f"bundled target, 4 requests: {case[0]} version under {case[1]}"
        what += ", its predecessor beside it"
        yield _settled_row(what, case[0], [one["settled"] for one in own])


def _settled_row(what: str, name: str, found: Sequence[int | None]) -> Row:
    due = "nine tenths" if name == "better" else "at most a tenth"
    known = [one for one in found if one is not None]
    latest = max(known) if len(known) == len(found) else None
    measure = f"steps until it gets {due}, the latest of {len(found)}"
    if latest is None:
        return Row(what, measure, "never", f"at most {SETTLED}", False)
    return at_most(what, measure, latest, SETTLED)


def main(
    seeds: Annotated[int, typer.Option(min=0, help="simulated swaps of each sort")] = 4,
    live_seeds: Annotated[int, typer.Option("--live", min=0, help="real ones")] = 0,
    publish: Annotated[bool, typer.Option(help="write rows/versions_beside.json, too")] = False,
    out: Out = RESULTS / "versions_beside.json",
) -> None:
    """Swap versions into servers, and say what it cost them."""
    found = json.loads(out.read_text()) if out.exists() else {}
    parts = {part: found.get(part, []) for part in ("simulated", "live")}
    for part, num, measure in (
        ("simulated", seeds, all_simulated),
        ("live", live_seeds, all_live),
    ):
        if num:  # otherwise what was measured before stays
            parts[part] = []
            for one in measure(num):
                say(str(one))
                parts[part].append(one)
                write_result(out, parts)
    rows = [*rows_of(parts["simulated"]), *live_rows(parts["live"])]
    if publish:
        write_rows("versions_beside", rows, SOURCE)
    for row in rows:
        say(f"{row.row}: {row.measure}: {row.value} (goal: {row.goal}, holds: {row.holds})")


if __name__ == "__main__":
    typer.run(main)
