"""What block verification gains over the standard rule on the bundled target; both are exact.

    python -m benchmarks.verification        # some minutes on two CPU cores

Sampled continuations of held-out prompts of three domains with the bundled drafter at a fixed K, on
one engine for each rule. The figure is tokens_per_step; a pass of the target costs the same with
either rule. Writes ``benchmarks/results/verification.json``.
"""

from __future__ import annotations

from typing import Annotated

import typer

from benchmarks.harness.engines import DEMO, Built, engine_from
from benchmarks.harness.loops import answer_all
from benchmarks.harness.results import RESULTS, Out, rounded, write_result
from buffer.records import Acceptance
from examples import corpus

RULES = ("standard", "block")
BATCH = 16
TEMPERATURES = (0.6, 1.0)


def sampled(built: Built, domain: corpus.Domain, count: int, temperature: float) -> Acceptance:
    """Steps, proposed and accepted tokens over one continuation of every prompt."""
    tokenizer = built.service.model.tokenizer
    texts = corpus.prompts(domain, count, seed=11)
    ids = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    turn = answer_all(built.engine, ids, 64, fields_of=lambda _number: {"temperature": temperature})
    return sum((answer.acceptance for answer in turn.answers), Acceptance())


def main(
    out: Out = RESULTS / "verification.json",
    num_prompts: Annotated[int, typer.Option(help="per domain")] = 64,
) -> None:
    """Measure both rules over domains, temperatures and K."""
    results = []
    for draft_k in (4, 8):
        found: dict[tuple[str, float], dict[str, Acceptance]] = {}
        for rule in RULES:
            chosen = [
                f"engine.max_batch={BATCH}",
                f"engine.verification={rule}",
                "policy.kind=fixed",
                f"policy.draft_k={draft_k}",
                "drafter.suffix.enabled=false",
            ]
            with engine_from(DEMO, chosen) as built:
                for domain in corpus.DOMAINS:
                    for heat in TEMPERATURES:
                        by_rule = found.setdefault((domain, heat), {})
                        by_rule[rule] = sampled(built, domain, num_prompts, heat)
        for (domain, heat), by_rule in found.items():
            steps = {rule: by_rule[rule].tokens_per_step for rule in RULES}
            row = {
                "domain": domain,
                "temperature": heat,
                "draft_k": draft_k,
                **{f"{rule}_tokens_per_step": figure for rule, figure in steps.items()},
                "gain": (steps["block"] or 0.0) / (steps["standard"] or 1.0),
            }
            results.append(row)
            print(rounded(row), flush=True)
    write_result(out, {"rows": results})


if __name__ == "__main__":
    typer.run(main)
