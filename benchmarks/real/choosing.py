"""The policy against the best fixed K, on a real target with real traffic.

    python -m benchmarks.real.choosing --run-dir runs/real/choosing

First decodes chat requests of four domains and trains a drafter from random weights on their
traces. Then answers other requests of these domains in the engine's own loop, without HTTP, with a
batch that stays full: by plain decoding, by the drafter alone at every fixed K and with the policy,
and by the policy with the index beside the drafter. Where the index drafts on the device, it and
the mix of both have fixed K, too, which the latter is also held against. Every arm has a policy of
its own, which goes on from turn to turn. Arms take turns in rotating order; a figure is the median
over the turns of an arm's tokens per second relative to plain decoding of the same turn.

The best of many arms that are measured a few times is lucky as well as good. With several turns,
the policy is also held in each turn against the arm that was best in all the others.

Requests are seeded, so that all arms answer alike, and end where the target ends them.

Writes ``choosing.json`` and ``rows/choosing.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

import cProfile
import gc
import io
import pstats
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness.arms import LEARNED, LOOKUP
from benchmarks.harness.engines import build, release
from benchmarks.harness.loops import full_window
from benchmarks.harness.policy import PolicySwitch
from benchmarks.harness.results import RESULTS, Out, Row, at_least, say, write_result, write_rows
from benchmarks.real.train_drafter import Ask, collect, train
from configs.load import load_settings
from configs.schema import Settings
from examples.plan import REAL_CONFIGS
from examples.traffic.chat import DOMAINS, Domain, chat_prompts
from examples.traffic.prompts import Prompt
from policies.catalog import build_policy
from policies.fixed import FixedPolicy
from policies.interface import CostSample, DraftPolicy, Outcome
from serving.engine.loop import Engine
from serving.profile import profile_steps
from serving.requests import Request, SamplingParams
from serving.service import Service
from targets.find import target_folder
from targets.tokenizer import load_tokenizer

ARM_DOMAINS: tuple[Domain, ...] = DOMAINS[:4]
MAX_DRAFT = 8
TRAINED_AT = 0.7
GOAL = 0.98
SHORTEST_S = 0.6
"""Of a turn that is measured."""
PLAIN, ALONE, TUNED = "plain", "drafter alone", "tuned"


def settings_for(run_dir: Path, device: str, *chosen: str) -> Settings:
    """Settings of the server that the demo starts on a GPU."""
    common = [
        f"run_dir={run_dir}",
        f"device={device}",
        f"trainer.device={device}",
        "engine.max_queue=1000000",
        "engine.prefix_cache=false",
        "swap.enabled=false",
    ]
    return load_settings(REAL_CONFIGS, [*common, *chosen], {})


def collecting_settings(run_dir: Path, device: str, batch: int, *chosen: str) -> Settings:
    """Settings for plain decoding of ``batch`` requests at a time that captures every row."""
    return settings_for(
        run_dir, device, f"engine.max_batch={batch}", "drafter.max_draft=1",
        "drafter.suffix.enabled=false", "drafter.on_request=null", "policy.kind=fixed",
        "policy.draft_k=0", "trainer.memory_fraction=0.5", "capture.queue_traces=1000000",
        f"capture.ring_rows={batch * 3000}", f"buffer.max_bytes={batch * 300 << 20}", *chosen,
    )  # fmt: skip


# Requests


def prompt_ids(tokenizer: Any, prompt: Prompt) -> tuple[int, ...]:
    """A chat as the server's HTTP room reads it."""
    turns = [turn.model_dump() for turn in prompt.messages or ()]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True, slots=True)
class Traffic:
    """Prompts of each domain, as token ids with the seed of their answer."""

    prompts: dict[Domain, list[tuple[tuple[int, ...], int]]]
    temperature: float
    max_tokens: int

    def requests(
        self, domain: Domain, start: int, drafters: frozenset[str], name: str
    ) -> Iterator[Request]:
        """Requests from prompt ``start`` on, for ever. Each arm is a tenant, so that its index does
        not know the answers of another arm."""
        prompts = self.prompts[domain]
        number = start
        while True:
            ids, seed = prompts[number % len(prompts)]
            sampling = SamplingParams(
                temperature=self.temperature, max_tokens=self.max_tokens, seed=seed
            )
            yield Request(
                f"{name}-{number}",
                ids,
                sampling,
                f"{name} {self.temperature}",
                capture=False,
                drafters=drafters,
            )
            number += 1


# Arms


