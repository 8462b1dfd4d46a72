"""Drafting against plain decoding: a fixed K with forced acceptance, and K chosen by the policy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.engine.graphs import Replays, device_s
from benchmarks.harness.arms import LEARNED, LOOKUP, OFF
from benchmarks.harness.engines import Built, engine_of, round_seconds
from benchmarks.harness.loops import Prompt, Turn, answer_all, arm_steps
from benchmarks.harness.predictable import prompts as predictable_prompts
from benchmarks.harness.results import Report
from policies.fixed import FixedPolicy

DRAFT_K = 4
_FEWER_K = 2
"""The smaller K whose rounds are subtracted; verifying 3 and 5 rows uses similar kernels."""


def measure_forced(
    report: Report,
    device: torch.device,
    shape: str,
    context: int,
    num_turns: int,
    replays: Replays,
) -> None:
    """Add the ``forced`` rows: 3 tokens per step at K = 4, batch 1, against plain decoding."""
    chosen = [
        "engine.max_batch=1",
        f"engine.max_model_len={context + 512}",
        f"drafter.max_draft={DRAFT_K}",
    ]
    with (
        engine_of(shape, device, chosen, num_versions=1, is_predictable=True) as built,
        torch.inference_mode(),
    ):
        for temperature in (0.0, 1.0):
            what = {"shape": shape, "batch": 1, "context": context, "temperature": temperature}

            def row(temperature: float = temperature) -> dict[str, Any]:
                return forced_row(built, context, temperature, num_turns, replays)

            report.attempt("forced", what, 15, row)


def forced_row(
    built: Built, context: int, temperature: float, num_turns: int, replays: Replays
) -> dict[str, Any]:
    """Measured speedup, and its bounds from the device times of drafter and target.

    ``bound_by_passes``: three tokens per step at the cost of one target pass and K drafter passes.
    ``bound_with_taking_in`` is lower: each drafter pass also carries its share of committing rows
    to the drafter's cache.
    """
    engine = built.engine
    prompts = [
        tuple(ids) for ids in predictable_prompts(1, context, engine.inbox.limits.vocab_size)
    ]
    arms = {"off": FixedPolicy(*OFF), "on": FixedPolicy(LEARNED, DRAFT_K)}
    turns: dict[str, list[Turn]] = {arm: [] for arm in arms}
    before = engine.figures()
    for number in range(num_turns + 1):
        for arm, policy in arms.items():
            built.policy.play(policy)
            turn = answer_all(
                engine, prompts, 193, fields_of=lambda _number: {"temperature": temperature}
            )
            if number:  # the first turn is the warm-up
                turns[arm].append(turn)
    off, on = (statistics.median(t.decode_tokens_per_s for t in turns[arm]) for arm in arms)
    after = engine.figures()
    rounds = after.num_rounds - before.num_rounds
    accepted = after.num_accepted_tokens - before.num_accepted_tokens
    times = program_times(built, replays)
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
        "drafter_bytes": built.drafter_bytes,
        "num_turns": num_turns,
    }


def program_times(built: Built, replays: Replays) -> dict[str, float]:
    """Device times of the greedy programs at batch 1, on the request that decoded last.

    The drafter's time is the time of a round minus that of the same round with uploaded drafts.
    ``with_taking_in`` is a quarter of it at K = 4: one pass and its share of committing rows. The
    time of a pass alone is half the difference between the drafter's times at K = 4 and K = 2,
    since all but two of the committed rows are the same.
    """

    def seconds(num_draft: int, source: str) -> float:
        host_s: list[float] = []
        launched = replays.during(
            lambda: host_s.append(round_seconds(built.engine, 1, source, num_draft))
        )
        return device_s(launched[-1]) if launched else host_s[0]

    target = seconds(0, "none")
    verify, whole = (seconds(DRAFT_K, source) for source in (LOOKUP, LEARNED))
    fewer_verify, fewer_whole = (seconds(_FEWER_K, source) for source in (LOOKUP, LEARNED))
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
    device: torch.device,
    shape: str,
    batches: Sequence[int],
    num_prompt: int,
    max_tokens: int,
    num_turns: int,
) -> None:
    """Add the ``policy`` rows: K chosen by the policy, against an engine without a drafter."""
    longest = num_prompt + max_tokens
    pages = (longest + 16) // 16 + 2
    engine = [
        f"engine.max_batch={max(batches)}",
        f"engine.max_model_len={longest}",
        f"engine.num_pages={2 * max(batches) * pages}",
    ]
    drafting = [*engine, f"drafter.max_draft={DRAFT_K}", "policy.kind=goodput"]
    for acceptance in ("random", "forced"):
        forced = acceptance == "forced"

        def rows(acceptance: str = acceptance, forced: bool = forced) -> None:
            with (
                engine_of(shape, device, engine, is_predictable=forced) as off,
                engine_of(shape, device, drafting, 1, is_predictable=forced) as on,
                torch.inference_mode(),
            ):
                for batch in batches:
                    ids = predictable_prompts(batch, num_prompt, on.engine.inbox.limits.vocab_size)
                    prompts = [tuple(prompt) for prompt in ids]
                    what = {"shape": shape, "batch": batch, "acceptance": acceptance}

                    def row(prompts: Sequence[Prompt] = prompts) -> dict[str, Any]:
                        return policy_row(on, off, prompts, max_tokens, num_turns)

                    report.attempt("policy", what, 10, row)

        report.attempt("policy", {"shape": shape, "acceptance": acceptance}, 60, rows)


def policy_row(
    on: Built, off: Built, prompts: Sequence[Prompt], max_tokens: int, num_turns: int
) -> dict[str, Any]:
    """Alternate turns on the same prompts; the first pair is reported separately."""
    engines = {"off": off.engine, "on": on.engine}
    turns: dict[str, list[Turn]] = {arm: [] for arm in engines}
    before = engines["on"].figures()
    for number in range(num_turns + 1):
        for arm in engines if number % 2 else reversed(engines):
            turns[arm].append(answer_all(engines[arm], prompts, max_tokens))
    after = engines["on"].figures()
    first = turns["on"].pop(0).decode_tokens_per_s / turns["off"].pop(0).decode_tokens_per_s
    speeds = {arm: [t.decode_tokens_per_s for t in turns[arm]] for arm in engines}
    pairs = [on / off for off, on in zip(speeds["off"], speeds["on"], strict=True)]
    arms = arm_steps(before, after)
    accepted = after.num_accepted_tokens - before.num_accepted_tokens
    return {
        "off_tokens_per_s": statistics.median(speeds["off"]),
        "on_tokens_per_s": statistics.median(speeds["on"]),
        "ratio": statistics.median(pairs),
        "ratios": pairs,
        "first_turn_ratio": first,
        "tokens_per_step": 1 + accepted / (sum(arms.values()) * len(prompts)),
        "steps_by_arm": arms,
        "num_turns": num_turns,
    }
