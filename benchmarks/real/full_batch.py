"""Speculation on a target trained on the spot while its batch stays full, as in a server at load.

    python -m benchmarks.real.full_batch --target runs/real/target --run-dir runs/real/run

Beside ``benchmarks.real.speculation``, whose groups of requests begin and end together: what a
group's last requests cost alone is in its figures. Here another request begins as soon as one
ends, and the first ones are of staggered lengths, so that no arm has requests that end together. Arms take turns
at the same held-out prompts in the same order; a figure is the tokens of a window of time over its
seconds, prompts' chunks included, and the median of an arm's turns. Arms named ``unheld`` let no
prompt wait for others (``engine.prefill_hold_ms``). Greedy, bfloat16, no HTTP; nothing is captured
and no prefix is cached.

Writes ``benchmarks/results/full_batch.json`` after every batch size.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.engine.steps import Fixed
from benchmarks.harness.choice import known
from benchmarks.harness.results import write_result
from benchmarks.real.speculation import FIXED, OFF, POLICY, engine_for, made_by, prompts_for
from benchmarks.real.train_drafter import say
from buffer.weights import versions
from policies.interface import DraftPolicy
from serving.engine.loop import Engine
from serving.requests import Output, Request, SamplingParams
from targets.load import load_tokenizer

UNHELD = ", unheld"
ARMS = (
    *(OFF, "eagle3-k2", "eagle3-k3", "eagle3-k4", "eagle3-k5", "eagle3-k6", "suffix-k4", POLICY),
    *(name + UNHELD for name in (OFF, "eagle3-k4", POLICY)),
)
WARM_S = 0.4
"""Before the window of a turn."""


@dataclass(frozen=True, slots=True)
class Window:
    """What was decoded in a stretch of one turn."""

    seconds: float
    num_tokens: int
    num_steps: int


class Feed:
    """Keeps an engine's batch full of requests of ``length`` tokens."""

    def __init__(
        self, engine: Engine, prompts: Sequence[tuple[int, ...]], batch: int, length: int
    ) -> None:
        """The prompts are taken in order, again from the first after the last."""
        self.num_tokens = 0
        self._engine, self._length = engine, length
        self._prompts = enumerate(itertools.cycle(prompts))
        self._num_missing = 0
        self._failed: str | None = None
        for place in range(batch):
            self._submit(max(1, length * (place + 1) // batch))

    def run(self, seconds: float) -> Window:
        """Step for so long.

        Raises:
            RuntimeError: a request failed.
        """
        engine, tokens, steps = self._engine, self.num_tokens, self._engine.figures().num_steps
        started = now = time.perf_counter()
        while now - started < seconds:
            engine.step()
            for _ in range(self._num_missing):
                self._submit(self._length)
            self._num_missing = 0
            now = time.perf_counter()
        if self._failed is not None:
            raise RuntimeError(f"a request failed: {self._failed}")
        return Window(now - started, self.num_tokens - tokens, engine.figures().num_steps - steps)

    def stop(self) -> None:
        """Cancel what is in flight."""
        self._engine.cancel_all()
        while self._engine.num_inflight():
            self._engine.step()

    def _submit(self, length: int) -> None:
        number, prompt = next(self._prompts)
        sampling = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
        self._engine.submit(Request(f"{number}", prompt, sampling, capture=False), self._take)

    def _take(self, output: Output) -> None:
        self.num_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            self._num_missing += 1
        if output.error is not None:
            self._failed = output.error


@dataclass(slots=True)
class Arm:
    """What an arm's turns left."""

    policy: DraftPolicy
    hold_s: float
    """Longest time that a prompt waits for others."""
    windows: list[Window] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    """Steps by arm of the policy."""

    def row(self) -> dict[str, Any]:
        """Figures of all turns but the first, which warms up."""
        windows = self.windows[1:]
        steps = sum(w.num_steps for w in windows)
        return {
            "turns": len(windows),
            "tokens_per_s": statistics.median(w.num_tokens / w.seconds for w in windows),
            "by_turn": [w.num_tokens / w.seconds for w in windows],
            "tokens_per_step_of_the_batch": sum(w.num_tokens for w in windows) / steps,
            "step_ms": sum(w.seconds for w in windows) / steps * 1e3,
            "steps": {name: count for name, count in sorted(self.steps.items()) if count},
        }


def measure(
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    batch: int,
    length: int,
    turns: int,
    window_s: float,
    names: Sequence[str],
) -> dict[str, Arm]:
    """All arms in turns, each turn beginning with another arm; one more turn than ``turns``."""
    learning, hold_s = engine.policy, engine.scheduler.prefill_hold_s
    arms = {}
    for name in names:
        bare = name.removesuffix(UNHELD)
        policy = learning if bare == POLICY else Fixed(*FIXED[bare], [], [])
        arms[name] = Arm(policy, hold_s if bare == name else 0.0)
    try:
        with torch.inference_mode():
            for number, place in itertools.product(range(turns + 1), range(len(names))):
                arm = arms[names[(number + place) % len(names)]]
                engine.policy, engine.scheduler.prefill_hold_s = arm.policy, arm.hold_s
                feed = Feed(engine, prompts, batch, length)
                feed.run(WARM_S)
                before = engine.figures().steps_by_arm
                arm.windows.append(feed.run(window_s))
                for (kind, draft_k), count in engine.figures().steps_by_arm.items():
                    key = f"{kind}-k{draft_k}"
                    more = count - before.get((kind, draft_k), 0)
                    arm.steps[key] = arm.steps.get(key, 0) + more
                feed.stop()
    finally:
        engine.policy, engine.scheduler.prefill_hold_s = learning, hold_s
    return arms


def main(
    target: Annotated[Path, typer.Option(help="folder of the target")],
    run_dir: Annotated[Path, typer.Option(help="the drafter's run; its newest version is taken")],
    out: Annotated[Path, typer.Option(help="where the result goes")] = Path(
        "benchmarks/results/full_batch.json"
    ),
    batches: Annotated[str, typer.Option(help="by commas")] = "8,32",
    max_tokens: Annotated[int, typer.Option(help="of each request")] = 128,
    arms: Annotated[str, typer.Option(help="names by semicolons; empty: all")] = "",
    turns: Annotated[int, typer.Option(help="of each arm, after one that warms up")] = 4,
    window_s: Annotated[float, typer.Option(help="measured seconds of a turn")] = 1.5,
    prompts: Annotated[int, typer.Option(help="of each domain")] = 128,
    device: str = "cuda",
) -> None:
    """All arms at all batch sizes."""
    sizes = [int(size) for size in batches.split(",")]
    chosen = known("arms", arms.split(";"), ARMS) if arms else ARMS
    names = list(dict.fromkeys((OFF, *chosen)))
    drafter = run_dir / "weights" / str(max(versions(run_dir / "weights")))
    texts = prompts_for(load_tokenizer(target), prompts)
    mixed = [ids for pair in zip(*texts.values(), strict=True) for ids in pair]
    rows: list[dict[str, Any]] = []
    figures = {"max_tokens": max_tokens, "window_s": window_s, **made_by(target, run_dir)}
    with engine_for(target, drafter, max(sizes), device) as engine:
        for size in sizes:
            done = measure(engine, mixed, size, max_tokens, turns, window_s, names)
            off = done[OFF].row()["tokens_per_s"]
            for name, arm in done.items():
                row = arm.row()
                rows.append(
                    {"batch": size, "arm": name, "vs_off": row["tokens_per_s"] / off, **row}
                )
                say(f"batch {size} {name}: {rows[-1]}")
            write_result(out, {**figures, "rows": rows})
        figures["policy"] = engine.policy_figures()
    write_result(out, {**figures, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