@dataclass(slots=True)
class Count:
    """Steps of one (drafter, K) and reason."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    plan_s: float = 0.0
    draft_s: float = 0.0
    untimed: int = 0


class Watched(PolicySwitch):
    """Counts the steps of a policy by what it decided."""

    def __init__(self, own: DraftPolicy) -> None:
        super().__init__(own)
        self.counts: dict[tuple[str, str, int], Count] = {}

    def observe(self, outcome: Outcome) -> None:
        decision = outcome.decision
        key = decision.reason, decision.drafter, decision.draft_k
        count = self.counts.setdefault(key, Count())
        count.tokens += sum(outcome.rows.num_accepted) + len(outcome.rows)
        count.steps += 1
        count.untimed += outcome.has_prefill
        if not outcome.has_prefill:
            count.seconds += outcome.step_s
            count.plan_s += outcome.plan_s
            count.draft_s += outcome.draft_s
        self.playing.observe(outcome)


@dataclass(slots=True)
class Arm:
    """One way to decode, with its own policy."""

    name: str
    drafters: frozenset[str]
    policy: Watched
    engine: Engine
    turns: list[dict[str, float]] = field(default_factory=list)
    """Tokens per second of each turn by domain."""


def arms_of(
    service: Service, settings: Settings, samples: Sequence[CostSample], fixed_ks: Sequence[int]
) -> list[Arm]:
    """All arms, over the parts of one engine."""
    drafting = service.engine.drafting

    def goodput(*kinds: str) -> DraftPolicy:
        traits = {kind: drafting.drafters[kind].traits for kind in kinds}
        mixes = {n: rows.kinds for n, rows in drafting.mixes.items() if {*rows.kinds} <= {*kinds}}
        policy = build_policy(settings.policy, traits, settings.seed, MAX_DRAFT, mixes)
        policy.calibrate(samples)
        return policy

    def arm(name: str, policy: DraftPolicy, *kinds: str) -> Arm:
        watched = Watched(policy)
        engine = Engine(service.engine.parts, watched, None, lambda _kinds: watched)
        return Arm(name, frozenset(kinds), watched, engine)

    def at(name: str, drafter: str, *kinds: str) -> list[Arm]:
        fixed = [(k, FixedPolicy(drafter, k, needs_match=False)) for k in fixed_ks]
        return [arm(f"{name}K = {k}", policy, *kinds) for k, policy in fixed]

    on_device = {
        kind: rows.kinds for kind, rows in drafting.on_device.items() if {*rows.kinds} & {LOOKUP}
    }
    return [
        arm(PLAIN, FixedPolicy("none", 0)),
        *at("", LEARNED, LEARNED),
        *(one for kind, kinds in on_device.items() for one in at(f"{kind}, ", kind, *kinds)),
        arm(ALONE, goodput(LEARNED), LEARNED),
        arm(TUNED, goodput(LEARNED, LOOKUP), LEARNED, LOOKUP),
    ]


def take_turn(
    arm: Arm, traffic: Traffic, domain: Domain, start: int, clients: int, seconds: float
) -> float:
    """Tokens per second of one arm with a batch that stays full, after a tenth of the time."""
    requests = traffic.requests(domain, start, arm.drafters, arm.name)
    window = full_window(arm.engine, requests, clients, seconds / 10, seconds)
    return window.num_tokens / window.seconds


def profiled(arm: Arm, traffic: Traffic, domain: Domain, clients: int, seconds: float) -> str:
    """Where the host's time goes, by function."""
    profile = cProfile.Profile()
    profile.enable()
    take_turn(arm, traffic, domain, 0, clients, seconds)
    profile.disable()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(45)
    return text.getvalue()


# Training


def train_first(settings: Settings, asks: Sequence[Ask], seconds: dict[str, float]) -> Any:
    """Collect traces by plain decoding, and train a drafter on them."""
    service, _ = build(settings)
    say(f"engine for traces ready; {len(asks)} prompts")
    collected = collect(
        service, asks, 512, seconds["collect"], settings.engine.max_batch, ends_early=True
    )
    say(f"collected {collected}")
    del service
    release(torch.device(settings.device))
    target = target_folder(settings.target, settings.target_cache)
    until_s = time.monotonic() + seconds["train"] + seconds["read"] + 30
    trained = train(settings, target, seconds["train"], seconds["read"], until_s)
    release(torch.device(settings.device))
    return {"collected": collected, "trained": trained}


