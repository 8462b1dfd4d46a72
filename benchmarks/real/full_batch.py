"""Speculation on a target trained for this benchmark, with a full batch as in a loaded server.

    python -m benchmarks.real.full_batch --target runs/real/target --run-dir runs/real/run

``benchmarks.real.speculation`` answers groups of requests that start together, so its figures
include the time in which only a group's last requests are left. Here a new request starts as soon
as one ends, and the first ones have staggered lengths, so that requests do not end together. Arms
alternate on the same held-out prompts in the same order. A figure is the number of tokens in a time
window divided by its seconds, prefill chunks included; medians over an arm's turns are reported.
Arms named ``unheld`` have their own engine, in which no prompt waits for others
(``engine.prefill_hold_ms=0``). Greedy, bfloat16, no HTTP; nothing is captured, no prefix is cached.

Writes ``benchmarks/results/full_batch.json`` after every batch size.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness.arms import LEARNED
from benchmarks.harness.engines import Built
from benchmarks.harness.loops import Feed, Prompt, Window, arm_steps, greedy_requests
from benchmarks.harness.results import RESULTS, Out, known, say, write_result
from benchmarks.real.speculation import FIXED, OFF, POLICY, engine_for, made_by, prompts_for
from buffer.folder_weights import FolderWeights
from policies.fixed import FixedPolicy
from policies.interface import DraftPolicy
from targets.tokenizer import load_tokenizer

UNHELD = ", unheld"
ARMS = (
    *(*FIXED, POLICY),
    *(name + UNHELD for name in (OFF, f"{LEARNED}-k4", POLICY)),
)
WARM_S = 0.4
"""Warm-up seconds before the window of a turn."""


@dataclass(slots=True)
class Arm:
    """One arm and its turns so far."""

    policy: DraftPolicy | None
    """``None``: the engine's own."""
    built: Built
    """The engine it runs on."""
    windows: list[Window] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    """Number of steps per (drafter, K)."""

    def row(self) -> dict[str, Any]:
        """Figures of all turns except the first, which is the warm-up."""
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
    held: Built,
    unheld: Built | None,
    prompts: Sequence[Prompt],
    batch: int,
    length: int,
    turns: int,
    window_s: float,
    names: Sequence[str],
) -> dict[str, Arm]:
    """Alternate all arms for ``turns`` turns after a warm-up; each turn starts with another arm.

    Args:
        unheld: engine of the arms in which no prompt waits for others; ``None`` if unused.
    """
    arms = {}
    for name in names:
        bare = name.removesuffix(UNHELD)
        policy = None if bare == POLICY else FixedPolicy(*FIXED[bare])
        built = held if bare == name else unheld
        assert built is not None
        arms[name] = Arm(policy, built)
    for number, offset in itertools.product(range(turns + 1), range(len(names))):
        arm = arms[names[(number + offset) % len(names)]]
        arm.built.policy.play(arm.policy)
        requests = greedy_requests(prompts, batch, length)
        _one_turn(arm, Feed(arm.built.engine, requests, batch), window_s)
    for arm in arms.values():
        arm.built.policy.play()
    return arms


def _one_turn(arm: Arm, feed: Feed, window_s: float) -> None:
    feed.run(WARM_S)
    before = arm.built.engine.figures()
    arm.windows.append(feed.run(window_s))
    for key, count in arm_steps(before, arm.built.engine.figures()).items():
        arm.steps[key] = arm.steps.get(key, 0) + count
    feed.stop()


def main(
    target: Annotated[Path, typer.Option(help="folder of the target")],
    run_dir: Annotated[Path, typer.Option(help="the drafter's run; its newest version is used")],
    out: Out = RESULTS / "full_batch.json",
    batches: Annotated[str, typer.Option(help="comma-separated")] = "8,32",
    max_tokens: Annotated[int, typer.Option(help="completion tokens per request")] = 128,
    arms: Annotated[str, typer.Option(help="separated by semicolons; empty: all")] = "",
    turns: Annotated[int, typer.Option(help="turns per arm, after a warm-up turn")] = 4,
    window_s: Annotated[float, typer.Option(help="measured seconds of a turn")] = 1.5,
    prompts: Annotated[int, typer.Option(help="prompts per domain")] = 128,
    device: str = "cuda",
) -> None:
    """Measure all arms at all batch sizes."""
    sizes = [int(size) for size in batches.split(",")]
    chosen = known("arms", arms.split(";"), ARMS) if arms else ARMS
    names = list(dict.fromkeys((OFF, *chosen)))
    store = FolderWeights(run_dir / "weights")
    drafter = store.path(max(store.versions()))
    texts = prompts_for(load_tokenizer(target), prompts)
    mixed = [ids for pair in zip(*texts.values(), strict=True) for ids in pair]
    rows: list[dict[str, Any]] = []
    figures = {"max_tokens": max_tokens, "window_s": window_s, **made_by(target, run_dir)}
    with ExitStack() as stack:
        start = partial(engine_for, target, drafter, max(sizes), device)
        held, unheld = stack.enter_context(start()), None
        if any(name.endswith(UNHELD) for name in names):
            unheld = stack.enter_context(start("engine.prefill_hold_ms=0"))
        for size in sizes:
            done = measure(held, unheld, mixed, size, max_tokens, turns, window_s, names)
            off = done[OFF].row()["tokens_per_s"]
            for name, arm in done.items():
                row = arm.row()
                rows.append(
                    {"batch": size, "arm": name, "vs_off": row["tokens_per_s"] / off, **row}
                )
                say(f"batch {size} {name}: {rows[-1]}")
            write_result(out, {**figures, "rows": rows})
        figures["policy"] = held.policy.figures()
    write_result(out, {**figures, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
