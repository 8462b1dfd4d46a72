"""Step times of an engine on this machine, measured once at start-up for the policy.

The real loop is timed on real requests of random tokens, so the figures include everything that a
step costs: drafting, the target's pass, verification and commit. The requests of one batch size
decode with one arm after another, because prompts take most of the time on a CPU.
"""

from __future__ import annotations

import itertools
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
_CPU_DEPTHS = (1, 4)
"""The same on a CPU, where all of them would take a third of a start. Times between are
interpolated, and the policy follows them while serving."""
_WARM_UP = 2
"""Steps of an arm that are not timed: the first one computes the rows that its drafter lacks."""
_TRIES = 8
"""Further prompts for a target that computes NaN or infinity for the first ones."""
_REQUEST = itertools.count()
"""Numbers of the requests."""


@dataclass(slots=True)
class Script:
    """A policy that always chooses one (drafter, K) and records the times."""

    decision: Decision
    times: list[tuple[float, float]] = field(default_factory=list)
    """(step_s, draft_s) of every timed step."""

    wants_profile = False

    def switch(self, drafter: str, draft_k: int) -> None:
        """Choose another arm from now on, and record its times only."""
        self.decision = Decision(drafter, draft_k, 1.0, False, "profile")
        self.times = []

    def rest(self) -> Decision:
        return self.decision

    def wants_matches(self) -> bool:
        return False

    def plan(self, obs: StepObs) -> Decision:
        return self.decision

    def observe(self, outcome: Outcome) -> None:
        # Where rounds overlap, the first outcomes after a switch are those of the former arm.
        if not outcome.has_prefill and outcome.decision is self.decision:
            self.times.append((outcome.step_s, outcome.draft_s))

    def calibrate(self, samples: Sequence[CostSample]) -> None: ...

    def on_swap(self, drafter: str, version: int, calibration: dict[str, Any]) -> None: ...

    def figures(self) -> dict[str, Any]:
        return {}


def profile_steps(parts: EngineParts, repeats: int, context: int) -> list[CostSample]:
    """Median step times of (drafter, K, batch), for plain decoding, all neural drafters
    and their mixes.

    Call it before another engine over these parts starts. Each sample decodes ``batch`` greedy
    requests for ``repeats`` steps after two warm-up steps. On a CPU, the batches are one request
    and as many as fit, and their prompts share all but their last page.

    Args:
        context: prompt tokens of each request.

    Raises:
        ValueError: the target computes NaN or infinity for every prompt that was tried.
    """
    max_draft = parts.programs.rounds.made_draft  # longer drafts are extrapolated
    on_gpu, most = parts.programs.graphs.are_real, parts.scheduler.max_batch
    some = _DEPTHS if on_gpu else _CPU_DEPTHS
    depths = sorted({k for k in (*some, max_draft) if 0 < k <= max_draft})
    arms = [("none", 0)]
    arms += [(kind, k) for kind in parts.programs.drafting.on_device for k in depths]
    samples = []
    for batch in buckets(most) if on_gpu else sorted({1, most}):
        bench = _Bench(parts, batch, context, shares=not on_gpu)
        samples += [bench.measure(drafter, k, repeats) for drafter, k in arms]
        bench.close()
    return samples


class _Bench:
    """Requests of one batch size, which decode for as long as anybody measures."""

    def __init__(self, parts: EngineParts, batch: int, context: int, *, shares: bool) -> None:
        """
        Args:
            context: prompt tokens of each request.
            shares: prompts differ in their last page only, and the prefix cache holds the others.
        """
        self._inbox, self._batch, self._context = parts.inbox, batch, context
        self._num_own = parts.scheduler.page_size if shares else context
        self._numbers = random.Random(batch)
        self._script = Script(Decision("none", 0, 1.0, False, "profile"))
        self._engine = Engine(parts, self._script)

    def measure(self, drafter: str, k: int, repeats: int) -> CostSample:
        """Median times of steps with one drafter and K, as they are at this batch size.

        Raises:
            ValueError: the target computes NaN or infinity for every prompt that was tried.
        """
        self._script.switch(drafter, k)
        most_tokens = (repeats + _WARM_UP + 2) * (k + 1)
        for attempt in range(1 + _TRIES):
            if not self._have_room(most_tokens):
                self._renew(repeats_token=attempt > 0)
            self._decode(repeats + _WARM_UP)
            if len(self._script.times) > _WARM_UP:
                break
        times = self._script.times[_WARM_UP:]
        if not times:
            raise ValueError(
                "the target computes NaN or infinity for every prompt that was tried, so it cannot "
                "answer anything: its weights are damaged; get them again, or name another target"
            )
        step_s = statistics.median(t for t, _ in times)
        draft_s = statistics.median(d for _, d in times)
        return CostSample(drafter, k, self._batch, step_s, draft_s)

    def close(self) -> None:
        """End the requests."""
        self._inbox.cancel_all()
        with torch.inference_mode():
            while self._inbox.num_inflight():
                self._engine.step()

    def _decode(self, num_steps: int) -> None:
        """Run until so many steps of the arm are timed, or the requests end."""
        with torch.inference_mode():
            while len(self._script.times) < num_steps:
                if not self._engine.step():
                    break

    def _have_room(self, num_tokens: int) -> bool:
        """All requests run, and each may commit so many tokens more."""
        running = self._inbox.inflight()
        return len(running) == self._batch and all(s.num_left >= num_tokens for s in running)

    def _renew(self, *, repeats_token: bool) -> None:
        """Begin with other prompts.

        Args:
            repeats_token: a prompt is one token, many times: a single damaged embedding is in most
                long prompts, and in few of these.
        """
        self.close()
        limits, numbers = self._inbox.limits, self._numbers
        room = limits.max_model_len - self._context
        shared = numbers.choices(range(limits.vocab_size), k=self._context)
        for at in range(self._batch):
            own = numbers.choices(range(limits.vocab_size), k=min(self._num_own, self._context))
            prompt = (*shared[len(own) :], *own)
            if repeats_token:
                prompt = (own[0],) * self._context
            sampling = SamplingParams(temperature=0.0, max_tokens=room, ignore_eos=True)
            request = Request(f"profile-{next(_REQUEST)}", prompt, sampling, capture=True)
            self._inbox.submit(request, lambda _output: None)
            if at == 0:
                self._compute_prompts()
        self._compute_prompts()
        self._script.times = []  # rounds beside prompts are of smaller batches

    def _compute_prompts(self) -> None:
        with torch.inference_mode():
            while not all(one.is_prefilled for one in self._inbox.inflight()):
                self._engine.step()