def main(
    run_dir: Annotated[Path, typer.Option(help="folder of the run: traces and weights")],
    out: Out = RESULTS / "choosing.json",
    clients: str = "32,8,1",
    temperatures: str = "0.7,0",
    fixed: Annotated[str, typer.Option(help="values of K beside plain decoding")] = "1,2,3,4,6,8",
    prompts: Annotated[int, typer.Option(help="of each domain, to train on and to answer")] = 3000,
    collect_batch: Annotated[int, typer.Option(help="requests decoded at a time for traces")] = 128,
    collect_s: float = 25.0,
    train_s: float = 50.0,
    longest_s: Annotated[float, typer.Option(help="of an arm's turn on one domain")] = 2.0,
    turns: int = 3,
    budget_s: Annotated[float, typer.Option(help="seconds in all")] = 500.0,
    together: Annotated[bool, typer.Option(help="index and drafter in one round")] = False,
    profile: Annotated[bool, typer.Option(help="also profile the host's time")] = False,
    device: str = "cuda",
) -> None:
    """Train a drafter, then compare all arms."""
    began = time.monotonic()
    collecting = collecting_settings(run_dir, device, collect_batch)
    tokenizer = load_tokenizer(target_folder(collecting.target, collecting.target_cache))
    found = chat_prompts(dict.fromkeys(ARM_DOMAINS, prompts), seed=7, may_lack=True)
    ids = {
        domain: [(prompt_ids(tokenizer, p), p.seed(0)) for p in asked]
        for domain, asked in found.items()
    }
    say(f"prompts after {time.monotonic() - began:.1f} s: { {d: len(p) for d, p in ids.items()} }")
    held_out = {domain: chats[:400] for domain, chats in ids.items()}
    mixed = [p for group in zip(*(p[400:] for p in ids.values()), strict=False) for p in group]
    asks = [Ask(prompt, TRAINED_AT) for prompt, _ in mixed]
    figures: dict[str, Any] = {"trained_at_temperature": TRAINED_AT}
    figures |= train_first(collecting, asks, {"collect": collect_s, "train": train_s, "read": 40.0})

    most = max(int(c) for c in clients.split(","))
    settings = settings_for(
        run_dir, device, f"engine.max_batch={most}", f"drafter.max_draft={MAX_DRAFT}",
        f"drafter.suffix.mixed={str(together).lower()}", "drafter.on_request=[]",
    )  # fmt: skip
    service, _ = build(settings)
    samples = profile_steps(service.engine.parts, 5, 128)
    gc.collect()
    gc.freeze()  # as the service does when it starts
    say(f"engine ready after {time.monotonic() - began:.1f} s")
    rows: list[Any] = []
    figures["rows"] = rows
    cells = [(float(t), int(c)) for t in temperatures.split(",") for c in clients.split(",")]
    for number, (temperature, size) in enumerate(cells):
        left_s = budget_s - (time.monotonic() - began)
        shortest_s = SHORTEST_S * len(ARM_DOMAINS) * (3 + len(fixed.split(",")))
        if number and left_s < shortest_s:
            say(f"{left_s:.0f} s are left: {len(cells) - number} cells are left out")
            break
        until = time.monotonic() + left_s / (len(cells) - number)
        traffic = Traffic(held_out, temperature, 512)
        arms = arms_of(service, settings, samples, [int(k) for k in fixed.split(",")])
        for turn in range(turns):
            turn_s = (until - time.monotonic()) / (turns - turn)
            seconds = min(longest_s, turn_s / len(arms) / len(ARM_DOMAINS) / 1.15)
            if seconds < SHORTEST_S and turn:
                break
            take_turns(arms, traffic, turn, size, max(seconds, SHORTEST_S))
            say(f"T {temperature}, {size} clients, turn {turn}: " + told(arms, turn))
        rows += rows_of(temperature, size, arms)
        for arm in arms:
            say_steps(arm, size)
        write_result(out, figures)
        source = "python -m benchmarks.real.choosing"
        write_rows("choosing", claims(rows), source, out.parent)
    if profile:
        for arm in arms:
            if arm.name in (PLAIN, TUNED):
                say(profiled(arm, traffic, "extract", size, 2.0))
    say(f"done after {time.monotonic() - began:.1f} s")


def take_turns(
    arms: Sequence[Arm], traffic: Traffic, turn: int, clients: int, seconds: float
) -> None:
    """One turn of every arm on every domain, arms in rotating order on the same prompts."""
    done: list[dict[str, float]] = [{} for _ in arms]
    for place, domain in enumerate(ARM_DOMAINS):
        for offset in range(len(arms)):
            at = (turn + place + offset) % len(arms)
            start = 100 * turn
            done[at][domain] = take_turn(arms[at], traffic, domain, start, clients, seconds)
    for arm, speeds in zip(arms, done, strict=True):
        arm.turns.append(speeds)


