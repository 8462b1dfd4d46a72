"""Speculation on a real target of half a billion parameters, trained for this benchmark.

    python -m examples.train_target --large --out runs/real/target
    python -m benchmarks.real.train_drafter --target runs/real/target --run-dir runs/real/run
    python -m benchmarks.real.speculation --target runs/real/target --run-dir runs/real/run

The first two commands train the target on the Python and C files of this installation, and a
drafter on the target's own traces. This one continues held-out Python and C prompts greedily in the
engine's own loop, without HTTP. The arms are plain decoding, the drafter at fixed K, looked-up
matches, and the policy. Plain decoding runs on the same engine, with the drafter loaded. All arms
alternate on the same prompts, in rotating order. A figure is the median over an arm's turns,
including prefill; the median ratio over groups of requests, each compared with plain decoding of
the same group in the same turn, is reported as well. Nothing is captured and no prefix is cached,
so that no turn helps the next; the index sees only the request itself.

In bfloat16 two tokens with nearly equal scores may swap ranks when the batch shape changes. Outputs
that differ from plain decoding are therefore counted, and the float32 target shows how far apart
the two tokens at the first difference are. Plain decoding at different batch sizes is compared in
the same way.

Writes ``benchmarks/results/real_target.json`` after every batch size.
"""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness.arms import LEARNED, LOOKUP
from benchmarks.harness.engines import ONE_GPU, Built, engine_from
from benchmarks.harness.loops import Answer, Batch, Prompt, arm_steps, clear
from benchmarks.harness.policy import StepTime
from benchmarks.harness.results import RESULTS, Out, known, say, write_result
from benchmarks.real.train_drafter import FIGURES
from buffer.folder_weights import FolderWeights
from buffer.records import Acceptance
from examples import corpus
from policies.fixed import FixedPolicy
from policies.interface import DraftPolicy
from targets.load import load_model
from targets.tokenizer import load_tokenizer

DOMAINS: tuple[corpus.Domain, ...] = ("python", "c")
OFF, POLICY = "off", "policy"
FIXED = {
    OFF: ("none", 0),
    **{f"{LEARNED}-k{k}": (LEARNED, k) for k in range(2, 7)},
    f"{LOOKUP}-k4": (LOOKUP, 4),
}
MAX_DRAFT = 6
PROMPTS = {1: 8, 8: 16, 32: 64}
"""Batch -> prompts of each domain, so that 5 turns make at least 20 groups; other batches take one
group of each."""
RULE = (
    "greedy, bfloat16; an output differs if any token does. The gap is the difference between the "
    "float32 target's log probabilities of the two tokens at the first difference, in nats"
)
MOST_GAPS = 64
"""Maximum number of differing outputs per batch size to examine with the float32 target."""


@contextmanager
def engine_for(
    target: Path, drafter: Path, max_batch: int, device: str, *more: str
) -> Iterator[Built]:
    """The one-GPU server's engine, in bfloat16 on a GPU."""
    chosen = [
        f"target={target}",
        f"drafter.path={drafter}",
        f"drafter.max_draft={MAX_DRAFT}",
        f"engine.max_batch={max_batch}",
        "engine.max_model_len=1024",
        "engine.prefix_cache=false",
        "capture.enabled=false",
        "swap.enabled=false",
        "policy.kind=goodput",
        *more,
    ]
    with engine_from(ONE_GPU, chosen, device) as built:
        yield built


# One turn


@dataclass(frozen=True, slots=True)
class Turn:
    """One arm's answers to the prompts of one domain."""

    group_s: list[float]
    """Seconds of each group; a group has as many prompts as the batch has requests."""
    answers: list[Answer]

    @property
    def seconds(self) -> float:
        return sum(self.group_s)

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers)


def take_turn(built: Built, prompts: Sequence[Prompt], batch: int, length: int) -> Turn:
    """Continue all prompts, ``batch`` at a time; a group starts when the previous one has ended.

    Raises:
        RuntimeError: a request failed, or the engine stopped before all requests had ended.
    """
    answers, group_s = [], []
    for start in range(0, len(prompts), batch):
        clear(built.engine)
        started = time.perf_counter()
        group = Batch(built.engine, prompts[start : start + batch], length)
        group.finish()
        group_s.append(time.perf_counter() - started)
        answers += group.answers
    return Turn(group_s, answers)


# One batch size


