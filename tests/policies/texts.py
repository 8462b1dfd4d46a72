"""Texts on the simulated engine whose matches last: requests that fall into a loop, and matches
that come in runs. ``World.matches`` draws each step anew, which no text does."""

from __future__ import annotations

import random
from dataclasses import replace

from policies.interface import Decision, DraftPolicy, Outcome, StepObs
from tests.policies.simulated import Noise, Rows, Simulation, World

LOOP = 5
"""Kind of match in a loop."""
LOOPED = {
    1: Rows(0.0, 0.12), 2: Rows(0.0, 0.3), 3: Rows(0.0, 0.45), 4: Rows(0.0, 0.6),
    LOOP: Rows(0.0, 0.97),
}  # fmt: skip
"""What the index keeps by kind of match."""
_FREE = {0: 0.45, 1: 0.25, 2: 0.15, 3: 0.1, 4: 0.05}
"""How often each kind is found in text that does not repeat itself."""


class Looping(Simulation):
    """Greedy text of an index alone: a share of the requests falls into a loop after a while, the
    others never do, and new requests take the place of those that end."""

    def __init__(
        self, policy: DraftPolicy, seed: int, *, loops: float, slow_look_s: float = 0.0
    ) -> None:
        """
        Args:
            loops: share of the requests that will loop.
            slow_look_s: seconds of the first look.
        """
        super().__init__(policy, seed)
        self._loops, self._slow_look_s = loops, slow_look_s
        self._text = random.Random(seed + 1000)
        self._to_loop: list[int] = []
        """Tokens that each request still has when its loop begins; below 0: it has none."""

    def _admit(self, world: World) -> None:
        before = len(self._left)
        new = [r for r in range(world.batch) if r >= before or self._left[r] <= 0]
        super()._admit(world)
        del self._to_loop[world.batch :]
        for r in new:
            loops = self._text.random() < self._loops
            length = self._text.randint(*((200, 512) if loops else (40, 250)))
            if r >= before:  # a server that is already busy
                length = max(1, round(length * self._text.random()))
                self._to_loop.append(-1)
            self._left[r] = length
            self._to_loop[r] = length - self._text.randint(10, 120) if loops else -1

    def _matches(self, world: World) -> tuple[int, ...]:
        found = []
        for left, to_loop in zip(self._left, self._to_loop, strict=True):
            if left <= to_loop:
                found.append(LOOP if self._rng.random() < 0.97 else 0)
            else:
                found += self._rng.choices(list(_FREE), list(_FREE.values()))
        return tuple(found)

    def _seen(self, world: World, matches: tuple[int, ...] | None) -> StepObs:
        drafters = () if matches is None else ("suffix",)
        return replace(super()._seen(world, matches), drafters=drafters, pending_rows={})

    def _decode(self, world: World):
        is_first = self._step == 0 and self._slow_look_s
        return super()._decode(replace(world, look_s=self._slow_look_s) if is_first else world)


class Lasting(Simulation):
    """Matches of one kind that come in runs: each goes on in the next step with a probability."""

    stay = 0.9
    _has: tuple[bool, ...] = ()

    def _matches(self, world: World) -> tuple[int, ...]:
        ((kind, rows),) = world.rows.items()
        if len(self._has) != world.batch:
            self._has = (False,) * world.batch
        begins = (1 - self.stay) * rows.share / (1 - rows.share)
        rng = self._rng
        self._has = tuple(rng.random() < (self.stay if has else begins) for has in self._has)
        return tuple(kind if has else 0 for has in self._has)


class IndexWhereMatched:
    """A fixed mix: one K of the index in steps with a match, another arm in all others."""

    wants_profile = wants_guard = False

    def __init__(self, index_k: int, drafter_k: int) -> None:
        self._index_k = index_k
        other = ("eagle3", drafter_k) if drafter_k else ("none", 0)
        self._other = Decision(*other, 1.0, False, "fixed")

    def rest(self) -> Decision | None:
        return None if self._index_k else self._other

    def wants_matches(self) -> bool:
        return self._index_k > 0

    def plan(self, obs: StepObs) -> Decision:
        if obs.matches is None or not any(obs.matches):
            return self._other
        return Decision("suffix", self._index_k, 1.0, False, "fixed")

    def observe(self, outcome: Outcome) -> None: ...


AT_32 = World(
    batch=32, plain_s=0.00115, verify_per_token_s=2.7e-6, index_s=0.0001, rows=LOOPED,
    plan_s=0.00015, look_s=0.0001, noise=Noise(0.1, 0.02, 0.003), untimed_share=0.1,
)  # fmt: skip
"""A small target on an H200, 32 clients: a look takes a tenth of a step, a plan more."""
AT_1 = replace(
    AT_32, batch=1, plain_s=0.00064, verify_per_token_s=1e-5, index_s=0.00003, look_s=0.00003
)
BOTH = World(
    eagle=(0.6,) * 8, rows={4: Rows(0.3, 0.7)}, plain_s=0.00062, draft_s=0.000055,
    verify_per_token_s=7e-6, plan_s=0.00015, look_s=0.00003, cold_s=0.00025,
    noise=Noise(0.1, 0.02, 0.003), untimed_share=0.1,
)  # fmt: skip
"""One request there, with a drafter, and an index that costs next to nothing."""