def say_steps(arm: Arm, clients: int) -> None:
    """What an arm did: steps, tokens and times by decision."""
    say(f"{clients} clients, {arm.name}")
    for key, c in sorted(arm.policy.counts.items(), key=lambda item: -item[1].steps)[:10]:
        timed = max(1, c.steps - c.untimed)
        say(
            f"  {key}: {c.steps} steps ({c.untimed} untimed), {c.tokens / c.steps / clients:.2f} "
            f"tokens/row, {c.seconds / timed * 1e3:.2f} ms, plan {c.plan_s / timed * 1e6:.0f} us, "
            f"draft {c.draft_s / timed * 1e6:.0f} us"
        )
    if arm.policy.playing.wants_profile:
        say(f"  {arm.policy.figures()}")


def claims(rows: Sequence[dict[str, Any]]) -> list[Row]:
    """The policy against the best fixed K, plain decoding included, of every cell."""
    found = []
    cells = dict.fromkeys((row["temperature"], row["clients"]) for row in rows)
    for temperature, clients in cells:
        here = [
            row for row in rows if (row["temperature"], row["clients"]) == (temperature, clients)
        ]
        arms = {row["arm"]: row["vs_plain"] for row in here}
        for domain in ARM_DOMAINS:
            for arm in (ALONE, TUNED):
                rivals = [
                    one for one in arms
                    if one not in (ALONE, TUNED) and (arm == TUNED or LOOKUP not in one)
                ]  # fmt: skip
                value = arms[arm][domain] / max(arms[one][domain] for one in rivals)
                about = f"{clients} clients, temperature {temperature:g}, {domain}, without HTTP"
                measure = f"{arm}, policy over the best fixed K, tokens/s"
                found.append(at_least(about, measure, value, GOAL))
                by_turn = {
                    row["arm"]: [turn[domain] for turn in row.get("each", ())] for row in here
                }
                if (value := over_chosen(by_turn, arm, rivals)) is not None:
                    measure = f"{arm}, policy over the K that is best in the other turns, tokens/s"
                    found.append(at_least(about, measure, value, GOAL))
    return found


def over_chosen(
    by_turn: Mapping[str, Sequence[float]], arm: str, rivals: Sequence[str]
) -> float | None:
    """Speed of an arm over, in each turn, the rival that is best in the others; their median.

    Args:
        by_turn: [turns] speed relative to plain decoding, by arm.

    Returns:
        ``None`` with less than two turns.
    """
    if len(by_turn[arm]) < 2:
        return None
    found = []
    for turn, speed in enumerate(by_turn[arm]):
        others = {
            one: [value for at, value in enumerate(by_turn[one]) if at != turn] for one in rivals
        }
        medians = {one: statistics.median(values) for one, values in others.items()}
        best = max(rivals, key=medians.__getitem__)
        found.append(speed / by_turn[best][turn])
    return statistics.median(found)


def told(arms: Sequence[Arm], turn: int) -> str:
    """Speeds of one turn relative to plain decoding."""
    plain = next(arm for arm in arms if arm.name == PLAIN).turns[turn]
    parts = [
        f"{arm.name}: " + " ".join(f"{arm.turns[turn][d] / plain[d]:.2f}" for d in plain)
        for arm in arms
    ]
    return f"plain {[round(v) for v in plain.values()]} | " + " | ".join(parts)


def rows_of(temperature: float, clients: int, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Rows of one temperature and number of clients."""
    plain = next(arm for arm in arms if arm.name == PLAIN)
    rows = []
    for arm in arms:
        ratios = {
            domain: statistics.median(
                turn[domain] / base[domain]
                for turn, base in zip(arm.turns, plain.turns, strict=True)
            )
            for domain in ARM_DOMAINS
        }
        speeds = {
            domain: statistics.median(turn[domain] for turn in arm.turns) for domain in ARM_DOMAINS
        }
        rows.append(
            {
                "temperature": temperature,
                "clients": clients,
                "arm": arm.name,
                "turns": len(arm.turns),
                "tokens_per_s": speeds,
                "vs_plain": ratios,
                "each": [
                    {domain: turn[domain] / base[domain] for domain in ARM_DOMAINS}
                    for turn, base in zip(arm.turns, plain.turns, strict=True)
                ],
                "decisions": arm.policy.figures().get("decisions"),
            }
        )
    return rows


if __name__ == "__main__":
    typer.run(main)