@dataclass(slots=True)
class Arm:
    """One arm and its turns so far, without turn 0, which is the warm-up."""

    policy: DraftPolicy | None
    """``None``: the engine's own."""
    turns: list[dict[str, Turn]] = field(default_factory=list)
    """Domain -> turn, one entry per round of arms."""
    steps: dict[str, int] = field(default_factory=dict)
    """Steps by drafter and K."""
    times: list[StepTime] = field(default_factory=list)
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
    """Index of the first differing token; ``None`` if they are equal."""
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        if a != b:
            return index
    return None


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two continuations of one prompt diverge."""

    context: tuple[int, ...]
    """The prompt and the tokens that both continuations share."""
    tokens: tuple[int, int]


def differences(
    prompts: Sequence[Sequence[int]], one: Sequence[list[int]], other: Sequence[list[int]]
) -> list[Difference]:
    """Where outputs of the same prompts diverge."""
    found = []
    for prompt, a, b in zip(prompts, one, other, strict=True):
        at = first_difference(a, b)
        if at is not None:
            found.append(Difference((*prompt, *a[:at]), (a[at], b[at])))
    return found


def measure(
    built: Built,
    prompts: dict[str, list[Prompt]],
    batch: int,
    length: int,
    turns: int,
    until_s: float,
    names: Sequence[str],
) -> dict[str, Arm]:
    """Alternate all arms after a warm-up turn; no new turn starts after ``until_s``."""
    arms = {name: Arm(None if name == POLICY else FixedPolicy(*FIXED[name])) for name in names}
    for number in range(turns + 1):
        if number > 1 and time.monotonic() > until_s:
            say(f"batch {batch}: no time left after {number - 1} turns")
            break
        for offset in range(len(names)):
            arm = arms[names[(number + offset) % len(names)]]
            if arm.error is None:
                _one_turn(built, arm, prompts, batch, length, is_timed=number > 0)
    built.policy.play()
    return arms


def _one_turn(
    built: Built,
    arm: Arm,
    prompts: dict[str, list[Prompt]],
    batch: int,
    length: int,
    *,
    is_timed: bool,
) -> None:
    """Let one arm answer all prompts; if it fails, it takes no further turn."""
    built.policy.play(arm.policy)
    before = built.engine.figures()
    try:
        done = {domain: take_turn(built, ids, batch, length) for domain, ids in prompts.items()}
        if built.engine.figures().policy_failures > before.policy_failures:
            # An engine decodes on without drafts then, which is no measurement of this arm.
            raise RuntimeError("the policy failed; the log says how")
    except Exception as error:  # one arm's failure becomes a row, and the others continue
        arm.error = f"{type(error).__name__}: {error}"
        say(traceback.format_exc())
        built.policy.play(FixedPolicy("none", 0))
        clear(built.engine)
        return
    if is_timed:
        arm.turns.append(done)
        arm.times += built.policy.steps
        for name, count in arm_steps(before, built.engine.figures()).items():
            arm.steps[name] = arm.steps.get(name, 0) + count


def rows_of(batch: int, arms: dict[str, Arm], prompts: Sequence[Sequence[int]]) -> list[Any]:
    """Rows of one batch size."""
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
        if name == POLICY:
            row["steps"] = dict(sorted(arm.steps.items()))
        elif arm.times:
            row["step_ms"] = statistics.median(step.seconds for step in arm.times) * 1e3
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
    """Float32 log-probability gap between the two tokens of each difference, in nats."""
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


# Command


def prompts_for(tokenizer: Any, count: int) -> dict[str, list[tuple[int, ...]]]:
    """Held-out prompts of each domain; a smaller count gives a prefix of a larger one."""
    return {
        domain: [
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in corpus.prompts(domain, count, seed=11)
        ]
        for domain in DOMAINS
    }


def made_by(target: Path, run_dir: Path) -> dict[str, Any]:
    """Figures that the two training runs wrote."""
    found: dict[str, Any] = {}
    for name, file in (("target", target / "training.json"), ("drafter", run_dir / FIGURES)):
        if file.is_file():
            found[name] = json.loads(file.read_text())
    return found


def main(
    target: Annotated[Path, typer.Option(help="folder of the target")],
    run_dir: Annotated[Path, typer.Option(help="the drafter's run; its newest version is used")],
    out: Out = RESULTS / "real_target.json",
    batches: str = "1,8,32",
    arms: Annotated[str, typer.Option(help="comma-separated; empty: all")] = "",
    max_tokens: int = 128,
    turns: Annotated[int, typer.Option(help="timed turns per arm")] = 5,
    prompts: Annotated[int | None, typer.Option(help="per domain, for every batch size")] = None,
    budget_s: Annotated[float, typer.Option(help="no new turn starts after this")] = 270.0,
    device: str = "cuda",
) -> None:
    """Measure all arms at all batch sizes."""
    began = time.monotonic()
    sizes = [int(b) for b in batches.split(",")]
    counts = {b: prompts or PROMPTS.get(b, b) for b in sizes}
    every = (*FIXED, POLICY)
    names = list(dict.fromkeys((OFF, *(known("arms", arms.split(","), every) if arms else every))))
    store = FolderWeights(run_dir / "weights")
    drafter = store.path(max(store.versions()))
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
    with engine_for(target, drafter, max(sizes), device) as built:
        figures["engine_start_s"] = time.monotonic() - began
        say(f"engine ready after {figures['engine_start_s']:.1f} s")
        for index, size in enumerate(sizes):
            if index and time.monotonic() - began > budget_s:
                figures["rows"].append({"batch": size, "skipped": "no time left"})
                continue
            chosen = {domain: ids[: counts[size]] for domain, ids in texts.items()}
            flat = [ids for domain in chosen.values() for ids in domain]
            left_s = budget_s - (time.monotonic() - began)
            until_s = time.monotonic() + left_s / (len(sizes) - index)
            done = measure(built, chosen, size, max_tokens, turns, until_s, names)
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
        figures["policy"] = built.policy.figures()
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
    """Gaps where arms differ from plain decoding, and where plain decoding at the smallest batch
    size differs from plain decoding at each larger one."""
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
