"""The candidate for the next version, and its publication once it has passed the gate."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from buffer.bundles import BundleError
from buffer.manifest import TENSORS
from buffer.records import Manifest
from buffer.sealed import Content, Sealed, digest_of, seal, seal_in
from buffer.tensors import tensor_layout
from buffer.weights_store import WeightsStore
from configs.logs import Outage
from drafters.trainable import Trainable
from trainer.fits import Fits
from trainer.gate import Judgement, Judging
from trainer.host import TAGS, HostCopies, Tensors, laid_out

LARGEST_FLOAT32_BYTES = 256 << 20
"""Larger bundles are written as bfloat16, the dtype that a GPU serves. Smaller ones stay float32,
which costs little and suits every dtype, since the server casts on load."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a candidate that passed the gate."""

    judgement: Judgement
    """Its weights may turn out to be those of another version, and then it has not passed."""
    published: Manifest | None
    problem: OSError | None = None
    """Why it could not be published."""


@dataclass(slots=True)
class Candidate:
    """Where the present candidate is on its way, if there is one."""

    beside: bool = False
    """Updates go on meanwhile."""
    model: nn.Module | None = None
    """The weights that are judged and published; kept for the next candidate."""
    judging: Judging | None = None
    """Its figures are on their way."""
    job: Future[Outcome] | None = None
    """It has passed the gate, and is being published."""
    step: int = 0
    """Updates in its weights."""
    began_s: float = 0.0
    """``Pace.working_s`` then."""
    judging_s: float = 0.0
    """Seconds that judging it took, rests and publishing excepted."""
    highest: int = 0
    """Highest version that this run is known to have published, by a checkpoint, too: somebody may
    have deleted the store."""
    pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="publisher")
    )

    @property
    def is_busy(self) -> bool:
        """There is a candidate whose outcome is not known yet."""
        return self.judging is not None or self.job is not None

    def take(self, average: nn.Module) -> nn.Module:
        """The weights to judge, which do not change until its end: a copy, unless everything is
        done at once."""
        if not self.beside:
            self.model = average
        elif self.model is None:
            self.model = copy.deepcopy(average)
        else:
            with torch.no_grad():
                torch._foreach_copy_(_tensors_of(self.model), _tensors_of(average))
        return self.model


@dataclass(frozen=True, slots=True)
class Publisher:
    """The weights store, and the right to publish in it until another trainer takes over."""

    store: WeightsStore
    epoch: int
    denied: dict[int, str] = field(default_factory=dict)
    """Digests of versions that were rolled back, so that they are known when those are pruned."""
    outage: Outage = field(default_factory=lambda: Outage("judge the candidate"))
    """Whether the store cannot be asked at present."""
    memory: HostCopies = field(default_factory=HostCopies)
    """Where candidates lie until they are published."""
    candidate: Candidate = field(default_factory=Candidate)
    """The present one."""
    fits: Fits = field(default_factory=Fits)
    """The draft policy that is fitted, if one is."""

    @property
    def is_busy(self) -> bool:
        """A version may be on its way, so that no other can be."""
        return self.candidate.is_busy or self.fits.is_publishing

    def content_of(self, trainable: Trainable[Any], model: nn.Module) -> Sealed:
        """A drafter's tensors as they are published, in memory that the next call overwrites. The
        store has begun to write them."""
        return self.content_with(trainable.bundle_tensors(model))

    def content_with(self, tensors: Tensors) -> Sealed:
        """``content_of`` for the tensors themselves."""
        content = sealed_tensors(tensors, self.memory, self.store.lend)
        self.store.prepare(content)  # while its digest is computed
        return content

    def version_with(self, content: Content | Sealed) -> tuple[int, bool] | None:
        """The version that holds these tensors, and whether it was rolled back; ``None``: none
        does.

        Raises:
            ServiceAwayError: the store cannot be read at present.
        """
        denied = self.store.read_denied()
        digests = dict[int, str]()
        for version in {*self.store.versions(), *denied}:
            if version in self.denied:
                digests[version] = self.denied[version]
            else:
                with contextlib.suppress(BundleError):  # damaged, or pruned
                    digests[version] = self.store.read_manifest(version).files[TENSORS].sha256
        self.denied.update({v: d for v, d in digests.items() if v in denied})
        own = digest_of(content).sha256
        same = [version for version, digest in digests.items() if digest == own]
        return (max(same), any(v in denied for v in same)) if same else None


def bundle_content(trainable: Trainable[Any], model: nn.Module) -> Sealed:
    """A drafter's tensors as they are published, in memory of their own."""
    return sealed_tensors(trainable.bundle_tensors(model))


