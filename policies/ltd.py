"""Learning to Draft: K, and how much of the drafts is verified, by small networks that were fitted
to traces.

``trainer policy`` fits them on a replayed log (``policies.replay_environment``), by PPO as in the
paper, or from what every K and every budget would have brought in every step. They come from
``policy.ltd.weights``, or with the drafter's version: then all change in the same swap. With a
version without a network, or with one that is damaged or fitted to other features, it plays the K
that promises most tokens per second by the acceptance and the step times of late, so that there are
traces to fit one to, and everything is verified.

Source: Zhang et al. 2026, arXiv:2603.01639. The paper learns depth and size of a tree for one
request from log probabilities of its tokens. Here the draft is a chain, and both are decided before
anything is drafted, from figures of earlier steps, for batches of any size: the **depth** is K, and
the **size** is the share of the batch's draft tokens that is verified, the most confident ones
(``policies.budgets``). A network without a size verifies all. Step times are inputs instead of
being learned by heart, so a policy fitted on one machine can move to another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Self

from configs.policies import SizeUse
from configs.schema import PolicySettings
from policies.allocation import Allocation, Cut
from policies.budgets import CUT, NOTED, SavedTimes, allocation_of, budget_of, size_inputs
from policies.calibration import Calibration
from policies.features import Features
from policies.interface import CostSample, Decision, Outcome, PolicyContext, StepObs
from policies.lengths import Law, LengthPolicy, drafter_for, spread
from policies.network import FILE, MAX_BYTES, Network
from policies.published import Published, network_of_file

CALIBRATION_KEY = "ltd"
"""Of the network, in the calibration that comes with a version."""


class LtdPolicy(LengthPolicy):
    """Plays the K, and the share of its drafts, that the networks score highest."""

    kind = "ltd"

    def __init__(
        self,
        context: PolicyContext,
        drafter: str,
        network: Network | None,
        random_share: float,
        *,
        takes_published: bool = True,
        size_use: SizeUse = "play",
    ) -> None:
        """
        Args:
            network: ``None``: none until one is published with a version.
            takes_published: have those that come with versions instead.
            size_use: see ``policy.ltd.size``.
        """
        super().__init__(context, drafter)
        self._published = Published(
            CALIBRATION_KEY, FILE, Network.from_bytes, self.drafter, network, takes_published
        )
        self._random_share = random_share
        self._features = Features(max(context.max_draft, 1))
        on_device = context.drafters[self.drafter].on_device
        self._size_use: SizeUse = size_use if on_device else "off"
        self._saved = SavedTimes(None)
        self._best_shares: dict[int, list[int]] = {}
        """[max_draft] number of the share that suits K = 1, 2, ..., by the last law of a batch."""
        self._num_cut = 0
        self._groups: bytes | None = None
        self._context: int | None = None
        """See ``StepObs``: of the step that was observed or is planned."""

    @classmethod
    def from_settings(cls, settings: PolicySettings, context: PolicyContext) -> Self:
        """Read ``policy.drafter``, ``policy.random_share`` and ``policy.ltd``.

        Raises:
            SettingsError: ``policy.ltd.weights`` cannot be used.
        """
        network = cls.check(settings, drafter_for(settings.drafter, context))
        return cls(
            context, settings.drafter, network, settings.random_share,
            takes_published=settings.ltd.weights is None, size_use=settings.ltd.size,
        )  # fmt: skip

    @classmethod
    def check(cls, settings: PolicySettings, drafter: str | None = None) -> Network | None:
        """The network that ``policy.ltd.weights`` names; ``None``: it names none.

        Args:
            drafter: kind that the policy drafts with, if it is known.

        Raises:
            SettingsError: it cannot be used.
        """
        return network_of_file(
            "policy.ltd.weights", settings.ltd.weights, Network.from_bytes, MAX_BYTES,
            "trainer policy", drafter,
        )  # fmt: skip

    @classmethod
    def cuts_by(cls, settings: PolicySettings) -> tuple[Cut, ...]:
        """Programs that cut are needed where a size can come: not for a file with K alone.

        Raises:
            SettingsError: ``policy.ltd.weights`` cannot be used.
        """
        network = cls.check(settings)
        can_come = network is None or network.size is not None or settings.ltd.size == "note"
        return (CUT,) if can_come and settings.ltd.size != "off" else ()

    @classmethod
    def uncut(cls, settings: PolicySettings) -> PolicySettings:
        """Settings with which it decides on K alone."""
        own = settings.ltd.model_copy(update={"size": "off"})
        return settings.model_copy(update={"ltd": own})

    def calibrate(self, samples: Sequence[CostSample]) -> None:
        """Start the step times from those measured at start-up."""
        super().calibrate(samples)
        self._saved = SavedTimes.of_samples(samples, self.drafter, max(self.max_draft, 1))

    def plan(self, obs: StepObs) -> Decision:
        """Draw K from the law for these requests."""
        if obs.groups != self._groups:
            self._ahead.clear()  # it was computed for others
        self._groups, self._context = obs.groups, obs.context
        return super().plan(obs)

    def observe(self, outcome: Outcome) -> None:
        """Learn, and compute the law of the next step for requests like these."""
        self._groups, self._context = outcome.rows.groups, outcome.context
        super().observe(outcome)

    def law(self, batch: int, max_k: int) -> Sequence[float]:
        """The K with the highest score among those that can be used."""
        network, shares = self._published.network, self.costs.shares(batch)
        vector: Sequence[float] = ()
        if network is None:
            scores = self._features.rates(shares)
        else:
            vector = self._features.vector(batch, shares, self._groups, self._context)
            scores = network.scores(vector)
        usable = range(min(max_k + 1, len(scores)))
        best = max(usable, key=scores.__getitem__)
        size = None if network is None else network.size
        if size is not None and self._size_use != "off":
            # Of every K, while the device works: a plan may draw any.
            most = max(self.max_draft, 1)
            inputs = [size_inputs(vector, batch, k, most, self._saved) for k in range(1, most + 1)]
            self._best_shares[batch] = size.best_each(inputs)
        return spread(best, max_k, self._random_share)

    def completed(self, decision: Decision, batch: int) -> Decision:
        """Add the budget, or, in a share of the steps, any; where there is no size, nothing, or
        what notes the drafter's figures."""
        network = self._published.network
        size = None if network is None else network.size
        if size is None or self._size_use == "off":
            return _with(decision, _WHOLE) if self._size_use == "note" else decision
        k, num, random = decision.draft_k, size.num_shares, self._random_share
        best = self._best_shares[batch][k - 1]
        drawn = self._rng.randrange(num) if self._rng.random() < random else best
        how = _budgeted(batch, k, num, drawn, best, random)
        self._num_cut += how.allocation.may_cut
        return _with(decision, how)

    def _observe_time(self, outcome: Outcome) -> None:
        """What packed rows take says nothing of whole rounds."""
        allocation = outcome.decision.allocation
        if allocation is None or not allocation.may_cut:
            super()._observe_time(outcome)

    def learn(self, outcome: Outcome, law: Sequence[float]) -> None:
        """Update the features; the network itself is fitted elsewhere."""
        rows = outcome.rows
        self._features.observe(outcome.decision.draft_k, rows.num_verified, rows.num_accepted)

    def forget(self, calibration: dict[str, Any]) -> None:
        """Start the features from what was published with the version, and take the network that
        comes with it, if any."""
        self._features.forget(Calibration.of(calibration).acceptance)
        self._published.on_swap(calibration)

    def refused(self, drafter: str) -> str | None:
        """See ``TakesPublished``."""
        return self._published.problem if drafter == self.drafter else None

    def state(self) -> dict[str, Any]:
        """Whether there is a network, how old it is, and why the version's own was refused; whether
        it has a size, and in how many steps that cut drafts."""
        network = self._published.network
        has_size = network is not None and network.size is not None
        return {
            **self._published.figures(self.version), "has_size": has_size, "cut": self._num_cut
        }  # fmt: skip


