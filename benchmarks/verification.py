"""What block verification gains over the standard rule on the bundled target; both are exact.

    python -m benchmarks.verification        # some minutes on two CPU cores

Sampled continuations of held-out prompts of three domains, the bundled drafter at a fixed K, each
prompt by both rules in turn on one engine. The figure is tokens_per_step; a pass of the target
costs the same by either rule. Writes ``benchmarks/results/verification.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from serving.engine.verifying import Rule

from benchmarks.harness.engines import DEMO, engine_from, verification
from benchmarks.harness.loops import answer_all
from benchmarks.harness.results import rounded, write_result
from buffer.records import Acceptance
from examples import corpus
from serving.engine.loop import Engine

RULES: tuple[Rule, ...] = ("standard", "block")
BATCH = 16


def sampled(
    engine: Engine, rule: Rule, prompts: list[str], temperature: float, max_tokens: int
) -> Acceptance:
    """Steps, proposed and accepted tokens over one continuation of every prompt."""
    tokenizer = engine.tokenizer
    ids = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in prompts]
    with verification(engine, rule):
        turn = answer_all(
            engine, ids, max_tokens, fields_of=lambda _number: {"temperature": temperature}
        )
    return sum((answer.acceptance for answer in turn.answers), Acceptance())


def main(
    out: Annotated[Path, typer.Option(help="result file")] = Path(
        "benchmarks/results/verification.json"
    ),
    num_prompts: Annotated[int, typer.Option(help="per domain")] = 64,
    max_tokens: int = 64,
) -> None:
    """Measure both rules over domains, temperatures and K."""
    results: list[dict[str, Any]] = []
    for draft_k in (4, 8):
        chosen = [
            f"engine.max_batch={BATCH}",
            "policy.kind=fixed",
            f"policy.draft_k={draft_k}",
            "drafter.suffix.enabled=false",
        ]
        with engine_from(DEMO, chosen) as built:
            for domain in corpus.DOMAINS:
                prompts = corpus.prompts(domain, num_prompts, seed=11)
                for temperature in (0.6, 1.0):
                    row: dict[str, Any] = {
                        "domain": domain,
                        "temperature": temperature,
                        "draft_k": draft_k,
                    }
                    for rule in RULES:
                        found = sampled(built.engine, rule, prompts, temperature, max_tokens)
                        row[f"{rule}_tokens_per_step"] = found.tokens_per_step
                        row[f"{rule}_steps"] = found.num_steps
                    row["gain"] = row["block_tokens_per_step"] / row["standard_tokens_per_step"]
                    results.append(row)
                    print(rounded(row), flush=True)
    write_result(out, {"rows": results})


if __name__ == "__main__":
    typer.run(main)