def sealed_tensors(
    tensors: Tensors,
    memory: HostCopies | None = None,
    lend: Callable[[int], memoryview | None] | None = None,
) -> Sealed:
    """Tensors, on any device, as they are published.

    Args:
        memory: for those that must be copied; its next use overwrites them. ``None``: new memory.
        lend: memory for the whole file, see ``WeightsStore.lend``.
    """
    memory, dtypes = memory or HostCopies(), _bundle_dtypes(tensors)
    shapes = {name: (TAGS[dtypes[name]], tuple(one.shape)) for name, one in tensors.items()}
    layout = tensor_layout(shapes)
    place = None if lend is None else lend(layout.num_bytes)
    if place is None:
        on_host = memory.of(tensors, dtypes)
        return seal(laid_out(on_host.places), on_host.make)
    places = {
        name: _tensor_in(place[one.start : one.end], dtypes[name], one.shape)
        for name, one in layout.tensors.items()
    }
    return seal_in(place, layout, memory.at(places, tensors).make)


def _tensor_in(place: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor in memory of so many bytes."""
    if not len(place):  # torch takes no buffer without bytes
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(place, dtype=dtype).view(shape)


def publish_version(
    store: WeightsStore,
    content: Content | Sealed,
    parent: Manifest,
    judgement: Judgement,
    *,
    step: int,
    keep: int,
    learning_s: float | None = None,
    epoch: int | None = None,
    policy: Mapping[str, Any] | None = None,
    above: int = 0,
) -> Manifest:
    """Write the next version to the store, and remove old ones.

    Args:
        content: its tensors, of ``bundle_content``.
        step: number of updates that produced the model.
        learning_s: seconds that they took, with judging; the server shows it beside what drafting
            saves.
        keep: number of newest versions that stay.
        epoch: of the trainer that publishes; ``None``: publish whoever has taken over.
        policy: further calibration of the draft policy for these weights.
        above: a version that was published before, whatever the store says.

    Raises:
        ValueError: a weight is not finite, or another trainer has taken over; nothing is published.
        OSError: the disk is full or failed; nothing is published.
    """
    manifest = Manifest(
        # Above all others even where somebody deleted the store, and its record of numbers with it.
        version=max(store.next_version(), parent.version + 1, above + 1),
        parent=parent.version,
        kind=parent.kind,
        drafter_config=parent.drafter_config,
        target_fingerprint=parent.target_fingerprint,
        files={},
        gate={**judgement.to_json(), "step": step, "learning_s": learning_s},
        policy={
            "acceptance": judgement.acceptance,
            "parent": parent.version,
            "parent_acceptance": judgement.incumbent_acceptance,
            **_by_temperature(judgement),
            **(policy or {}),
        },
        created_unix_ms=int(time.time() * 1000),
    )
    published = store.publish(manifest, {TENSORS: content}, epoch)
    store.prune(keep)
    return published


def publish_policy(
    store: WeightsStore,
    parent: Manifest,
    policy: Mapping[str, Any],
    *,
    without: Collection[str],
    keep: int,
    epoch: int | None = None,
    above: int = 0,
) -> Manifest:
    """Write a version with the very weights of another, and other networks of draft policies.

    Args:
        parent: version whose weights, calibration and figures of the gate it has.
        policy: networks, by their key in the calibration.
        without: keys of networks of the parent's that it has not.
        keep, epoch, above: see ``publish_version``.

    Raises:
        BundleError: the parent is no longer there, or damaged.
        ValueError: another trainer has taken over; nothing is published.
        OSError: the disk is full or failed; nothing is published.
    """
    content = store.read(parent.version).files[TENSORS]
    acceptance = parent.policy.get("acceptance")
    calibration = {key: value for key, value in parent.policy.items() if key not in without}
    if acceptance is not None:
        calibration |= {"parent": parent.version, "parent_acceptance": acceptance}
    manifest = replace(
        parent,
        version=max(store.next_version(), parent.version + 1, above + 1),
        parent=parent.version,
        files={},
        policy={**calibration, **policy},
        created_unix_ms=int(time.time() * 1000),
        signature=None,
    )
    published = store.publish(manifest, {TENSORS: content}, epoch)
    store.prune(keep)
    return published


def _by_temperature(judgement: Judgement) -> dict[str, Any]:
    """By JSON's keys, which are text."""
    if not judgement.by_temperature:
        return {}
    by_class = {str(number): own for number, own in judgement.by_temperature.items()}
    return {"acceptance_by_temperature": by_class}


def is_same(trainable: Trainable[Any], model: nn.Module, other: nn.Module) -> bool:
    """Whether two drafters would be published with the same bytes."""
    ours, theirs = (trainable.bundle_tensors(m) for m in (model, other))
    dtypes = _bundle_dtypes(ours)
    return all(t.to(dtypes[n]).equal(theirs[n].to(dtypes[n])) for n, t in ours.items())


def _bundle_dtypes(tensors: Tensors) -> dict[str, torch.dtype]:
    is_small = sum(tensor.nbytes for tensor in tensors.values()) <= LARGEST_FLOAT32_BYTES
    return {
        name: tensor.dtype if is_small or not tensor.is_floating_point() else torch.bfloat16
        for name, tensor in tensors.items()
    }


def _tensors_of(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