class _Budgeted(NamedTuple):
    """What a size adds to a decision."""

    allocation: Allocation
    chance: float
    """Probability with which this budget was chosen, given K."""
    explore: bool
    noted: Mapping[str, float]
    """For traces."""


_WHOLE = _Budgeted(Allocation(CUT, 0.0), 1.0, False, {})
"""Cuts nothing, and notes the drafter's figures."""


@lru_cache(maxsize=4096)
def _budgeted(
    batch: int, draft_k: int, num_shares: int, drawn: int, best: int, random_share: float
) -> _Budgeted:
    """The share that was drawn, where the best one is drawn but for a share of the steps, in which
    any is. Shares that come to the same budget are one choice."""
    budgets = [budget_of(at, num_shares, batch, draft_k) for at in range(num_shares)]
    same = [budget == budgets[drawn] for budget in budgets]
    allocation = allocation_of(drawn, num_shares, batch, draft_k)
    each = allocation.budget_each
    return _Budgeted(
        allocation,
        random_share * sum(same) / num_shares + (1 - random_share) * same[best],
        not same[best],
        {} if each is None else {NOTED: each},
    )


def _with(decision: Decision, how: _Budgeted) -> Decision:
    """A decision with a budget. ``dataclasses.replace`` takes three times as long."""
    law = decision.note
    assert isinstance(law, Law), "every plan of K has one"
    return Decision(
        decision.drafter, decision.draft_k, decision.propensity * how.chance,
        decision.explore or how.explore, decision.reason, decision.policy, how.allocation,
        note=Law(law.chances, how.noted),
    )  # fmt: skip
