"""What a match is worth by where it was found, and which of two matches to continue.

    python -m benchmarks.matches              # four minutes on a quiet core
    python -m benchmarks.matches --reuse      # the texts and step times of the run before
    python -m benchmarks.matches --reuse --serve    # and the served comparison

The bundled target answers the demo's prompts plainly, at the demo's temperature. The index then
reads these texts in order, as a server would have finished them, and drafts for each of them again:
a token that the target has drawn is kept if it was drafted, which is what verification does, so
this is exact. Rules differ in which match is continued and in what K depends on; each learns as the
default policy does, by ``policies.acceptance``, and takes the K that gains most over plain decoding
by the step times measured here. Where that is 0 it drafts two tokens now and then, because a match
that nobody continues is never found to be worth more than it was. ``longest`` is what the index did
before it knew kinds of match (up to the length within a class of lengths).

``--serve`` also decodes held-out prompts with the index over recent texts and with the index of the
request alone, in turns in one process, with the default policy. Tokens per second of processor time
are compared, which other work on the machine changes least.

Writes ``benchmarks/results/matches.json`` and rows of ``index``.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer

from benchmarks.harness.arms import LOOKUP
from benchmarks.harness.engines import DEMO, NO_DRAFTER, Built, engine_from
from benchmarks.harness.loops import Answer
from benchmarks.harness.results import RESULTS, Out, at_least, say, write_result, write_rows
from benchmarks.harness.run_traces import new_index, num_kept
from configs.load import load_settings
from drafters.catalog import CATALOG, kind_of
from drafters.protocol import HostDrafter, RanksMatches, Traits
from drafters.suffix.kinds import KINDS, Kind
from examples.plan import DemoSettings
from examples.texts import gather
from policies.acceptance import AcceptanceModel
from policies.fixed import FixedPolicy
from policies.interface import Outcome
from serving.requests import Request, SamplingParams
from targets.tokenizer import load_tokenizer

TRAITS = kind_of(LOOKUP).traits
MOST = 8
"""Largest K."""
HALF_LIFE = 200.0
"""Rounds; the default of ``policy.half_life_rounds``."""
EXPLORE = 0.02
"""Share of the rounds with a match and no draft that draft ``EXPLORED`` tokens instead."""
EXPLORED = 2
ALL = "all"


@dataclass(frozen=True, slots=True)
class Text:
    """One answered prompt."""

    domain: str
    prompt: list[int]
    answer: list[int]
    is_held_out: bool
    """Drafted for like the others, counted, and not looked up for later ones."""


# Texts and step times


def record(num_live: int) -> list[Text]:
    """The demo's prompts in its order, ``num_live`` of each phase, and its held-out ones, answered
    without drafts."""
    demo = DemoSettings()
    found = gather(demo.source, demo.phases, demo.max_requests, demo.kept, demo.seed)
    live = [p for phase in demo.phases for p in found.live[phase.name][:num_live]]
    held = [p for prompts in found.held_out.values() for p in prompts]
    tokenizer = load_tokenizer(load_settings([DEMO], [], {}).target)
    prompts = [tokenizer.encode(cast(str, p.prompt)) for p in (*live, *held)]
    fields = {"temperature": demo.sampling.temperature, "max_tokens": demo.sampling.max_tokens}
    chosen = ["engine.max_batch=8", "drafter.suffix.enabled=false", *NO_DRAFTER, *_ALONE]
    with engine_from(DEMO, chosen) as built:
        answers = _answered(built, prompts, fields, most=8)
    return [
        Text(p.domain, ids, answer, number >= len(live))
        for number, (p, ids, answer) in enumerate(
            zip((*live, *held), prompts, answers, strict=True)
        )
    ]


_ALONE = ("capture.enabled=false", "swap.enabled=false", "engine.prefix_cache=false")


@torch.inference_mode()
def _answered(
    built: Built, prompts: Sequence[Sequence[int]], fields: Mapping[str, Any], most: int
) -> list[list[int]]:
    """Answers in order, ``most`` requests at a time, each with a seed of its own."""
    engine, answers = built.engine, [Answer() for _ in prompts]
    for number, (ids, answer) in enumerate(zip(prompts, answers, strict=True)):
        sampling = SamplingParams(**fields, seed=number)
        engine.inbox.submit(
            Request(f"text-{number}", tuple(ids), sampling, capture=False), answer.take
        )
        while engine.inbox.num_inflight() >= most:
            engine.step()
    while engine.inbox.num_inflight():
        engine.step()
    return [answer.tokens for answer in answers]


class _Timed(FixedPolicy):
    """Notes the time of each step by the number of drafted tokens."""

    def __init__(self, drafter: str, draft_k: int) -> None:
        super().__init__(drafter, draft_k)
        self.seconds: dict[int, list[float]] = defaultdict(list)

    def observe(self, outcome: Outcome) -> None:
        if not outcome.has_prefill:
            drafted = max(outcome.rows.num_verified) if outcome.decision.draft_k else 0
            self.seconds[drafted].append(outcome.step_s)


def step_costs(texts: Sequence[Text], turns: int = 4) -> list[float]:
    """[MOST + 1] time of a step of one request that looks up matches and drafts 0, 1, ...
    tokens, relative to a plain one that does not look; turns of all K alternate."""
    seconds: dict[int, list[float]] = defaultdict(list)
    plain: list[float] = []
    prompts = [text.prompt for text in texts if text.is_held_out][::8]
    with engine_from(DEMO, [f"drafter.kind={LOOKUP}", *_ALONE]) as built:
        for turn in range(turns):
            for k in range(MOST + 1):
                timed = _Timed(LOOKUP if k else "none", k)
                built.policy.play(timed)
                own = prompts[turn::turns]
                _answered(built, own, {"temperature": 0.5, "max_tokens": 64}, most=1)
                if k:
                    seconds[k] += timed.seconds[k]
                    seconds[0] += timed.seconds[0]
                else:
                    plain += timed.seconds[0]
    plain_s = _quick(plain)
    costs = [_quick(seconds[k]) / plain_s for k in range(MOST + 1)]
    return [max(costs[: k + 1]) for k in range(MOST + 1)]


def _quick(seconds: Sequence[float]) -> float:
    return statistics.quantiles(seconds, n=5)[0]


# Rules


def by_length(kind: Kind) -> tuple[Any, ...]:
    return (kind.least,)


def by_place(kind: Kind) -> tuple[Any, ...]:
    return kind.is_own, kind.least


def by_kind(kind: Kind) -> tuple[Any, ...]:
    return tuple(kind)


@dataclass(frozen=True, slots=True)
class Rule:
    """Which of two matches is continued, and by what K is chosen."""

    name: str
    groups: Callable[[Kind], tuple[Any, ...]]
    """Matches of one group count as alike where acceptance is learned."""
    worth: Callable[[Kind], float] | None = None
    """The match of which this is higher is continued; ``None``: as learned."""
    has_recent: bool = True


RULES = (
    Rule("request alone, K by length", by_length, has_recent=False),
    Rule("longest, K by length", by_length, lambda kind: kind.least),
    Rule("longest, K by place and length", by_place, lambda kind: kind.least),
    Rule("own first, K by place and length", by_place, lambda kind: kind.is_own),
    Rule("learned by place and length", by_place),
    Rule("learned by place, length and votes", by_kind),
)
BEFORE, NOW = RULES[1].name, RULES[-1].name


class Learner:
    """Learns what matches are worth as the default policy does, by the groups of a rule."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        groups = sorted({rule.groups(kind) for kind in KINDS})
        self._row = [0, *(1 + groups.index(rule.groups(kind)) for kind in KINDS)]
        shares: dict[int, list[float]] = defaultdict(list)
        for row, prior in zip(self._row, TRAITS.prior_acceptance, strict=True):
            shares[row].append(prior)
        priors = tuple(statistics.mean(shares[row]) for row in range(len(groups) + 1))
        traits: Traits = replace(TRAITS, prior_acceptance=priors)
        self._model = AcceptanceModel(HALF_LIFE, {LOOKUP: traits}, MOST)

    def values(self) -> list[float]:
        """What a match of each kind is worth."""
        if self._rule.worth is not None:
            return [0.0, *(float(self._rule.worth(kind)) for kind in KINDS)]
        learned = self._model.match_values(LOOKUP)
        assert learned is not None
        return [learned[row] for row in self._row]

    def expected(self, number: int) -> list[float]:
        """[MOST + 1] tokens of a round that continues a match of this kind."""
        rows: list[float] = self._model.expected_tokens(LOOKUP)[self._row[number]].tolist()
        return rows

    def observe(self, number: int, num_drafted: int, kept: int) -> None:
        self._model.tick(1)
        if num_drafted:
            self._model.observe(LOOKUP, {self._row[number]: {(num_drafted, kept): 1}}, batch=1)


