"""Step time of the bundled target by drafter, K and batch, with and without penalties.

    python -m benchmarks.engine.steps        # two minutes on one GPU

Greedy requests in the engine's own loop, without HTTP. In additional rows one or all requests have
penalties and 300 biases, to show what these cost the requests that use them and all others.

Writes ``benchmarks/results/steps.json`` after every row.
"""

from __future__ import annotations

import logging
import statistics
import time
from typing import Annotated, Any

import typer

from benchmarks.harness.arms import LEARNED, LOOKUP, OFF
from benchmarks.harness.engines import (
    ONE_GPU,
    Built,
    engine_from,
    making_programs,
    round_seconds,
)
from benchmarks.harness.loops import Prompt, answer_all
from benchmarks.harness.results import RESULTS, Out, write_each
from examples import corpus
from policies.fixed import FixedPolicy

ARMS = (OFF, (LEARNED, 2), (LEARNED, 4), (LOOKUP, 4))
ARMS_ADJUSTED = (OFF, (LEARNED, 4))
ADJUSTED = {
    "presence_penalty": 0.5,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.1,
    "logit_bias": tuple((token, -1.0) for token in range(300, 600)),
}
CHOSEN = (
    "engine.max_model_len=1024",
    "engine.prefix_cache=false",
    "policy.kind=fixed",
    "dtype=float32",
    "drafter.path=examples/drafter/0",
)


def row_of(
    built: Built,
    arm: tuple[str, int],
    prompts: list[Prompt],
    max_tokens: int,
    turns: int,
    num_adjusted: int,
) -> dict[str, Any]:
    """Medians over the turns of one arm, after a warm-up turn."""
    policy = FixedPolicy(*arm)
    seconds, steps = [], []
    for number in range(turns + 1):
        built.policy.play(policy)
        turn = answer_all(
            built.engine,
            prompts,
            max_tokens,
            capture=True,
            fields_of=lambda number: ADJUSTED if number < num_adjusted else {},
        )
        if number:
            seconds.append(turn.seconds)
            steps += built.policy.steps
    row = {
        "batch": len(prompts),
        "drafter": arm[0],
        "draft_k": arm[1],
        "adjusted_requests": num_adjusted,
        "step_ms": statistics.median(step.seconds for step in steps) * 1e3,
        "tokens_per_step": statistics.mean(step.tokens_per_request for step in steps),
        "tokens_per_s": len(prompts) * max_tokens / statistics.median(seconds),
    }
    if not num_adjusted:
        row["device_ms"] = round_seconds(built.engine, len(prompts), *arm) * 1e3
    return row


def main(
    out: Out = RESULTS / "steps.json",
    batches: Annotated[str, typer.Option(help="comma-separated")] = "1,8,64",
    max_tokens: int = 64,
    turns: Annotated[int, typer.Option(help="turns per row, after a warm-up turn")] = 3,
    device: str = "cuda",
    budget_s: Annotated[float, typer.Option(help="no row starts after this")] = 300.0,
) -> None:
    """Measure all arms at all batch sizes."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    started = time.perf_counter()
    sizes = [int(size) for size in batches.split(",")]
    cases = [(size, arm, 0) for size in sizes for arm in ARMS]
    cases += [(s, arm, n) for s in sizes for arm in ARMS_ADJUSTED for n in sorted({1, s})]
    chosen = [*CHOSEN, f"engine.max_batch={max(sizes)}"]
    with engine_from(ONE_GPU, chosen, device) as built:
        about = {
            "start_s": time.perf_counter() - started,
            "making_programs": making_programs(built.engine),
        }
        print(f"engine built in {about['start_s']:.1f} s", flush=True)
        texts = corpus.prompts("python", max(sizes), seed=11)
        tokenizer = built.service.model.tokenizer
        ids = [tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
        rows = (
            row_of(built, arm, ids[:size], max_tokens, turns, num_adjusted)
            for size, arm, num_adjusted in cases
            if time.perf_counter() - started < budget_s
        )
        write_each(out, rows, **about)


if __name__ == "__main__":
    typer.run(main)
