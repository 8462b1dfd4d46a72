"""Speculation on a real target of half a billion parameters, trained on the spot.

    python -m examples.train_target --large --out runs/real/target
    python -m benchmarks.real.train_drafter --target runs/real/target --run-dir runs/real/run
    python -m benchmarks.real.speculation --target runs/real/target --run-dir runs/real/run

The first two make the target, from the Python and C files of this installation, and an EAGLE-3
drafter from the target's own traces. Here held-out Python and C prompts are continued greedily in
the engine's own loop, without HTTP: plain decoding, the drafter at fixed K, the suffix index, and
the policy deciding. Plain decoding is that of the same engine, its drafter loaded. All arms take
turns on the same prompts, in rotating order; a figure is the median of an arm's turns, prompts
included; the median ratio of groups of requests, each against the same group's plain decoding in
the same turn, stands beside it. Nothing is captured and no prefix is cached, so that no turn helps
the next; the index sees the request itself alone.

In bfloat16 two tokens whose scores are nearly equal may change places when a batch has another
shape. So outputs that differ from plain decoding's are counted, and for each the float32 target
says how far apart the two tokens at the first difference are; plain decoding at one batch size
against another is counted likewise.

Writes ``benchmarks/results/real_target.json`` after every batch size.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.engine.steps import Fixed
from benchmarks.harness.choice import known
from benchmarks.harness.results import write_result
from benchmarks.real.train_drafter import FIGURES, say
from buffer.records import Acceptance
from buffer.weights import versions
from configs.load import load_settings
from examples import corpus
from policies.interface import DraftPolicy
from serving.build import build_engine
from serving.engine.loop import Engine
from serving.requests import Output, Request, SamplingParams
from targets.load import load_model, load_tokenizer

DOMAINS: tuple[corpus.Domain, ...] = ("python", "c")
OFF, POLICY = "off", "policy"
FIXED = {
    OFF: ("none", 0),
    **{f"eagle3-k{k}": ("eagle3", k) for k in range(2, 7)},
    "suffix-k4": ("suffix", 4),
}
MAX_DRAFT = 6
PROMPTS = {1: 8, 8: 16, 32: 64}
"""Batch -> prompts of each domain, so that 5 turns make at least 20 groups; other batches take one
group of each."""
IDLE_S = 10.0
"""An engine that had nothing to do for so long has lost a request."""
RULE = (
    "greedy, bfloat16; an output differs if any token does. The gap is what the float32 target's "
    "log probabilities of the two tokens at the first difference are apart, in nats"
)
MOST_GAPS = 64
"""Differing outputs of a batch size that the float32 target is asked about."""


@contextmanager
def engine_for(target: Path, drafter: Path, max_batch: int, device: str) -> Iterator[Engine]:
    """The one-GPU server's engine with its programs, in bfloat16 on a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = [
            f"target={target}",
            f"run_dir={folder}",
            f"drafter.path={drafter}",
            f"drafter.max_draft={MAX_DRAFT}",
            f"device={device}",
            f"engine.max_batch={max_batch}",
            "engine.max_model_len=1024",
            "engine.prefix_cache=false",
            "engine.programs=always",
            "capture.enabled=false",
            "swap.enabled=false",
            "policy.kind=goodput",
        ]
        yield build_engine(load_settings([Path("configs/one_gpu.yaml")], chosen, {})).engine


# One turn


@dataclass(slots=True)
class Answer:
    """One output as it grows."""

    tokens: list[int] = field(default_factory=list)
    acceptance: Acceptance = field(default_factory=Acceptance)
    is_over: bool = False
    error: str | None = None

    def take(self, output: Output) -> None:
        self.tokens += output.token_ids
        spent = output.stats
        self.acceptance = Acceptance(spent.steps, spent.proposed, spent.accepted)
        self.is_over = output.finish_reason is not None
        self.error = output.error


@dataclass(frozen=True, slots=True)
class Turn:
    """One arm's go at the prompts of one domain."""

    group_s: list[float]
    """Seconds of each group: as many prompts as the batch has requests."""
    answers: list[Answer]

    @property
    def seconds(self) -> float:
        return sum(self.group_s)

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers)