@dataclass(slots=True)
class Totals:
    """Steps of one request at a time."""

    steps: int = 0
    drafted: int = 0
    kept: int = 0
    plain_steps: float = 0.0
    """Time, in plain steps."""

    def figures(self) -> dict[str, float | None]:
        return {
            "tokens_per_step": (self.steps + self.kept) / self.steps,
            "drafted_per_step": self.drafted / self.steps,
            "acceptance": self.kept / self.drafted if self.drafted else None,
            "step_cost": self.plain_steps / self.steps,
            "speed_over_plain": (self.steps + self.kept) / self.plain_steps,
        }


@dataclass(slots=True)
class Drafts:
    """One rule over all texts."""

    costs: Sequence[float]
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    speed: float = 1.0
    """Tokens in the time of a plain step, reached lately."""
    by_domain: dict[str, Totals] = field(default_factory=lambda: defaultdict(Totals))
    """Of held-out texts; under ``all`` every text."""

    def best_k(self, expected: Sequence[float], most: int) -> int:
        gains = [expected[k] - self.costs[k] * self.speed for k in range(most + 1)]
        best = max(range(most + 1), key=gains.__getitem__)
        explores = not best and most >= EXPLORED and self.rng.random() < EXPLORE
        return EXPLORED if explores else best

    def note(self, text: Text, num_drafted: int, kept: int) -> None:
        cost = self.costs[num_drafted]
        self.speed += 0.002 * ((1 + kept) / cost - self.speed)
        for name in (ALL, *([text.domain] if text.is_held_out else [])):
            totals = self.by_domain[name]
            totals.steps += 1
            totals.drafted += num_drafted
            totals.kept += kept
            totals.plain_steps += cost


