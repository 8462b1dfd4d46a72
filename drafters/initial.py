"""The drafter a run starts with: its newest sound version, else version 0.

The server and the trainer of a run both call ``first_drafter``; whichever starts first publishes
version 0. With equal settings, both would publish the same bytes.

Shapes: V vocabulary, H hidden.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from buffer.bundles import Bundle, BundleError, read_bundle
from buffer.manifest import TENSORS
from buffer.records import Manifest
from buffer.weights_store import WeightsStore
from configs.schema import Settings
from drafters.catalog import CATALOG
from drafters.trainable import CarriedByTarget, Trainable, trainable
from targets.config import load_config
from targets.find import target_folder
from targets.fits import check_same_tokenizer
from targets.last_layer import LastLayer, load_last_layer
from targets.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from targets.causal import CausalWeights

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """What a drafter must know about its target, and match."""

    config: Any
    """Hugging Face config."""
    lm_head_VH: Tensor
    """[V, H], any dtype and device."""
    fingerprint: str
    """64 hex digits that tie bundles to the target."""
    former: tuple[str, ...] = ()
    """Those of weights that this target had before: drafters made for them go on with these."""


@dataclass(frozen=True, slots=True)
class CausalSource:
    """The causal LM that new weights are."""

    folder: Path
    num_layers: int | None = None
    """Its first layers alone; ``None``: all."""


@dataclass(frozen=True, slots=True)
class NewDrafter:
    """How weights are made where none are given."""

    layer_ids: tuple[int, ...] | None = None
    """Layers to tap; ``None``: the kind's default."""
    seed: int = 0
    """Of random weights."""
    imitated: Path | None = None
    """Folder of the target whose last layer the drafter's begins as; ``None``: random weights."""
    vocab: Path | None = None
    """JSON file with the token ids that the drafter may propose; ``None``: all."""
    must_imitate: bool = True
    """A layer that cannot be copied is an error; otherwise weights are random then."""
    causal: CausalSource | None = None
    """For kinds that are a causal LM: which one; ``None``: random weights."""


def new_drafter(settings: Settings) -> NewDrafter:
    """How the settings of a run say that weights are made.

    Raises:
        ValueError: ``drafter.init`` is ``target`` and the target's folder is not found; or
            ``drafter.model`` is not found or has another tokenizer; or the target has fewer layers
            than ``drafter.draft_model.target_layers``.
    """
    d = settings.drafter
    if d.kind in CATALOG and CATALOG[d.kind].is_model:
        return NewDrafter(d.layer_ids, settings.seed, vocab=d.draft_vocab, causal=_source(settings))
    imitated = None
    if d.init != "random" and d.path is None:
        try:
            imitated = target_folder(settings.target, settings.target_cache)
        except ValueError:  # a target may be in memory alone
            if d.init == "target":
                raise
    return NewDrafter(d.layer_ids, settings.seed, imitated, d.draft_vocab, d.init == "target")


