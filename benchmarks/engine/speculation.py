"""Drafting against plain decoding: a fixed K with forced acceptance, and the policy deciding."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.engine.engines import Made, Place, engine_of
from benchmarks.engine.forced import forced_acceptance
from benchmarks.engine.graphs import Replays
from benchmarks.engine.load import Prompt, Turn, answer_all, random_prompts
from benchmarks.engine.report import Report
from policies.fixed import FixedPolicy

DRAFT_K = 4
_FEWER_K = 2
"""Its rounds are subtracted; three and five verified rows have kernels of one kind."""


def measure_forced(
    report: Report, place: Place, shape: str, context: int, num_turns: int, replays: Replays
) -> None:
    """Row ``forced``: 3 tokens a step at K = 4, batch 1, against plain decoding of one engine."""
    chosen = {
        "engine": {"max_batch": 1, "max_model_len": context + 512},
        "drafter": {"max_draft": DRAFT_K},
    }
    with (
        forced_acceptance(place.device),
        engine_of(shape, place, chosen, num_versions=1) as made,
        torch.inference_mode(),
    ):
        for temperature in (0.0, 1.0):
            what = {"shape": shape, "batch": 1, "context": context, "temperature": temperature}

            def row(temperature: float = temperature) -> dict[str, Any]:
                return forced_row(made, context, temperature, num_turns, replays)

            report.attempt("forced", what, 15, row)


def forced_row(
    made: Made, context: int, temperature: float, num_turns: int, replays: Replays
) -> dict[str, Any]:
    """Measured speed-up, and what the drafter's and the target's device times allow.

    Three tokens a step over one target pass and K passes of the drafter: the bound without anything
    else. Taking committed rows in is the drafter's work too, but not a draft's; with its share in
    each pass the bound is lower.
    """
    engine = made.service.engine
    prompts = random_prompts(1, context, engine.vocab_size)
    arms = {"off": FixedPolicy("none", 0), "on": FixedPolicy("eagle3", DRAFT_K)}
    turns: dict[str, list[Turn]] = {arm: [] for arm in arms}
    before = engine.figures()
    for number in range(num_turns + 1):
        for arm, policy in arms.items():
            engine.policy = policy
            turn = answer_all(engine, prompts, 193, temperature=temperature)
            if number:  # the first one warms up
                turns[arm].append(turn)
    off, on = (statistics.median(t.decode_tokens_per_s for t in turns[arm]) for arm in arms)
    after = engine.figures()
    rounds = after.num_rounds - before.num_rounds
    accepted = after.num_accepted_tokens - before.num_accepted_tokens
    times = program_times(made, replays)
    bounds = {
        "bound_by_passes": 3 / (1 + DRAFT_K * times["pass_over_target"]),
        "bound_with_taking_in": 3 / (1 + DRAFT_K * times["with_taking_in_over_target"]),
    }
    return {
        "draft_k": DRAFT_K,
        "off_tokens_per_s": off,
        "on_tokens_per_s": on,
        "speed_up": on / off,
        "tokens_per_step": 1 + accepted / rounds,
        **times,
        **bounds,
        **{f"share_of_{name}": on / off / bound for name, bound in bounds.items()},
        "drafter_bytes": made.drafter_bytes,
        "num_turns": num_turns,
    }


def program_times(made: Made, replays: Replays) -> dict[str, float]:
    """Device times of the greedy programs of batch 1, over the lane that was decoded last.

    What a round takes beyond the same round with given drafts is the drafter's. A fourth of it at
    K = 4 is ``with_taking_in``: a pass and its share of computing the committed rows. A pass alone
    is half of what it is more at K = 4 than at K = 2, where the taking in is the same but for two
    rows.
    """
    assert made.service.engine.programs is not None
    rounds = made.service.engine.programs.rounds

    def seconds(num_draft: int, source: str) -> float:
        host_s: list[float] = []
        launched = replays.during(
            lambda: host_s.append(rounds.device_seconds(1, num_draft, source))
        )
        return launched[-1].device_s() if launched else host_s[0]

    target = seconds(0, "none")
    verify, whole = (seconds(DRAFT_K, source) for source in ("suffix", "eagle3"))
    fewer_verify, fewer_whole = (seconds(_FEWER_K, source) for source in ("suffix", "eagle3"))
    drafter, fewer = whole - verify, fewer_whole - fewer_verify
    with_taking_in = max(drafter, 0.0) / DRAFT_K
    one_pass = max(drafter - fewer, 0.0) / (DRAFT_K - _FEWER_K)
    return {
        "target_ms": target * 1e3,
        "verify_round_ms": verify * 1e3,
        "round_ms": whole * 1e3,
        "pass_ms": one_pass * 1e3,
        "pass_over_target": one_pass / target,
        "with_taking_in_ms": with_taking_in * 1e3,
        "with_taking_in_over_target": with_taking_in / target,
    }


def measure_policy(
    report: Report,
    place: Place,
    shape: str,
    batches: Sequence[int],
    num_prompt: int,
    max_tokens: int,
    num_turns: int,
) -> None:
    """Rows ``policy``: deciding by itself against an engine that has no drafter."""
    longest = num_prompt + max_tokens
    pages = (longest + 16) // 16 + 2
    engine = {
        "max_batch": max(batches),
        "max_model_len": longest,
        "num_pages": 2 * max(batches) * pages,
    }
    drafting = {
        "engine": engine,
        "drafter": {"max_draft": DRAFT_K},
        "policy": {"kind": "goodput"},
    }
    with engine_of(shape, place, {"engine": engine}) as off:
        for acceptance in ("random", "forced"):
            forced = forced_acceptance(place.device)
            how = forced if acceptance == "forced" else contextlib.nullcontext()

            def rows(acceptance: str = acceptance) -> None:
                with (
                    engine_of(shape, place, drafting, num_versions=1) as on,
                    torch.inference_mode(),
                ):
                    for batch in batches:
                        prompts = random_prompts(batch, num_prompt, on.service.engine.vocab_size)
                        what = {"shape": shape, "batch": batch, "acceptance": acceptance}

                        def row(prompts: Sequence[Prompt] = prompts) -> dict[str, Any]:
                            return policy_row(on, off, prompts, max_tokens, num_turns)

                        report.attempt("policy", what, 10, row)

            with how:
                report.attempt("policy", {"shape": shape, "acceptance": acceptance}, 60, rows)


def policy_row(
    on: Made, off: Made, prompts: Sequence[Prompt], max_tokens: int, num_turns: int
) -> dict[str, Any]:
    """Interleaved turns of the same prompts; the first of each arm is told apart."""
    engines = {"off": off.service.engine, "on": on.service.engine}
    turns: dict[str, list[Turn]] = {arm: [] for arm in engines}
    before = engines["on"].figures()
    for number in range(num_turns + 1):
        for arm in engines if number % 2 else reversed(engines):
            turns[arm].append(answer_all(engines[arm], prompts, max_tokens))
    after = engines["on"].figures()
    first = turns["on"].pop(0).decode_tokens_per_s / turns["off"].pop(0).decode_tokens_per_s
    speeds = {arm: [t.decode_tokens_per_s for t in turns[arm]] for arm in engines}
    pairs = [on / off for off, on in zip(speeds["off"], speeds["on"], strict=True)]
    arms = {
        f"{drafter} {draft_k}": count - before.steps_by_arm.get((drafter, draft_k), 0)
        for (drafter, draft_k), count in after.steps_by_arm.items()
    }
    accepted = after.num_accepted_tokens - before.num_accepted_tokens
    return {
        "off_tokens_per_s": statistics.median(speeds["off"]),
        "on_tokens_per_s": statistics.median(speeds["on"]),
        "ratio": statistics.median(pairs),
        "ratios": pairs,
        "first_turn_ratio": first,
        "tokens_per_step": 1 + accepted / (sum(arms.values()) * len(prompts)),
        "steps_by_arm": {arm: count for arm, count in arms.items() if count},
        "num_turns": num_turns,
    }