def play(rule: Rule, texts: Sequence[Text], costs: Sequence[float]) -> dict[str, Totals]:
    """Draft for all texts by a rule."""
    index, learner, drafts = _new_index(has_recent=rule.has_recent), Learner(rule), Drafts(costs)
    assert isinstance(index, RanksMatches)
    for text in texts:
        ids, at = text.prompt + text.answer, len(text.prompt)
        index.begin("own", ids[: at + 1])
        while at + 1 < len(ids):
            index.rank(learner.values())
            [match] = index.observe(["own"])
            most = min(MOST, len(ids) - at - 2) if match else 0
            k = drafts.best_k(learner.expected(match), most)
            [drafted] = index.propose(["own"], [k])
            kept = num_kept(drafted, ids, at + 1)
            learner.observe(match, len(drafted), kept)
            drafts.note(text, len(drafted), kept)
            index.extend(["own"], [ids[at + 1 : at + 2 + kept]])
            at += 1 + kept
        index.finish("own", keep=not text.is_held_out)
    return drafts.by_domain


def _new_index(*, has_recent: bool = True) -> HostDrafter:
    chosen = [] if has_recent else [f"drafter.{LOOKUP}.recent_tokens=0"]
    return new_index(load_settings([DEMO], chosen, {}))


# Kinds of match


def by_kinds(texts: Sequence[Text]) -> Iterator[dict[str, Any]]:
    """What follows matches of each kind: at every position of the answers, the best match in the
    request and the best in recent text."""
    places = {True: _new_index(), False: _new_index()}
    for is_own, index in places.items():
        assert isinstance(index, RanksMatches)
        index.rank([0.0, *(float(kind.is_own == is_own) for kind in KINDS)])
    kept: dict[tuple[str, int], list[int]] = defaultdict(list)
    positions: dict[str, int] = defaultdict(int)
    for text in texts:
        ids, start = text.prompt + text.answer, len(text.prompt)
        for is_own, index in places.items():
            index.begin("own", ids[:start])
            for at in range(start, len(ids) - MOST):
                index.extend(["own"], [[ids[at]]])
                [match] = index.observe(["own"])
                positions[text.domain] += is_own
                if match and KINDS[match - 1].is_own == is_own:
                    [drafted] = index.propose(["own"], [MOST])
                    kept[text.domain, match].append(num_kept(drafted, ids, at + 1))
            index.finish("own", keep=not text.is_held_out)
    for (domain, match), counts in sorted(kept.items()):
        yield {
            "domain": domain,
            "match": str(KINDS[match - 1]),
            "share": len(counts) / positions[domain],
            "first_kept": sum(count > 0 for count in counts) / len(counts),
            "kept_of_8": statistics.mean(counts),
        }


# Served