def _source(settings: Settings) -> CausalSource | None:
    """What ``drafter.model``, ``drafter.draft_model`` and ``drafter.init`` say."""
    d = settings.drafter
    if d.path is not None or (d.model is None and d.init == "random"):
        return None
    own = target_folder(settings.target, settings.target_cache)
    if d.model is not None:
        try:
            folder = target_folder(d.model, settings.target_cache)
        except ValueError as error:
            raise ValueError(f"drafter.model cannot be used: {error}") from error
        check_same_tokenizer(load_tokenizer(own), load_tokenizer(folder), d.model)
        return CausalSource(folder)
    layers, has = d.draft_model.target_layers, load_config(own).get_text_config().num_hidden_layers
    if layers is None:
        layers = max(1, has // 4)
    if layers > has:
        raise ValueError(
            f"drafter.draft_model.target_layers is {layers}, but the target has {has} layers"
        )
    return CausalSource(own, layers)


@dataclass(frozen=True, slots=True)
class StoredDrafter:
    """A bundle that was checked against its config and the target."""

    manifest: Manifest
    tensors: dict[str, Tensor]
    """On the CPU, in the dtype of the bundle."""
    layer_ids: tuple[int, ...]
    """Layers of the target that it taps."""


def first_drafter(
    store: WeightsStore,
    kind: str,
    target: TargetFacts,
    *,
    path: Path | None,
    new: NewDrafter,
) -> StoredDrafter:
    """Newest version in the store that is sound and was not rolled back.

    An empty store first gets version 0: a copy of the bundle at ``path``, or new weights.

    Args:
        store: the run's versions.
        kind: kind of drafter the run uses.
        path: bundle folder; ``None``: new weights.
        new: how they are made.

    Raises:
        ValueError: no version can be used, or it is of another kind, or made for another target,
            or drafters of this kind do not learn.
    """
    if not store.versions():
        publish_initial(store, *_version_0(kind, target, path, new))
    bundle, passed_over = store.newest_sound()
    version = bundle.manifest.version
    for problem in passed_over:
        log.warning("%s Starting with version %d.", problem, version)
    name = f"version {version} in {store.location}"
    _check_kind(bundle.manifest, kind, name, other="another run_dir")
    return _checked(bundle, name, target)


def unpublished_drafter(
    kind: str, target: TargetFacts, *, path: Path | None, new: NewDrafter
) -> StoredDrafter:
    """What ``first_drafter`` would publish as version 0, for a server whose store cannot be
    written. Whoever publishes it later makes the same.

    Raises:
        ValueError: as for ``first_drafter``.
    """
    manifest, content = _version_0(kind, target, path, new)
    bundle = Bundle(_as_version_0(manifest), {TENSORS: content})
    return _checked(bundle, "version 0", target)


def stored_drafter(path: Path, target: TargetFacts) -> StoredDrafter:
    """The drafter in the bundle folder ``path``.

    Raises:
        ValueError: it is damaged, or made for another target, or of a kind that does not learn.
    """
    return _checked(read_bundle(path), str(path), target)


def made_drafter(kind: str, target: TargetFacts, new: NewDrafter) -> tuple[Manifest, bytes]:
    """Manifest and safetensors bytes of new weights, a function of the arguments alone.

    Raises:
        ValueError: a layer id or token id that the target does not have, or a target whose last
            layer cannot be copied.
    """
    learner, head = trainable(kind), target.lm_head_VH.float().cpu()
    ids = None if new.vocab is None else torch.tensor(read_vocab(new.vocab, len(head)))
    model = _carried_model(learner, new, ids)
    if model is None:
        last_layer = _imitated_layer(new)
        more: dict[str, CausalWeights] = {}
        if new.causal is not None:
            from targets.causal import read_causal  # transformers takes seconds

            more = {"causal": read_causal(new.causal.folder, new.causal.num_layers)}
        model = learner.new_model(
            target.config, head, new.layer_ids, new.seed, ids, last_layer, **more
        )
    manifest = Manifest(0, None, kind, learner.config_to_json(model), target.fingerprint, {})
    return manifest, save(learner.bundle_tensors(model))


def _carried_model(
    learner: Trainable[Any], new: NewDrafter, draft_ids: Tensor | None
) -> nn.Module | None:
    """The drafter within the target's own checkpoint; ``None``: there is none, or random weights
    are wanted."""
    if new.imitated is None or not isinstance(learner, CarriedByTarget):
        return None
    try:
        model = learner.carried_model(new.imitated, draft_ids)
    except ValueError as error:
        if new.must_imitate:
            raise ValueError(f"{error}. Set drafter.init to 'random'") from error
        log.info("the drafter in the checkpoint of the target cannot be used: %s", error)
        return None
    if model is not None:
        log.info("the drafter begins as the one in the checkpoint of the target")
    return model


def _imitated_layer(new: NewDrafter) -> LastLayer | None:
    """What new weights begin as; ``None``: random weights."""
    if new.imitated is None:
        return None
    try:
        return load_last_layer(new.imitated)
    except ValueError as error:
        if new.must_imitate:
            raise ValueError(f"{error}. Set drafter.init to 'random'") from error
        log.info("the drafter begins with random weights: %s", error)
        return None


def read_vocab(path: Path, vocab_size: int) -> list[int]:
    """Token ids of a draft vocabulary, ascending.

    Args:
        path: JSON list of ids, in any order.
        vocab_size: of the target.

    Raises:
        ValueError: the file does not hold such a list, or an id is not the target's.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"drafter.draft_vocab {path} cannot be read: {error}") from error
    if not isinstance(found, list) or not all(type(x) is int for x in found):
        raise ValueError(f"drafter.draft_vocab {path} is not a JSON list of token ids")
    ids = sorted(set(found))
    if not ids or ids[0] < 0 or ids[-1] >= vocab_size:
        raise ValueError(
            f"drafter.draft_vocab {path} must list token ids from 0 to {vocab_size - 1}"
        )
    return ids


def publish_initial(store: WeightsStore, manifest: Manifest, content: bytes) -> None:
    """Publish tensors as version 0, unless another process has just done so.

    Args:
        manifest: kind, config, target, gate figures and calibration are kept; the rest is set here.
        content: safetensors bytes.

    Raises:
        ValueError: the bundle is not sound, and the store has no version yet.
    """
    initial = _as_version_0(manifest)
    try:
        store.publish(initial, {TENSORS: content})
    except ValueError:
        if not store.versions():
            raise
        # The run's server or trainer published version 0 first, from the same settings.


def _as_version_0(manifest: Manifest) -> Manifest:
    now_ms = int(time.time() * 1000)
    return replace(
        manifest, version=0, parent=None, files={}, created_unix_ms=now_ms, signature=None
    )


def _version_0(
    kind: str, target: TargetFacts, path: Path | None, new: NewDrafter
) -> tuple[Manifest, bytes]:
    """Manifest and safetensors bytes of what a run begins with."""
    if path is None:
        return made_drafter(kind, target, new)
    if not path.is_dir():
        raise ValueError(f"drafter.path {path} is not a folder")
    try:
        bundle = read_bundle(path)
    except BundleError as error:
        raise ValueError(
            f"drafter.path {path} is not a sound bundle: {error.problem}; not starting. `drafters "
            f"import` makes a bundle from a published drafter; null makes new weights"
        ) from error
    name = f"drafter.path {path}"
    _check_kind(bundle.manifest, kind, name, other="another drafter.path, or null for new weights")
    _checked(bundle, name, target)
    return bundle.manifest, bundle.files[TENSORS]


def _check_kind(manifest: Manifest, kind: str, name: str, other: str) -> None:
    """
    Args:
        other: what to choose if the drafter of ``name`` is not meant.
    """
    if manifest.kind != kind:
        raise ValueError(
            f"{name} holds a drafter of kind {manifest.kind!r}, but drafter.kind is {kind!r}; not "
            f"starting. Choose {other}, or set drafter.kind to {manifest.kind!r}"
        )


def _checked(bundle: Bundle, name: str, target: TargetFacts) -> StoredDrafter:
    manifest = bundle.manifest
    if manifest.target_fingerprint in target.former:
        log.info("%s was made for former weights of the target; it goes on with these", name)
        manifest = replace(manifest, target_fingerprint=target.fingerprint)
    if manifest.target_fingerprint != target.fingerprint:
        raise ValueError(
            f"{name} was made for target {manifest.target_fingerprint[:12]}, but the target in "
            f"settings is {target.fingerprint[:12]}; not starting. Choose another run_dir, or a "
            f"target and drafter that belong together"
        )
    learner = trainable(manifest.kind)
    shape = learner.target_shape(manifest.drafter_config)
    vocab_size, hidden_size = target.lm_head_VH.shape
    if (shape.vocab_size, shape.hidden_size) != (vocab_size, hidden_size):
        raise ValueError(
            f"{name} is shaped for vocabulary {shape.vocab_size} and hidden size "
            f"{shape.hidden_size}, but the target has {vocab_size} and {hidden_size}; not "
            f"starting. Choose a target and drafter that belong together"
        )
    tensors = load(bundle.files[TENSORS])
    try:
        learner.check(manifest.drafter_config, tensors)
    except ValueError as error:
        raise ValueError(f"{name} contradicts itself, not starting: {error}") from error
    return StoredDrafter(manifest, tensors, shape.layer_ids)
