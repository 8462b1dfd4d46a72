"""Published rules for the length of drafts beside ours, replayed on the same traces.

    python -m benchmarks.policy_comparison                 # about five minutes on two cores
    python -m benchmarks.policy_comparison --seconds 5 --batches 1

The bundled target decodes sampled text of three domains, drafts K = 8 in every step, and notes the
drafter's figures of every position. So every K, and every rule that cuts drafts by these figures,
is scored exactly on these steps. Times are of a profile of the same server, which tells drafting
and verification apart: a rule that cuts saves verification only. ``ltd`` and ``specdecpp`` are
fitted to three quarters of the steps, which flatters them; all rules are judged on all steps, once
as they were published, and once over our floor (``policies/guard.py``), as they are served.

``RULES`` says whose rule each policy is, and in what it differs. Published speeds of others are on
other targets and hardware, and stand in docs/policies.md. Writes ``policy_comparison.json`` and
``rows/policy_comparison.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness.arms import LEARNED
from benchmarks.harness.engines import build
from benchmarks.harness.results import RESULTS, Out, Row, say, write_result, write_rows
from benchmarks.policies import MAX_DRAFT, TEMPERATURE, generate, settings_of
from configs.schema import PolicySettings
from policies.cli import table
from policies.evaluation import Evaluation, evaluate
from policies.logged import LoggedStep
from policies.replayed_log import ReplayedLog
from policies.run_log import read_steps
from serving.profile import profile_steps
from trainer.confidence_head import HeadFit, fit_head, samples_of
from trainer.ltd import FullInformation, fit_full_information, split

SOURCE = "python -m benchmarks.policy_comparison"
RULES = {
    "goodput": "ours, the default",
    "ragged": "ours, after TETRIS (arXiv:2502.15197) and vLLM's adaptive verification (#47808)",
    "hedge": "after HedgeSpec (arXiv:2510.20064), here with a single drafter",
    "ltd": "Learning to Draft (arXiv:2603.01639), lengths of chains alone, full information",
    "specdecpp": "SpecDec++ (arXiv:2405.19715), its head on the drafter's figures",
    "adaedl": "AdaEDL (arXiv:2410.18351)",
    "confidence": "maximum confidence, as transformers' assistant_confidence_threshold = 0.4",
    "table": "vLLM's num_speculative_tokens_per_batch_size, TensorRT-LLM's draft_len_schedule",
    "ema_tiers": "SGLang's --speculative-adaptive",
    "ucb": "after BanditSpec's UCBSpec (arXiv:2505.15141), rewards in tokens per second",
    "exp3s": "after BanditSpec's EXP3Spec, with a fixed share",
    "thompson": "Thompson sampling by position",
}
"""Whose rule each policy is."""
PROFILE_REPEATS, PROFILE_CONTEXT = 20, 128
HELD_OUT = 0.25
EVERY_K = (
    "policy.kind=confidence",
    "policy.confidence.threshold=0.000001",
    "policy.cutting.packed=false",
    "policy.random_share=0.5",
    f"policy.draft_k={MAX_DRAFT}",
)
"""K = 8 in every step, and nothing cut."""
AS_PUBLISHED, SERVED = "as published", "over the floor"


def fitted(log: ReplayedLog, folder: Path) -> PolicySettings:
    """Settings with both networks, fitted to three quarters of a log."""
    rows = split(log, HELD_OUT)
    own: list[LoggedStep] = list(log.rows(rows).steps)
    paths = {}
    for kind, network in (
        ("ltd", fit_full_information(log, rows, FullInformation())),
        ("specdecpp", fit_head(samples_of(own, log.drafter), HeadFit())),
    ):
        paths[kind] = folder / f"{kind}.safetensors"
        paths[kind].write_bytes(network.to_bytes())
    settings = {kind: {"weights": path} for kind, path in paths.items()}
    return PolicySettings.model_validate(settings)


def rows_of(found: Mapping[str, Evaluation], batches: Sequence[int]) -> Iterator[Row]:
    """Each rule's speed; no goals: those of ours are in ``benchmarks.policies``."""
    loads = ", ".join(map(str, batches))
    for how, evaluation in found.items():
        for one in evaluation.policies:
            if one.name in RULES:
                yield Row(
                    f"bundled target, temperature {TEMPERATURE}, batch {loads}: {one.name}, {how}",
                    "replayed speed over the best fixed K of each load",
                    round(1 - one.regret_fixed, 4),
                    None,
                    None,
                )


def measure(
    seconds: float, batches: Sequence[int], folder: Path
) -> tuple[dict[str, Any], dict[str, Evaluation]]:
    """Traces, profile, fits and the tables."""
    settings = settings_of(folder, max(batches), EVERY_K)
    service, _ = build(settings)
    samples = profile_steps(service.engine.parts, PROFILE_REPEATS, PROFILE_CONTEXT)
    generate(service, settings, batches, seconds)
    service.engine.stop()
    steps, _ = read_steps(settings.buffer.url, folder, 1_000_000)
    log = ReplayedLog.of(steps, LEARNED, samples, MAX_DRAFT)
    rules = fitted(log, folder)
    found = {
        AS_PUBLISHED: evaluate(log, rules.model_copy(update={"guard": False}), RULES),
        SERVED: evaluate(log, rules, RULES),
    }
    for how, evaluation in found.items():
        say(how)
        for line in table(evaluation):
            print(line)
    result = {
        "batches": list(batches), "seconds": seconds, "num_steps": len(log.steps),
        "rules": RULES, "profile": [asdict(one) for one in samples],
        "evaluations": {how: asdict(one) for how, one in found.items()},
    }  # fmt: skip
    return result, found


def main(
    seconds: Annotated[float, typer.Option(help="seconds of traces at each load")] = 60.0,
    batches: Annotated[list[int] | None, typer.Option(help="loads")] = None,
    out: Out = RESULTS / "policy_comparison.json",
) -> None:
    """Make traces, replay every rule on them, and write the result."""
    torch.set_num_threads(1)
    loads = batches or [1, 4, 8]
    with tempfile.TemporaryDirectory() as name:
        result, found = measure(seconds, loads, Path(name))
    write_result(out, result)
    write_rows("policy_comparison", rows_of(found, loads), SOURCE, out.parent)
    say(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
