"""Is this checkout as fast as another? Plain and drafted decoding, paired.

    python -m benchmarks.house --against ../before            # two CPU cores, about 15 minutes
    python -m benchmarks.house --against ../before --gpu      # one H100 or H200, 8 minutes at most
    python -m benchmarks.house                                # this checkout alone
    python -m benchmarks.house --against ../before --shapes bundled --temperature 0.5 \\
        --arms plain,lookup:4,learned:2,learned:4         # as the demo asks, 10 minutes

Each checkout is measured by its own long-lived process (``harness/side.py``). Turns of the two
alternate, so that both see the same machine conditions, and ratios compare adjacent turns.

On two cores: tokens per second of the bundled target with its drafter, and of a 135M Llama shape,
at batch 1 and 4 with K = 0 to 6, or other arms. At a temperature, every request has its seed. On a
GPU: steps of the 8B and 0.6B shapes, plain and K = 4, at batch 1 and 32, and with a batch that is
kept full. Targets of published shapes have random weights and forced acceptance
(``harness/predictable.py``); each of their answers must follow the target's cycle, and answers of
the bundled target must be equal on both sides.

Writes ``benchmarks/results/house.json`` (``house_gpu.json``; ``house_sampled.json`` at a
temperature) after every case, and rows of the same name in ``benchmarks/results/rows``.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness.arms import LEARNED, LOOKUP, OFF
from benchmarks.harness.results import RESULTS, Row, say, write_result, write_rows
from benchmarks.harness.side import ANSWER

THIS = Path(__file__).resolve().parent.parent
SIDE = Path(__file__).resolve().parent / "harness" / "side.py"
NOW, BEFORE = "now", "before"


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: an arm at one shape and batch size."""

    shape: str
    batch: int
    drafter: str
    draft_k: int
    num_prompt: int
    max_tokens: int
    full_s: float | None = None
    """Seconds to keep the batch full; ``None``: the batch is answered once per turn."""
    temperature: float = 0.0

    def __str__(self) -> str:
        arm = f"K = {self.draft_k}" if self.draft_k else "plain"
        kept = ", kept full" if self.full_s else ""
        lookup = ", lookup" if self.drafter == LOOKUP else ""
        heat = f", temperature {self.temperature:g}" if self.temperature else ""
        return f"{self.shape}, batch {self.batch}{kept}{heat}{lookup}, {arm}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run measures."""

    device: str
    cases: tuple[Case, ...]
    max_batch: int
    max_draft: int
    max_model_len: int
    turns: int
    """Pairs of turns per case, after a warm-up pair."""
    tolerance: float
    """Largest relative loss of speed at which the goal is still met."""


Arm = tuple[str, int]
"""Kind of the drafter, and K."""
CPU_ARMS: tuple[Arm, ...] = (OFF, *((LEARNED, k) for k in range(1, 7)))


def arms_of(names: str) -> tuple[Arm, ...]:
    """Arms as on the command line, e.g. "plain,lookup:4,learned:2".

    Raises:
        ValueError: an arm is none of these.
    """
    kinds = {"lookup": LOOKUP, "learned": LEARNED}
    found = []
    for name in names.split(","):
        kind, _, k = name.partition(":")
        if name == "plain":
            found.append(OFF)
        elif kind in kinds and k in tuple("123456"):
            found.append((kinds[kind], int(k)))
        else:
            raise ValueError(
                f"unknown arm {name!r}: it is plain, lookup:K or learned:K with K from 1 to 6"
            )
    return tuple(found)


def cpu_plan(
    shapes: Sequence[str], turns: int, arms: Sequence[Arm] = CPU_ARMS, temperature: float = 0.0
) -> Plan:
    """Arms at batch 1 and 4; answers of 96 tokens, or 48 for the larger target."""
    cases = tuple(
        Case(
            shape, batch, *arm, 64, 96 if shape != "SmolLM2-135M" else 48, temperature=temperature
        )
        for shape in shapes
        for batch in (1, 4)
        for arm in arms
    )  # fmt: skip
    return Plan("cpu", cases, 4, 6, 512, turns, tolerance=0.03)


def gpu_plan(shapes: Sequence[str], turns: int) -> Plan:
    """Plain and K = 4 at batch 1 and 32, and at batch 32 kept full."""
    arms = (OFF, (LEARNED, 4))
    cases = [
        Case(shape, batch, *arm, 256, 193, full)
        for shape in shapes
        for batch, full in ((1, None), (32, None), (32, 3.0))
        for arm in arms
    ]
    return Plan("cuda", tuple(cases), 32, 4, 512, turns, tolerance=0.02)


