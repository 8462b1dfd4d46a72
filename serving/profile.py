"""Step times of this engine on this machine, measured once at start-up for the policy.

The real loop is timed on real requests of random tokens, so the figures hold everything a step
costs: draft, target pass, verification, commit.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass

import torch

from policies.cost import CostSample
from policies.interface import Decision, Outcome, StepObs
from serving.engine.cuda_graphs import buckets
from serving.engine.loop import Engine
from serving.requests import Request, SamplingParams


@dataclass(slots=True)
class _Script:
    """A policy that plays one (drafter, K) and keeps the times."""

    decision: Decision
    times: list[tuple[float, float]]

    def rest(self) -> Decision | None:
        return None

    def plan(self, obs: StepObs) -> Decision:
        return self.decision

    def observe(self, outcome: Outcome) -> None:
        if not outcome.has_prefill:
            self.times.append((outcome.step_s, outcome.draft_s))

    def on_swap(self, version: int, calibration: dict[str, object]) -> None: ...

    def figures(self) -> dict[str, object]:
        return {}


def profile_engine(engine: Engine, max_draft: int, repeats: int, context: int) -> list[CostSample]:
    """Median step times of (drafter, K, batch). Runs before the engine's thread starts
    and before anything listens to finished requests.

    Each sample decodes ``batch`` greedy requests for ``repeats`` steps after two that warm up.
    """
    policy, suffix = engine.policy, engine.drafting.suffix
    engine.drafting.suffix = None  # its cost is small, and random tokens must not enter it
    samples = []
    arms = [("none", 0)]
    depths = sorted({k for k in (1, 2, 4, 6, 8, 12, max_draft) if 0 < k <= max_draft})
    if engine.drafting.neural:
        arms += [("eagle3", k) for k in depths]
    try:
        for batch in buckets(engine.scheduler.max_batch):
            for drafter, k in arms:
                samples.append(_measure(engine, drafter, k, batch, repeats, context))
    finally:
        engine.policy, engine.drafting.suffix = policy, suffix
        engine.reset_figures()
    return samples


def _measure(
    engine: Engine, drafter: str, k: int, batch: int, repeats: int, context: int
) -> CostSample:
    script = _Script(Decision(drafter, k, 1.0, False, "profile"), [])
    engine.policy = script
    numbers = random.Random(batch * 100 + k)
    room = engine.max_model_len - context
    for index in range(batch):
        prompt = tuple(numbers.randrange(engine.vocab_size) for _ in range(context))
        sampling = SamplingParams(temperature=0.0, max_tokens=room, ignore_eos=True)
        request = Request(f"profile-{index}", prompt, sampling, capture=True)
        engine.submit(request, lambda _output: None)
    with torch.inference_mode():
        while len(script.times) < repeats + 2:
            if not engine.step():
                break
        engine.cancel_all()
        engine.step()
    times = script.times[2:]
    step_s = statistics.median(t for t, _ in times)
    draft_s = statistics.median(d for _, d in times)
    return CostSample(drafter, k, batch, step_s, draft_s)
