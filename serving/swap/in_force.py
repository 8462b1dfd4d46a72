"""The current weights and the former ones, exchanged by copies between two steps.

Everything here runs on the engine's thread, unless stated otherwise, and only copies device memory
or adds numbers.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from buffer.manifest import TENSORS
from buffer.records import Manifest
from drafters.protocol import NeuralDrafter, weights_were_overwritten
from policies.arms import ArmPolicies
from policies.calibration import Calibration
from policies.interface import DraftPolicy, TakesPublished
from policies.published import networks_of
from serving.swap.flat_weights import FlatWeights, Staged

log = logging.getLogger(__name__)

IGNORED_CALIBRATIONS = "ignored_calibrations"
"""Key of ``WeightsInForce.counts``: versions that came with a calibration that is malformed."""
FAILED_POLICIES = "failed_policies"
"""The same: swaps that the policy failed to take in."""


def weights_are_same(one: Manifest, other: Manifest) -> bool:
    """Two versions have the same tensors."""
    return one.files.get(TENSORS) is not None and one.files.get(TENSORS) == other.files.get(TENSORS)


@dataclass(frozen=True, slots=True)
class Beside:
    """A second drafter of the same kind that drafts with the former weights."""

    neural: NeuralDrafter
    flat: Tensor
    """Its weights, laid out as those of the current one."""
    rest: Callable[[bool], None]
    """Has it draft for no request from now on, or again."""


class WeightsInForce:
    """Current and former version of one neural drafter, and what happened to its versions."""

    def __init__(
        self,
        neural: NeuralDrafter,
        weights: FlatWeights,
        initial: Manifest,
        policy: DraftPolicy | ArmPolicies,
        denied: set[int],
        beside: Beside | None = None,
    ) -> None:
        """
        Args:
            denied: versions that were rolled back before, by this process or another.
            beside: drafts with the former weights; ``None``: they are only kept.
        """
        self.weights = weights
        self.current = initial
        self.former: Manifest | None = None
        self.denied = denied
        self.newest_taken = max([initial.version, *denied])
        self.swap_seconds = 0.0
        """Total time of the copies."""
        self.counts: Counter[str] = Counter()
        self.history: list[dict[str, Any]] = []
        self._neural = neural
        self._policy = policy
        self._beside = beside
        self._former_flat: Tensor | None = None if beside is None else beside.flat
        self._is_alone = False
        self._same_weights: dict[int, set[int]] = {}
        """Version -> those that it took the place of, with other networks of the policy alone."""
        self._note_calibration()

    @property
    def kind(self) -> str:
        """Kind of the drafter."""
        return self._neural.kind

    @property
    def version(self) -> int:
        """Version that drafts now."""
        return self._neural.version

    @property
    def beside_kind(self) -> str | None:
        """Kind of the drafter that drafts with the former weights."""
        return None if self._beside is None else self._beside.neural.kind

    @property
    def drafts_beside(self) -> bool:
        """Whether the former version may draft, too: not one that was rolled back, none with the
        very weights of the current one, and none while a version is to draft alone."""
        former = self.former
        is_sound = former is not None and former.version not in self.denied
        is_other = self._beside is not None and not self.has_same_weights
        return is_sound and is_other and not self._is_alone

    def drafting(self) -> tuple[int, ...]:
        """Versions that may draft now."""
        former = self.former
        own = self.current.version
        return (own, former.version) if former is not None and self.drafts_beside else (own,)

    def version_of(self, drafter: str) -> int | None:
        """Version that a drafter drafts with; ``None``: it is none of these two."""
        if drafter == self.kind:
            return self.version
        is_beside = self.former is not None and drafter == self.beside_kind
        return self.former.version if is_beside and self.former is not None else None

    def versions(self) -> set[int]:
        """Versions that must not be pruned."""
        return {m.version for m in (self.current, self.former) if m is not None}

    @property
    def has_same_weights(self) -> bool:
        """Current and former version differ in what came for the policy alone."""
        return self.former is not None and weights_are_same(self.current, self.former)

    def make_room(self) -> None:
        """Allocate the former weights' buffer. Called on the loading thread, because it takes
        time."""
        if self._former_flat is None:
            self._former_flat = torch.empty_like(self.weights.flat)

    def take(self, staged: Staged, *, keeps_former: bool = False) -> None:
        """Serve a loaded version: one in-place copy.

        Args:
            keeps_former: the former version stays the former one, and the current one is given up.
        """
        started = time.perf_counter()
        assert self._former_flat is not None, "nothing was loaded yet"
        if not keeps_former:
            self._former_flat.copy_(self.weights.flat)
            self.former = self.current
        elif weights_are_same(staged.manifest, self.current):
            replaced = self._same_weights.get(self.version, set()) | {self.version}
            self._same_weights[staged.manifest.version] = replaced
        self.weights.take_over(staged.flat)
        weights_were_overwritten(self._neural)
        self.swap_seconds += time.perf_counter() - started
        self.current = staged.manifest
        self.newest_taken = max(self.newest_taken, staged.manifest.version)
        self._tell()
        self._note_calibration()
        self.counts["swapped"] += 1
        self.note("swapped")
        log.info("swapped to version %d", staged.manifest.version)

    def take_former(self, staged: Staged) -> None:
        """Draft with a loaded version beside the current one, as if that had followed it."""
        if self.former is not None:  # there was a swap meanwhile
            self.weights.give_back(staged.flat)
            return
        assert self._former_flat is not None, "nothing was loaded yet"
        self._former_flat.copy_(staged.flat)
        self.weights.give_back(staged.flat)
        self.former = staged.manifest
        self._tell()
        self.note(f"version {staged.manifest.version} drafts beside")

    def draft_alone(self, is_alone: bool) -> None:
        """Have the former version draft for no request from now on, or again."""
        if self._beside is not None and is_alone != self._is_alone:
            self._is_alone = is_alone
            self._tell()

    def exchange(self, event: str) -> None:
        """Exchange current and former weights, for a trial. It compares weights by what drafts
        bring, so both decode with the policy of the newer version: another one may draft less in a
        round, and gain by that."""
        assert self.former is not None
        newer = max(self.current, self.former, key=lambda one: one.version)
        self._exchange(networks_of(newer.policy))
        self.note(event)

    def roll_back(self, why: str) -> None:
        """Return to the former weights and deny the version that was serving, and those that it
        replaced with its very weights: a restart would begin with them."""
        rejected = self.current.version
        self.denied |= {rejected} | self._same_weights.get(rejected, set())
        self._exchange()
        self.counts["rolled_back"] += 1
        self.note(f"rolled back from {rejected}: {why}")
        log.warning("rolled back from version %d to %d: %s", rejected, self.current.version, why)

    def note(self, event: str) -> None:
        """Add an event to the history that ``GET /admin/drafter`` shows."""
        entry = {"unix_s": time.time(), "event": event, "version": self.version}
        self.history.append(entry)

    def _note_calibration(self) -> None:
        """Say what policies ignore of the calibration that came with the current version."""
        problems = list(Calibration.of(self.current.policy).problems)
        policy = self._policy
        if isinstance(policy, TakesPublished) and (refused := policy.refused(self.kind)):
            problems.append(f"what was fitted for the policy cannot be used ({refused})")
        if problems:
            self.counts[IGNORED_CALIBRATIONS] += 1
            log.warning(
                "calibration of version %d of %s: %s; ignored, its weights serve without it",
                self.current.version, self.kind, "; ".join(problems),
            )  # fmt: skip

    def _exchange(self, networks: Mapping[str, str] | None = None) -> None:
        assert self._former_flat is not None and self.former is not None
        kept = self.weights.flat.clone()
        self.weights.flat.copy_(self._former_flat)
        self._former_flat.copy_(kept)
        weights_were_overwritten(self._neural)
        self.former, self.current = self.current, self.former
        self._tell(networks)

    def _tell(self, networks: Mapping[str, str] | None = None) -> None:
        """Tell both drafters and the policy who has which weights. The former version's come first:
        what is known of it is where it has been.

        Args:
            networks: of the policy, in place of those that came with the current version.
        """
        if self._beside is not None and self.former is not None:
            self._beside.neural.version = self.former.version
            weights_were_overwritten(self._beside.neural)
            self._beside.rest(not self.drafts_beside)
            self._tell_policy(self._beside.neural.kind, self.former, self.former.policy)
        self._neural.version = self.current.version
        calibration = self.current.policy
        if networks is not None:
            own = networks_of(calibration)
            rest = {key: value for key, value in calibration.items() if key not in own}
            calibration = {**rest, **networks}
        self._tell_policy(self._neural.kind, self.current, calibration)

    def _tell_policy(self, kind: str, manifest: Manifest, calibration: dict[str, Any]) -> None:
        try:
            self._policy.on_swap(kind, manifest.version, calibration)
        except Exception:  # the weights are in force; a policy that fails must not end requests
            self.counts[FAILED_POLICIES] += 1
            log.exception(
                "the policy failed when told of version %d of %s; it goes on with what it knew of "
                "the weights before", manifest.version, kind,
            )  # fmt: skip