class Process:
    """The process that measures one checkout on command."""

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        # The checkout comes first; entries of the caller's own path, such as packages, follow.
        folders = str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")
        path = os.pathsep.join(filter(None, folders))
        # Idle threads of one side must sleep, not spin on a core that the other side uses.
        env = {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(SIDE)],
            cwd=root, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, do: str, **command: Any) -> None:
        """Send a command without waiting."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **command}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to the last command.

        Raises:
            RuntimeError: the process has ended, or the command failed.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                found: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                if "error" in found:
                    raise RuntimeError(f"{self.name}: {found['error']}")
                return found
        raise RuntimeError(f"the process that measures {self.name!r} has ended; see its output")

    def do(self, do: str, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.ask(do, **command)
        return self.answer()

    def build(self, shape: str, plan: Plan, threads: int | None) -> None:
        """Start building the engine of a shape."""
        self.ask(
            "build", shape=shape, device=plan.device, max_batch=plan.max_batch,
            max_draft=plan.max_draft, max_model_len=plan.max_model_len, threads=threads,
            lookup=LOOKUP if any(case.drafter == LOOKUP for case in plan.cases) else None,
        )  # fmt: skip

    def end(self) -> None:
        """Close its input so that it exits; kill it if it does not within 60 s."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


@cache
def bundled_prompts(num_tokens: int, count: int = 64) -> list[list[int]]:
    """Beginnings of Python files, tokenized by the bundled tokenizer and cut to one length."""
    from examples import corpus
    from targets.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(THIS / "examples" / "target")
    texts = corpus.prompts("python", 2 * count, 11, 6 * num_tokens, 6 * num_tokens + 400)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:num_tokens] for text in texts]
    return [i for i in ids if len(i) == num_tokens][:count]


def measure(
    case: Case, sides: Sequence[Process], turns: int, deadline_s: float
) -> dict[str, Any] | None:
    """Alternate turns of one case; ``None`` if no pair was finished before the deadline."""
    found: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    digests_differ = 0
    for number in range(turns + 1):
        if time.monotonic() > deadline_s:
            break
        prompts = _prompts(case, sides[0], number)
        pair = {}
        for side in sides if number % 2 else reversed(sides):
            pair[side.name] = _turn(case, side, prompts)
        digests_differ += len({str(turn.get("digest")) for turn in pair.values()}) > 1
        if number:  # the first pair warms up
            for name, turn in pair.items():
                found[name].append(turn)
    if not found[sides[0].name]:
        return None
    return {**_about(case), **figures(found), "turns_with_unequal_answers": digests_differ}


def _prompts(case: Case, side: Process, number: int) -> list[list[int]]:
    if case.shape != "bundled":
        length = {"batch": case.batch, "length": case.num_prompt}
        made: list[list[int]] = side.do("prompts", **length, seed=number)["prompts"]
        return made
    known = bundled_prompts(case.num_prompt)
    return [known[(case.batch * number + n) % len(known)] for n in range(case.batch)]


def _turn(case: Case, side: Process, prompts: list[list[int]]) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "drafter": case.drafter, "draft_k": case.draft_k, "prompts": prompts,
        "max_tokens": case.max_tokens, "temperature": case.temperature,
    }  # fmt: skip
    if case.full_s is None:
        return side.do("turn", **asked)
    return side.do("full", **asked, batch=case.batch, seconds=case.full_s)


def _about(case: Case) -> dict[str, Any]:
    return {
        "shape": case.shape, "batch": case.batch, "drafter": case.drafter,
        "draft_k": case.draft_k, "is_kept_full": case.full_s is not None,
    }  # fmt: skip


