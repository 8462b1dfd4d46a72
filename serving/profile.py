"""Step times of an engine on this machine, measured once at start-up for the policy.

The real loop is timed on real requests of random tokens, so the figures include everything that a
step costs: drafting, the target's pass, verification and commit.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from policies.interface import CostSample, Decision, Outcome, StepObs
from serving.engine.cuda_graphs import buckets
from serving.engine.loop import Engine, EngineParts
from serving.requests import Request, SamplingParams

_DEPTHS = (1, 2, 4, 6, 8, 12)
"""Values of K to measure, in addition to the largest one."""
_TRIES = 8
"""Further prompts for a target that computes NaN or infinity for the first ones."""


@dataclass(slots=True)
class Script:
    """A policy that always chooses one (drafter, K) and records the times."""

    decision: Decision
    times: list[tuple[float, float]] = field(default_factory=list)
    """(step_s, draft_s) of every timed step."""

    wants_profile = False

    def rest(self) -> Decision:
        return self.decision

    def wants_matches(self) -> bool:
        return False

    def plan(self, obs: StepObs) -> Decision:
        return self.decision

    def observe(self, outcome: Outcome) -> None:
        if not outcome.has_prefill:
            self.times.append((outcome.step_s, outcome.draft_s))

    def calibrate(self, samples: Sequence[CostSample]) -> None: ...

    def on_swap(self, drafter: str, version: int, calibration: dict[str, Any]) -> None: ...

    def figures(self) -> dict[str, Any]:
        return {}


def profile_steps(parts: EngineParts, repeats: int, context: int) -> list[CostSample]:
    """Median step times of (drafter, K, batch), for plain decoding and all neural drafters.

    Call it before another engine over these parts starts. Each sample decodes ``batch`` greedy
    requests for ``repeats`` steps after two warm-up steps.

    Args:
        context: prompt tokens of each request.
    """
    max_draft = parts.programs.drafting.max_draft
    depths = sorted({k for k in (*_DEPTHS, max_draft) if 0 < k <= max_draft})
    arms = [("none", 0)]
    arms += [(kind, k) for kind in parts.programs.drafting.neural for k in depths]
    return [
        measure(parts, drafter, k, batch, repeats, context)
        for batch in buckets(parts.scheduler.max_batch)
        for drafter, k in arms
    ]


def measure(
    parts: EngineParts, drafter: str, k: int, batch: int, repeats: int, context: int
) -> CostSample:
    """Median times of steps that decode ``batch`` requests with one drafter and K.

    Raises:
        ValueError: the target computes NaN or infinity for every prompt that was tried.
    """
    numbers = random.Random(batch * 100 + k)
    vocab = range(parts.inbox.limits.vocab_size)
    script = Script(Decision(drafter, k, 1.0, False, "profile"))
    decode(parts, script, [tuple(numbers.choices(vocab, k=context)) for _ in range(batch)], repeats)
    for _ in range(_TRIES):
        if len(script.times) > 2:
            break
        # A single damaged embedding is in most long prompts, and in few that repeat one token.
        script.times.clear()
        decode(parts, script, [(numbers.choice(vocab),) * context for _ in range(batch)], repeats)
    times = script.times[2:]
    if not times:
        raise ValueError(
            "the target computes NaN or infinity for every prompt that was tried, so it cannot "
            "answer anything: its weights are damaged; get them again, or name another target"
        )
    step_s = statistics.median(t for t, _ in times)
    draft_s = statistics.median(d for _, d in times)
    return CostSample(drafter, k, batch, step_s, draft_s)


def decode(
    parts: EngineParts, script: Script, prompts: list[tuple[int, ...]], repeats: int
) -> None:
    """Run two warm-up steps and ``repeats`` others over one request for each prompt."""
    engine = Engine(parts, script)
    limits = parts.inbox.limits
    for index, prompt in enumerate(prompts):
        room = limits.max_model_len - len(prompt)
        sampling = SamplingParams(temperature=0.0, max_tokens=room, ignore_eos=True)
        request = Request(f"profile-{index}", prompt, sampling, capture=True)
        parts.inbox.submit(request, lambda _output: None)
    with torch.inference_mode():
        while len(script.times) < repeats + 2:
            if not engine.step():
                break
        parts.inbox.cancel_all()
        while parts.inbox.num_inflight():
            engine.step()
