"""What a request with penalties and biases costs a step of the bundled target, itself and its
neighbours: programs of fixed shape, which adjust logits themselves, against passes.

    python -m benchmarks.engine.adjusted_steps    # two minutes on one GPU

Greedy requests as in ``benchmarks.engine.steps``, of which none, one or all have penalties and
300 biases; outputs of both engines must be equal. Writes
``benchmarks/results/adjusted_steps.json`` after every row.
"""

from __future__ import annotations

import logging
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.engine.steps import Fixed, decode, engine_with
from benchmarks.harness.results import write_result
from examples import corpus
from serving.engine.loop import Engine

ARMS = (("none", 0), ("eagle3", 4))
ADJUSTED = {
    "presence_penalty": 0.5,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.1,
    "logit_bias": tuple((token, -1.0) for token in range(300, 600)),
}


def step_ms(
    engine: Engine,
    arm: tuple[str, int],
    prompts: list[tuple[int, ...]],
    max_tokens: int,
    num_adjusting: int,
) -> tuple[float, list[list[int]]]:
    """Median time of a step, the second time round, and what was answered."""
    policy = Fixed(*arm, [], [])
    answers: list[list[int]] = []
    for _ in range(2):
        policy.times.clear()
        answers, _ = decode(
            engine, policy, prompts, max_tokens,
            lambda number: ADJUSTED if number < num_adjusting else {},
        )  # fmt: skip
    return statistics.median(policy.times) * 1e3, answers


def main(
    out: Annotated[Path, typer.Option(help="where the result goes")] = Path(
        "benchmarks/results/adjusted_steps.json"
    ),
    batches: str = "1,8,64",
    max_tokens: int = 48,
    device: str = "cuda",
    budget_s: Annotated[float, typer.Option(help="no row is begun after this time")] = 300.0,
) -> None:
    """Both engines over batch sizes, arms, and how many requests adjust."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    started = time.perf_counter()
    sizes = [int(b) for b in batches.split(",")]
    rows: list[dict[str, Any]] = []
    with (
        engine_with("always", max(sizes), device) as (programs, _),
        engine_with("never", max(sizes), device) as (passes, _),
    ):
        texts = corpus.prompts("python", max(sizes), seed=11)
        ids = [tuple(programs.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
        cases = [
            (size, arm, num_adjusting)
            for size in sizes
            for arm in ARMS
            for num_adjusting in sorted({0, 1, size})
        ]
        for size, arm, num_adjusting in cases:
            if time.perf_counter() - started > budget_s:
                print(f"stopped after {budget_s} s", flush=True)
                break
            given = (arm, ids[:size], max_tokens, num_adjusting)
            by_programs, answers = step_ms(programs, *given)
            by_passes, others = step_ms(passes, *given)
            row = {
                "batch": size, "drafter": arm[0], "draft_k": arm[1], "adjusting": num_adjusting,
                "programs_step_ms": by_programs, "passes_step_ms": by_passes,
                "mismatched": sum(a != b for a, b in zip(answers, others, strict=True)),
            }  # fmt: skip
            rows.append(row)
            write_result(out, {"rows": rows, "is_complete": len(rows) == len(cases)})
            shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
            print(shown, flush=True)


if __name__ == "__main__":
    typer.run(main)
