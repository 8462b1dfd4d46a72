"""The drafters of a server that learn: the version each starts with, and what swaps it later."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from buffer.interface import Backend
from buffer.records import Manifest
from buffer.signed_weights import open_weights
from buffer.weights_store import StoreDamagedError, WeightsStore
from configs.schema import Settings
from drafters.catalog import former_name
from drafters.initial import TargetFacts, first_drafter, new_drafter, unpublished_drafter
from drafters.protocol import NeuralDrafter, Weights
from drafters.several import learning, line_of, settings_of
from policies.arms import ArmPolicies
from policies.rollback import SwapWatch
from serving.engine.drafting import Drafting
from serving.engine.loop import EngineParts
from serving.swap.flat_weights import Expected, FlatWeights
from serving.swap.in_force import Beside, WeightsInForce
from serving.swap.swapper import Shelf, Swapper

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FirstVersion:
    """The version that one drafter starts with."""

    manifest: Manifest
    weights: Weights
    store: WeightsStore
    """Its version line."""


Learning = Mapping[str, FirstVersion]
"""Kind -> the version that the drafter starts with, the main drafter first."""


def first_versions(settings: Settings, target: TargetFacts, backend: Backend) -> Learning:
    """What each drafter that learns starts with; empty if none does.

    Raises:
        ValueError: no version can be used; see ``drafters.initial.first_drafter``.
    """
    return {kind: _first_version(settings, kind, target, backend) for kind in learning(settings)}


def _first_version(
    settings: Settings, kind: str, target: TargetFacts, backend: Backend
) -> FirstVersion:
    store = open_weights(backend, settings.swap.public_key, line=line_of(settings, kind))
    own = settings_of(settings, kind)
    path, new = own.drafter.path, new_drafter(own)
    try:
        stored = first_drafter(store, kind, target, path=path, new=new)
    except OSError as error:
        log.warning(
            "version 0 of the drafter cannot be stored in %s (%s); serving starts with it in "
            "memory alone",
            store.location,
            error.strerror,
        )
        stored = unpublished_drafter(kind, target, path=path, new=new)
    except StoreDamagedError as error:
        log.warning(
            "%s. Serving starts with version 0 of the drafter, in memory alone, and takes newer "
            "versions as they come",
            str(error).rstrip("."),
        )
        stored = unpublished_drafter(kind, target, path=path, new=new)
    manifest = stored.manifest
    weights = Weights(manifest.version, manifest.drafter_config, stored.tensors)
    return FirstVersion(manifest, weights, store)


def shapes_of(first: Learning) -> str:
    """Shapes of the drafters, as text that changes with them."""
    return "; ".join(json.dumps(one.manifest.drafter_config) for one in first.values())


def flat_weights(neural: list[NeuralDrafter]) -> dict[str, FlatWeights]:
    """The weights of each drafter that has versions, as a buffer that swaps overwrite."""
    return {one.kind: FlatWeights(one.module) for one in neural if one.traits.has_versions}


def swappers(
    settings: Settings,
    first: Learning,
    flat: Mapping[str, FlatWeights],
    parts: EngineParts,
    policies: ArmPolicies,
    producer: str,
    fingerprint: str,
) -> dict[str, Swapper]:
    """A swapper for each drafter that learns, by kind.

    Args:
        producer: name of this server in the stores.
        fingerprint: the target's.
    """
    found, drafting = {}, parts.programs.drafting
    for kind, one in first.items():
        expected = Expected(kind, one.manifest.drafter_config, fingerprint)
        found[kind] = Swapper(
            force=WeightsInForce(
                drafting.neural[kind].drafter, flat[kind], one.manifest, policies,
                _denied(one.store), _beside(drafting, former_name(kind), flat),
            ),
            shelf=Shelf(one.store, producer, expected),
            poll_s=settings.swap.poll_s,
            watch=SwapWatch(settings.swap.watch_rounds, settings.swap.max_drop),
            automatic=settings.swap.enabled,
            wake_engine=parts.inbox.wake,
        )  # fmt: skip
    return found


def _beside(drafting: Drafting, name: str, flat: Mapping[str, FlatWeights]) -> Beside | None:
    """The drafter of this name, which drafts with former weights; ``None`` if there is none."""
    rows = drafting.neural.get(name)
    if rows is None:
        return None
    return Beside(rows.drafter, flat[name].flat, partial(drafting.rest, name))


def all_of(followers: list[Swapper]) -> dict[str, Callable[..., None]]:
    """What the engine calls for several swappers, as ``Listeners`` names it."""

    def between_steps() -> None:
        for one in followers:
            one.between_steps()

    def on_rounds(drafter: str, rounds: list[tuple[int, int]]) -> None:
        for one in followers:
            one.on_rounds(drafter, rounds)

    return {"before_step": between_steps, "on_rounds": on_rounds}


def _denied(store: WeightsStore) -> set[int]:
    """Versions that were rolled back before; none if the disk does not say."""
    try:
        return set(store.read_denied())
    except (OSError, StoreDamagedError) as error:
        log.warning("cannot read which versions were rolled back (%s); serving continues", error)
        return set()