def served(texts: Sequence[Text], domains: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Domain -> drafter -> figures of held-out prompts, two of them a turn."""
    alone = next(
        kind
        for kind in CATALOG
        if kind_of(kind).traits.needs_match and not kind_of(kind).traits.shares_text
    )
    chosen = [f"drafter.kind={LOOKUP}", f'drafter.on_request=["{alone}"]', *_ALONE]
    found: dict[str, dict[str, dict[str, float]]] = {}
    sampling = {"temperature": DemoSettings().sampling.temperature, "max_tokens": 96}
    with engine_from(DEMO, chosen) as built:
        _fill(built.engine.drafting.hosts[LOOKUP], texts)
        for domain in domains:
            prompts = [t.prompt for t in texts if t.is_held_out and t.domain == domain]
            totals: dict[str, list[float]] = {LOOKUP: [0.0] * 4, alone: [0.0] * 4}
            for start in range(0, len(prompts), 2):
                for kind in list(totals)[:: 1 if start % 4 else -1]:
                    turn = prompts[start : start + 2]
                    totals[kind] = [
                        a + b
                        for a, b in zip(
                            totals[kind], _turn(built, turn, sampling, kind), strict=True
                        )
                    ]
            found[domain] = {
                kind: {
                    "tokens_per_step": tokens / steps,
                    "drafted_per_step": drafted / steps,
                    "tokens_per_processor_s": tokens / seconds,
                }
                for kind, (tokens, steps, drafted, seconds) in totals.items()
            }
    return found


def _fill(index: HostDrafter, texts: Sequence[Text]) -> None:
    """Let an index see all texts but held-out ones, as finished requests."""
    namespace = Request("", (), SamplingParams()).namespace
    for text in texts:
        if not text.is_held_out:
            index.begin("done", text.prompt + text.answer, namespace)
            index.observe(["done"])  # indexes the one before, so that none is skipped
            index.finish("done", keep=True)


@torch.inference_mode()
def _turn(
    built: Built, prompts: Sequence[list[int]], sampling: Mapping[str, Any], kind: str
) -> tuple[float, float, float, float]:
    """Tokens, steps, drafted tokens and processor seconds of prompts, one at a time."""
    answers, started = [Answer() for _ in prompts], time.process_time()
    for number, (ids, answer) in enumerate(zip(prompts, answers, strict=True)):
        params = SamplingParams(**sampling, seed=number)
        request = Request(
            f"{kind}-{number}", tuple(ids), params, capture=False, drafters=frozenset({kind})
        )
        built.engine.inbox.submit(request, answer.take)
        while built.engine.inbox.num_inflight():
            built.engine.step()
    spent = [answer.acceptance for answer in answers]
    return (
        sum(len(answer.tokens) for answer in answers),
        sum(one.num_steps for one in spent),
        sum(one.num_proposed for one in spent),
        time.process_time() - started,
    )


# The command


def main(
    out: Out = RESULTS / "matches.json",
    cache: Annotated[Path, typer.Option(help="folder of the texts")] = Path("runs/matches"),
    reuse: Annotated[bool, typer.Option("--reuse", help="texts and step times in there")] = False,
    num_live: Annotated[int, typer.Option(min=1, help="prompts of each phase")] = 250,
    serve: Annotated[bool, typer.Option("--serve", help="decode with an engine as well")] = False,
) -> None:
    """Draft for recorded texts by each rule."""
    torch.set_num_threads(1)
    file = cache / "texts.json"
    if reuse:
        known = json.loads(file.read_text(encoding="utf-8"))
        texts, costs = [Text(**text) for text in known["texts"]], known["costs"]
    else:
        texts = record(num_live)
        costs = step_costs(texts)
        cache.mkdir(parents=True, exist_ok=True)
        slots = Text.__slots__
        found = [{name: getattr(text, name) for name in slots} for text in texts]
        file.write_text(json.dumps({"texts": found, "costs": costs}), encoding="utf-8")
    say("step costs: " + ", ".join(f"{cost:.2f}" for cost in costs))
    result: dict[str, Any] = {
        "temperature": DemoSettings().sampling.temperature, "step_costs": costs,
        "texts": len(texts), "rules": {}, "kinds": list(by_kinds(texts)),
    }  # fmt: skip
    for rule in RULES:
        totals = play(rule, texts, costs)
        result["rules"][rule.name] = {name: own.figures() for name, own in totals.items()}
        for name, own in totals.items():
            figures = own.figures()
            rest = "  ".join(f"{key} {value:.3f}" for key, value in figures.items() if value)
            say(f"{rule.name:<36} {name:<7} {rest}")
    if serve:
        result["served"] = served(texts, ("c", "docs"))
        say(json.dumps(result["served"], indent=2))
    write_result(out, result)
    speeds = {
        name: {rule: one[name]["speed_over_plain"] for rule, one in result["rules"].items()}
        for name in result["rules"][NOW]
    }
    about = "bundled target, temperature 0.5, one request, index alone, simulated"
    write_rows(
        "index",
        [
            at_least(
                f"{about}, {name} texts", f"speed over '{former}'", own[NOW] / own[former], 1.0
            )
            for name, own in speeds.items()
            for former in (BEFORE, RULES[0].name)
        ],
        "python -m benchmarks.matches",
    )


if __name__ == "__main__":
    typer.run(main)