def take_turn(
    engine: Engine, policy: DraftPolicy, prompts: Sequence[tuple[int, ...]], batch: int, length: int
) -> Turn:
    """Continue all prompts, ``batch`` at a time: the next ones begin when all of these ended.

    Raises:
        RuntimeError: a request failed, or the engine stopped before all had ended.
    """
    engine.policy = policy
    answers = [Answer() for _ in prompts]
    sampling = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
    group_s = []
    for start in range(0, len(prompts), batch):
        started = time.perf_counter()
        group = answers[start : start + batch]
        for number, answer in enumerate(group, start):
            request = Request(f"{number}", prompts[number], sampling, capture=False)
            engine.submit(request, answer.take)
        finish(engine, group)
        group_s.append(time.perf_counter() - started)
    bad = [a.error or "cut off" for a in answers if len(a.tokens) != length]
    if bad:
        raise RuntimeError(f"{len(bad)} of {len(answers)} requests failed: {bad[0]}")
    return Turn(group_s, answers)


def finish(engine: Engine, answers: Sequence[Answer]) -> None:
    """Step until all have ended."""
    busy_s = time.perf_counter()
    with torch.inference_mode():
        while not all(answer.is_over for answer in answers):
            if engine.step():
                busy_s = time.perf_counter()
            elif time.perf_counter() - busy_s > IDLE_S:
                raise RuntimeError("the engine has nothing to do, and requests have not ended")


# One batch size


@dataclass(slots=True)
class Arm:
    """What an arm's turns left; of turn 0, which warms up, nothing is timed."""

    policy: DraftPolicy
    turns: list[dict[str, Turn]] = field(default_factory=list)
    """Domain -> turn, of each round."""
    steps: dict[str, int] = field(default_factory=dict)
    """Steps by arm of the policy, in timed turns."""
    error: str | None = None

    def speed(self, domain: str | None = None) -> float | None:
        """Median tokens/s of the timed turns, of one domain or of all."""
        speeds = [
            sum(t.num_tokens for t in chosen) / sum(t.seconds for t in chosen)
            for turn in self.turns
            if (chosen := [t for name, t in turn.items() if domain in (None, name)])
        ]
        return statistics.median(speeds) if speeds else None

    def tokens(self, turn: int) -> list[list[int]]:
        """Outputs of all prompts in one turn."""
        return [answer.tokens for t in self.turns[turn].values() for answer in t.answers]

    def tokens_per_step(self, domain: str | None = None) -> float | None:
        return sum(
            (
                answer.acceptance
                for turn in self.turns
                for name, t in turn.items()
                if domain in (None, name)
                for answer in t.answers
            ),
            Acceptance(),
        ).tokens_per_step


def group_ratios(off: Arm, arm: Arm) -> list[float]:
    """Plain decoding's seconds over the arm's, for every group of every timed turn."""
    return [
        plain_s / arm_s
        for plain_turn, arm_turn in zip(off.turns, arm.turns, strict=False)
        for domain, plain in plain_turn.items()
        for plain_s, arm_s in zip(plain.group_s, arm_turn[domain].group_s, strict=True)
    ]


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Place of the first token that differs; ``None``: equal."""
    for place, (a, b) in enumerate(zip(one, other, strict=True)):
        if a != b:
            return place
    return None


@dataclass(frozen=True, slots=True)
class Difference:
    """Two continuations of one prompt part here."""

    context: tuple[int, ...]
    """Prompt and the tokens that both have."""
    tokens: tuple[int, int]


def differences(
    prompts: Sequence[Sequence[int]], one: Sequence[list[int]], other: Sequence[list[int]]
) -> list[Difference]:
    """Where outputs of the same prompts part."""
    found = []
    for prompt, a, b in zip(prompts, one, other, strict=True):
        place = first_difference(a, b)
        if place is not None:
            found.append(Difference((*prompt, *a[:place]), (a[place], b[place])))
    return found


def measure(
    engine: Engine,
    prompts: dict[str, list[tuple[int, ...]]],
    batch: int,
    length: int,
    turns: int,
    until_s: float,
    names: Sequence[str],
) -> dict[str, Arm]:
    """All arms in turns, the first of which warms up; no new round begins after ``until_s``."""
    learning = engine.policy
    arms = {
        name: Arm(learning if name == POLICY else Fixed(*FIXED[name], [], [])) for name in names
    }
    try:
        for number in range(turns + 1):
            if number > 1 and time.monotonic() > until_s:
                say(f"batch {batch}: the time is over after {number - 1} turns")
                break
            for place in range(len(names)):
                name = names[(number + place) % len(names)]
                _one_turn(engine, arms[name], prompts, batch, length, is_timed=number > 0)
    finally:
        engine.policy = learning
    return arms


def _one_turn(
    engine: Engine,
    arm: Arm,
    prompts: dict[str, list[tuple[int, ...]]],
    batch: int,
    length: int,
    *,
    is_timed: bool,
) -> None:
    """One arm's go at all prompts; an arm that failed rests."""
    if arm.error is not None:
        return
    before = engine.figures().steps_by_arm
    if is_timed and not arm.turns and isinstance(arm.policy, Fixed):
        arm.policy.times.clear()  # of the warm-up
    try:
        done = {d: take_turn(engine, arm.policy, ids, batch, length) for d, ids in prompts.items()}
    except Exception as error:  # one arm's failure is a row of the result, and the others go on
        arm.error = f"{type(error).__name__}: {error}"
        say(traceback.format_exc())
        engine.cancel_all()
        with torch.inference_mode():
            while engine.num_inflight() and engine.step():
                pass
        return
    if is_timed:
        arm.turns.append(done)
        for key, count in engine.figures().steps_by_arm.items():
            name = f"{key[0]}-k{key[1]}"
            arm.steps[name] = arm.steps.get(name, 0) + count - before.get(key, 0)