def figures(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each side, and the median ratio of speeds over pairs.

    Args:
        found: side -> its turns, in order; both sides have the same number.
    """
    result: dict[str, Any] = {"num_turns": len(found[NOW])}
    for name, turns in found.items():
        for key in ("tokens_per_s", "cpu_ms_per_token", "step_ms", "tokens_per_step"):
            values = [turn[key] for turn in turns if turn.get(key) is not None]
            result[f"{name}_{key}"] = statistics.median(values) if values else None
    if BEFORE in found:
        pairs = zip(found[NOW], found[BEFORE], strict=True)
        ratios = [now["tokens_per_s"] / before["tokens_per_s"] for now, before in pairs]
        result["speed_ratio"] = statistics.median(ratios)
        result["speed_ratios"] = ratios
        if result["now_cpu_ms_per_token"] and result["before_cpu_ms_per_token"]:
            result["cpu_ratio"] = result["now_cpu_ms_per_token"] / result["before_cpu_ms_per_token"]
        if result["now_step_ms"] and result["before_step_ms"]:
            result["step_ratio"] = result["now_step_ms"] / result["before_step_ms"]
    return result


def row_of(case: Case, figure: dict[str, Any], tolerance: float) -> Row:
    """The row of one case: its speed relative to the other checkout, or its speed alone."""
    if "speed_ratio" not in figure:
        return Row(str(case), "tokens per second", figure["now_tokens_per_s"], None, None)
    ratio = figure["speed_ratio"]
    return Row(
        str(case),
        "tokens per second over those before, median of pairs",
        ratio,
        f"at least {1 - tolerance:.2f}",
        ratio >= 1 - tolerance,
    )


def shapes_of(cases: Sequence[Case]) -> Iterator[tuple[str, list[Case]]]:
    """Cases by shape, in order."""
    for shape in dict.fromkeys(case.shape for case in cases):
        yield shape, [case for case in cases if case.shape == shape]


def line(case: Case, figure: dict[str, Any]) -> str:
    """One case as a line for a terminal."""
    text = f"{case}: {figure['now_tokens_per_s']:,.1f} tokens/s"
    if figure["now_step_ms"] is not None:
        text += f", step {figure['now_step_ms']:.3f} ms"
        text += f", {figure['now_tokens_per_step']:.2f} tokens per step"
    if "speed_ratio" in figure:
        text += f", {figure['speed_ratio']:.3f} of before"
    if "cpu_ratio" in figure:
        text += f" at {figure['cpu_ratio']:.3f} of its CPU time"
    return text


def main(
    gpu: Annotated[bool, typer.Option("--gpu", help="measure on a GPU")] = False,
    against: Annotated[Path | None, typer.Option(help="another checkout")] = None,
    shapes: Annotated[str, typer.Option(help="comma-separated; default: by device")] = "",
    arms: Annotated[
        str, typer.Option(help="on a CPU; comma-separated: plain, lookup:K, learned:K")
    ] = "",
    temperature: Annotated[float, typer.Option(min=0, help="on a CPU")] = 0.0,
    turns: Annotated[int, typer.Option(help="pairs of turns per case")] = 5,
    threads: Annotated[int, typer.Option(help="torch threads per side, on a CPU")] = 1,
    budget_s: Annotated[
        float | None, typer.Option(help="no turn starts after this; default: 3600, 420 on a GPU")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="result file")] = None,
    rows_dir: Annotated[Path, typer.Option(help="folder that holds rows/house.json")] = RESULTS,
) -> None:
    """Measure this checkout, and optionally another one beside it."""
    names = shapes or ("Qwen3-8B,Qwen3-0.6B" if gpu else "bundled,SmolLM2-135M")
    if gpu:
        topic, plan = "house", gpu_plan(names.split(","), turns)
    else:
        topic = "house_sampled" if temperature else "house"
        chosen = arms_of(arms) if arms else CPU_ARMS
        plan = cpu_plan(names.split(","), turns, chosen, temperature)
    out = out or RESULTS / ("house_gpu.json" if gpu else f"{topic}.json")
    budget_s = budget_s or (420.0 if gpu else 3600.0)
    started = time.monotonic()
    source = "python -m benchmarks.house" + (" --gpu" if gpu else "")
    if temperature or arms:
        source += f" --temperature {temperature:g}" + (f" --arms {arms}" if arms else "")
    found: list[dict[str, Any]] = []
    rows: list[Row] = []
    with ExitStack() as stack:
        sides = [Process(NOW, THIS)]
        if against is not None:
            sides.append(Process(BEFORE, against.resolve()))
        for side in sides:
            stack.callback(side.end)
        for index, (shape, cases) in enumerate(shapes_of(plan.cases)):
            for side in sides:  # at the same time on a GPU, where start-up leaves cores idle
                side.build(shape, plan, None if gpu else threads)
                if not gpu:
                    say(f"{shape}: {side.name} built in {side.answer()['built_s']:.1f} s")
            for side in sides if gpu else ():
                say(f"{shape}: {side.name} built in {side.answer()['built_s']:.1f} s")
            left_s = budget_s - (time.monotonic() - started)
            num_left = len({case.shape for case in plan.cases}) - index
            deadline_s = time.monotonic() + left_s / num_left
            for number, case in enumerate(cases):
                share = (deadline_s - time.monotonic()) / (len(cases) - number)
                figure = measure(case, sides, plan.turns, time.monotonic() + share)
                if figure is None:
                    say(f"{case}: no time left")
                    continue
                say(line(case, figure))
                found.append(figure)
                rows.append(row_of(case, figure, plan.tolerance))
                write_result(out, {"rows": found, "is_complete": False})
                write_rows(topic, rows, source, rows_dir)
    is_complete = len(found) == len(plan.cases)
    spent_s = time.monotonic() - started
    write_result(out, {"rows": found, "is_complete": is_complete, "seconds": spent_s})
    failed = [row for row in rows if row.holds is False]
    say(f"{len(found)} of {len(plan.cases)} cases in {spent_s:.0f} s; {len(failed)} below the goal")
    for row in failed:
        print(f"  {row.row}: {row.value}, goal: {row.goal}", flush=True)
    if failed or not is_complete:
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
