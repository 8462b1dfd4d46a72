"""What block verification gains over the standard rule on the bundled target, both exact.

    python -m benchmarks.verification        # some minutes on two CPU cores

Sampled continuations of held-out prompts of the three domains, the bundled drafter at a fixed K,
each prompt by both rules in turn on one engine. Counted are tokens_per_step; the rules cost the
same pass of the target. Writes ``benchmarks/results/verification.json``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness.results import write_result
from buffer.records import Acceptance
from configs.load import load_settings
from examples import corpus
from serving.build import build_engine
from serving.engine.loop import Engine
from serving.engine.verifying import Rule
from serving.requests import Output, Request, SamplingParams

RULES: tuple[Rule, ...] = ("standard", "block")
BATCH = 16


def sampled(
    engine: Engine, rule: Rule, prompts: list[str], temperature: float, max_tokens: int
) -> Acceptance:
    """Continue every prompt once; steps, proposed and accepted of all together."""
    engine.rule = rule
    total = Acceptance()

    def take(output: Output) -> None:
        nonlocal total
        if output.finish_reason:
            spent = output.stats
            total += Acceptance(spent.steps, spent.proposed, spent.accepted)

    for number, prompt in enumerate(prompts):
        ids = tuple(engine.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True)
        engine.submit(Request(f"{rule}-{number}", ids, sampling, capture=False), take)
    with torch.inference_mode():
        while engine.step():
            pass
    return total


def main(
    out: Annotated[Path, typer.Option(help="where the result goes")] = Path(
        "benchmarks/results/verification.json"
    ),
    num_prompts: Annotated[int, typer.Option(help="of each domain")] = 64,
    max_tokens: int = 64,
) -> None:
    """Both rules over domains, temperatures and K."""
    results: list[dict[str, Any]] = []
    for draft_k in (4, 8):
        with tempfile.TemporaryDirectory() as folder:
            chosen = [
                f"run_dir={folder}",
                f"engine.max_batch={BATCH}",
                "policy.kind=fixed",
                f"policy.draft_k={draft_k}",
                "drafter.suffix.enabled=false",
            ]
            settings = load_settings([Path("configs/demo.yaml")], chosen, {})
            engine = build_engine(settings).engine
            for domain in corpus.DOMAINS:
                prompts = corpus.prompts(domain, num_prompts, seed=11)
                for temperature in (0.6, 1.0):
                    row: dict[str, Any] = {
                        "domain": domain,
                        "temperature": temperature,
                        "draft_k": draft_k,
                    }
                    for rule in RULES:
                        found = sampled(engine, rule, prompts, temperature, max_tokens)
                        row[f"{rule}_tokens_per_step"] = found.tokens_per_step
                        row[f"{rule}_steps"] = found.num_steps
                    row["gain"] = row["block_tokens_per_step"] / row["standard_tokens_per_step"]
                    results.append(row)
                    print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    write_result(out, {"rows": results})


if __name__ == "__main__":
    typer.run(main)