def rows_of(batch: int, arms: dict[str, Arm], prompts: Sequence[Sequence[int]]) -> list[Any]:
    """The result's rows of one batch size."""
    off = arms[OFF]
    rows = []
    for name, arm in arms.items():
        row: dict[str, Any] = {"batch": batch, "arm": name, "turns": len(arm.turns)}
        rows.append(row)
        if arm.error is not None:
            row["error"] = arm.error
        if not arm.turns:
            continue
        row["tokens_per_s"] = arm.speed()
        row["vs_off"] = _ratio(arm.speed(), off.speed())
        row["by_turn"] = [
            sum(t.num_tokens for t in turn.values()) / sum(t.seconds for t in turn.values())
            for turn in arm.turns
        ]
        ratios = group_ratios(off, arm)
        row["groups"] = len(ratios)
        row["median_group_vs_off"] = statistics.median(ratios) if ratios else None
        row["tokens_per_step"] = arm.tokens_per_step()
        for domain in arm.turns[0]:
            row[domain] = {
                "tokens_per_s": arm.speed(domain),
                "vs_off": _ratio(arm.speed(domain), off.speed(domain)),
                "tokens_per_step": arm.tokens_per_step(domain),
            }
        if isinstance(arm.policy, Fixed):
            row["step_ms"] = statistics.median(arm.policy.times) * 1e3
        else:
            row["steps"] = {k: n for k, n in sorted(arm.steps.items()) if n}
        if off.turns:
            row["outputs"] = len(prompts)
            row["outputs_unlike_off"] = len(differences(prompts, off.tokens(0), arm.tokens(0)))
        row["outputs_unlike_own_turns"] = sum(
            len(differences(prompts, arm.tokens(0), arm.tokens(turn)))
            for turn in range(1, len(arm.turns))
        )
    return rows


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


# Near ties


@torch.no_grad()
def gaps(target: Path, device: str, found: Sequence[Difference]) -> list[float]:
    """How far apart the float32 target sees the two tokens of each difference, in nats."""
    model: Any = load_model(target, torch.float32, torch.device(device)).eval()
    apart = []
    for difference in found:
        ids = torch.tensor([difference.context], device=device)
        scores = model(ids, logits_to_keep=1, use_cache=False).logits[0, -1].log_softmax(-1)
        one, other = difference.tokens
        apart.append(abs(float(scores[one] - scores[other])))
    return apart


def gap_figures(apart: Sequence[float], num_differences: int) -> dict[str, Any]:
    if not apart:
        return {"differences": num_differences, "examined": 0}
    return {
        "differences": num_differences,
        "examined": len(apart),
        "median_gap": statistics.median(apart),
        "largest_gap": max(apart),
    }


# Story


def prompts_for(tokenizer: Any, count: int) -> dict[str, list[tuple[int, ...]]]:
    """Held-out prompts of each domain; a smaller count gives the first of a larger one's."""
    return {
        domain: [
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in corpus.prompts(domain, count, seed=11)
        ]
        for domain in DOMAINS
    }


def made_by(target: Path, run_dir: Path) -> dict[str, Any]:
    """What the two trainings wrote down of themselves."""
    found: dict[str, Any] = {}
    for name, file in (("target", target / "training.json"), ("drafter", run_dir / FIGURES)):
        if file.is_file():
            found[name] = json.loads(file.read_text())
    if "trained" in found.get("target", {}):
        found["target"]["model_tflops_per_s"] = model_flops_per_s(found["target"]) / 1e12
    return found


