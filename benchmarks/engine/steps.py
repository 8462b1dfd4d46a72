"""What a step of the bundled target costs, by arm and batch: programs of fixed shape (CUDA graphs)
against passes put together for each step.

    python -m benchmarks.engine.steps        # needs a GPU

Real greedy requests in the engine's own loop, without HTTP; both engines in one run, in turns, and
their outputs must be equal. Writes ``benchmarks/results/steps.json``.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness.results import write_result
from configs.load import load_settings
from examples import corpus
from policies.interface import Decision, Outcome, StepObs
from serving.build import build_engine
from serving.engine.loop import Engine
from serving.requests import Output, Request, SamplingParams

ARMS = (("none", 0), ("eagle3", 2), ("eagle3", 4), ("suffix", 4))


@dataclass
class Fixed:
    """Always one arm, as far as the requests allow; keeps step times."""

    drafter: str
    draft_k: int
    times: list[float]
    committed: list[float]
    """Tokens per request of each step."""

    def rest(self) -> Decision | None:
        return None

    def plan(self, obs: StepObs) -> Decision:
        return Decision(self.drafter, min(self.draft_k, obs.max_draft), 1.0, False, "fixed")

    def observe(self, outcome: Outcome) -> None:
        if not outcome.has_prefill:
            self.times.append(outcome.step_s)
            tokens = sum(1 + row.num_accepted for row in outcome.rows)
            self.committed.append(tokens / outcome.batch)

    def on_swap(self, version: int, calibration: dict[str, Any]) -> None: ...
    def figures(self) -> dict[str, Any]:
        return {}


@contextmanager
def engine_with(programs: str, max_batch: int, device: str) -> Iterator[tuple[Engine, float]]:
    """The one-GPU server's engine, and the seconds it took to make."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = [
            f"run_dir={folder}",
            f"engine.programs={programs}",
            f"engine.max_batch={max_batch}",
            "engine.max_model_len=1024",
            "engine.prefix_cache=false",
            "policy.kind=fixed",
            "dtype=float32",
            f"device={device}",
            "drafter.path=examples/drafter/0",
        ]
        started = time.perf_counter()
        settings = load_settings([Path("configs/one_gpu.yaml")], chosen, {})
        engine = build_engine(settings).engine
        yield engine, time.perf_counter() - started


def decode(
    engine: Engine,
    policy: Fixed,
    prompts: list[tuple[int, ...]],
    max_tokens: int,
    shape_of: Callable[[int], dict[str, Any]] = lambda _number: {},
) -> tuple[list[list[int]], float]:
    """Outputs of all prompts as one batch, and the seconds of all steps together.

    Args:
        shape_of: sampling parameters of each prompt beyond greedy decoding.
    """
    engine.policy = policy
    tokens: list[list[int]] = [[] for _ in prompts]
    for number, ids in enumerate(prompts):
        shape = {"temperature": 0.0, **shape_of(number)}
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **shape)

        def take(output: Output, number: int = number) -> None:
            tokens[number] += output.token_ids

        engine.submit(Request(f"{number}", ids, sampling, capture=True), take)
    started = time.perf_counter()
    with torch.inference_mode():
        while engine.step():
            pass
    return tokens, time.perf_counter() - started


def main(
    out: Annotated[Path, typer.Option(help="where the result goes")] = Path(
        "benchmarks/results/steps.json"
    ),
    batches: str = "1,8,64",
    max_tokens: int = 64,
    turns: int = 3,
    device: str = "cuda",
) -> None:
    """Both engines over arms and batch sizes."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    sizes = [int(b) for b in batches.split(",")]
    rows: list[dict[str, Any]] = []
    mismatched = 0
    with (
        engine_with("always", max(sizes), device) as (programs, programs_s),
        engine_with("never", max(sizes), device) as (passes, _),
    ):
        assert programs.programs is not None
        spent = asdict(programs.programs.graphs.spent)
        print(f"start with all programs: {programs_s:.1f} s, of it {spent}", flush=True)
        texts = corpus.prompts("python", max(sizes), seed=11)
        ids = [tuple(programs.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
        for size in sizes:
            for drafter, draft_k in ARMS:
                row: dict[str, Any] = {"batch": size, "drafter": drafter, "draft_k": draft_k}
                answers = []
                for name, engine in (("programs", programs), ("passes", passes)):
                    policy = Fixed(drafter, draft_k, [], [])
                    seconds = []
                    for turn in range(turns + 1):
                        tokens, spent = decode(engine, policy, ids[:size], max_tokens)
                        if turn:  # the first one warms up
                            seconds.append(spent)
                        else:
                            policy.times.clear()
                            policy.committed.clear()
                    answers.append(tokens)
                    row[f"{name}_step_ms"] = statistics.median(policy.times) * 1e3
                    row[f"{name}_tokens_per_step"] = statistics.mean(policy.committed)
                    row[f"{name}_tokens_per_s"] = size * max_tokens / statistics.median(seconds)
                rounds = programs.programs.rounds
                row["device_ms"] = rounds.device_seconds(size, draft_k, drafter) * 1e3
                row["mismatched"] = sum(a != b for a, b in zip(*answers, strict=True))
                mismatched += row["mismatched"]
                rows.append(row)
                shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
                print(shown, flush=True)
    start = {"start_s": programs_s, "making_programs": spent}
    write_result(out, {"rows": rows, "mismatched": mismatched, **start})
    print(f"mismatched: {mismatched}", flush=True)


if __name__ == "__main__":
    typer.run(main)