def model_flops_per_s(training: dict[str, Any]) -> float:
    """Operations of the model itself, each second of the training: 6 for each weight and token, and
    the causal half of attention."""
    plan, trained = training["plan"], training["trained"]
    attention = 6 * plan["num_layers"] * plan["num_heads"] * plan["head_dim"] * plan["context"]
    each = 6 * training["parameters"] + attention
    return float(each * trained["tokens"] / trained["training_s"])


def main(
    target: Annotated[Path, typer.Option(help="folder of the target")],
    run_dir: Annotated[Path, typer.Option(help="the drafter's run; its newest version is taken")],
    out: Annotated[Path, typer.Option(help="where the result goes")] = Path(
        "benchmarks/results/real_target.json"
    ),
    batches: str = "1,8,32",
    arms: Annotated[str, typer.Option(help="which arms; empty: all")] = "",
    max_tokens: int = 128,
    turns: Annotated[int, typer.Option(help="timed ones of each arm")] = 5,
    prompts: Annotated[int | None, typer.Option(help="of each domain, for every batch")] = None,
    budget_s: Annotated[float, typer.Option(help="no new turn begins after so long")] = 270.0,
    device: str = "cuda",
) -> None:
    """All arms at all batch sizes."""
    began = time.monotonic()
    sizes = [int(b) for b in batches.split(",")]
    counts = {b: prompts or PROMPTS.get(b, b) for b in sizes}
    every = (*FIXED, POLICY)
    names = list(dict.fromkeys((OFF, *(known("arms", arms.split(","), every) if arms else every))))
    drafter = run_dir / "weights" / str(max(versions(run_dir / "weights")))
    figures: dict[str, Any] = {
        "rule": RULE,
        "max_tokens": max_tokens,
        "dtype": "bfloat16" if device == "cuda" else "float32",
        **made_by(target, run_dir),
        "rows": [],
    }
    texts = prompts_for(load_tokenizer(target), max(counts.values()))
    say(f"prompts read after {time.monotonic() - began:.1f} s")
    found: dict[int, list[Difference]] = {}
    plain: dict[int, dict[tuple[int, ...], list[int]]] = {}
    with engine_for(target, drafter, max(sizes), device) as engine:
        figures["engine_start_s"] = time.monotonic() - began
        say(f"engine ready after {figures['engine_start_s']:.1f} s")
        for place, size in enumerate(sizes):
            if place and time.monotonic() - began > budget_s:
                figures["rows"].append({"batch": size, "skipped": "the time was over"})
                continue
            chosen = {domain: ids[: counts[size]] for domain, ids in texts.items()}
            flat = [ids for domain in chosen.values() for ids in domain]
            left_s = budget_s - (time.monotonic() - began)
            until_s = time.monotonic() + left_s / (len(sizes) - place)
            done = measure(engine, chosen, size, max_tokens, turns, until_s, names)
            for row in rows_of(size, done, flat):
                figures["rows"].append(row)
                say(json.dumps({k: v for k, v in row.items() if k not in ("by_turn", *DOMAINS)}))
            if done[OFF].turns:
                off = done[OFF].tokens(0)
                plain[size] = dict(zip(flat, off, strict=True))
                found[size] = [
                    d
                    for arm in done.values()
                    if arm.turns
                    for d in differences(flat, off, arm.tokens(0))
                ]
            write_result(out, figures)
        figures["policy"] = engine.policy_figures()
    figures["ties"] = ties(target, device, found, plain)
    figures["seconds"] = time.monotonic() - began
    write_result(out, figures)
    say(f"done in {figures['seconds']:.1f} s; {figures['ties']}")


def ties(
    target: Path,
    device: str,
    found: dict[int, list[Difference]],
    plain: dict[int, dict[tuple[int, ...], list[int]]],
) -> dict[str, Any]:
    """Gaps at the differences from plain decoding, and at those of plain decoding between the
    smallest batch and each other."""
    figures: dict[str, Any] = {}
    cases: dict[str, list[Difference]] = {f"batch {b}, arms": d for b, d in found.items()}
    for size in sorted(plain)[1:]:
        small, large = plain[min(plain)], plain[size]
        both = [ids for ids in small if ids in large]
        cases[f"batch {size}, plain, against batch {min(plain)}"] = differences(
            both, [small[ids] for ids in both], [large[ids] for ids in both]
        )
    try:
        for name, some in cases.items():
            figures[name] = gap_figures(gaps(target, device, some[:MOST_GAPS]), len(some))
    except Exception as error:  # the speeds are measured already
        figures["error"] = f"{type(error).__name__}: {error}"
        say(traceback.format_exc())
    return figures


if __name__ == "__main__":
    typer.run(main)
