"""Which weights the trainer begins with: the newest of the run, else version 0."""

from __future__ import annotations

import logging
from pathlib import Path

from safetensors.torch import load

from buffer.bundles import Bundle, read_bundle
from buffer.interface import WeightsStore
from buffer.manifest import TENSORS
from buffer.records import Manifest
from configs.schema import Settings
from drafters.eagle3.model import Eagle3, Eagle3Config
from drafters.initial import publish_initial, random_drafter
from targets.head import TargetHead

log = logging.getLogger(__name__)


def newest_drafter(
    settings: Settings, store: WeightsStore, head: TargetHead, fingerprint: str
) -> tuple[Manifest, Eagle3]:
    """The newest published bundle of ``run_dir`` that is whole and was not rolled back; if there is
    none at all, version 0 is made first.

    Version 0 is the bundle in ``drafter.path``, or random weights of ``seed``. A server on the same
    ``run_dir`` publishes the same version 0 from the same settings: whoever is first.

    Raises:
        ValueError: no bundle can be used, or it is of another kind, or made for another target.
    """
    if not store.versions():
        _publish_initial(settings, head, fingerprint, store)
    bundle, passed_over = store.newest_sound()
    for problem in passed_over:
        log.warning("%s Training goes on from version %d.", problem, bundle.manifest.version)
    where = f"{store.location}/{bundle.manifest.version}"
    return _model_of(bundle, where, head, fingerprint)


def read_drafter(path: Path, head: TargetHead, fingerprint: str) -> tuple[Manifest, Eagle3]:
    """A bundle as a model with float32 weights.

    Raises:
        ValueError: it is damaged, of another kind, or made for another target.
    """
    return _model_of(read_bundle(path), str(path), head, fingerprint)


def _model_of(
    bundle: Bundle, path: str, head: TargetHead, fingerprint: str
) -> tuple[Manifest, Eagle3]:
    manifest = bundle.manifest
    if manifest.target_fingerprint != fingerprint:
        raise ValueError(
            f"{path} was made for target {manifest.target_fingerprint[:12]}, but the target in "
            f"settings is {fingerprint[:12]}; not training. Choose another run_dir, or the target "
            f"and drafter that belong together"
        )
    if manifest.kind != "eagle3":
        raise ValueError(f"{path} is a {manifest.kind} drafter; only eagle3 can be trained")
    config = Eagle3Config.from_json(manifest.drafter_config)
    vocab_size, hidden_size = head.lm_head.weight_VH.shape
    if (config.target_vocab_size, config.hidden_size) != (vocab_size, hidden_size):
        raise ValueError(
            f"{path} is shaped for vocabulary {config.target_vocab_size} and hidden size "
            f"{config.hidden_size}, the target has {vocab_size} and {hidden_size}"
        )
    model = Eagle3(config)
    try:
        model.load_state_dict(load(bundle.files[TENSORS]))
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its own drafter_config: {error}") from error
    return manifest, model


def _publish_initial(
    settings: Settings, head: TargetHead, fingerprint: str, store: WeightsStore
) -> None:
    path = settings.drafter.path
    if path is None:
        manifest, content = random_drafter(
            head.config,
            head.lm_head.weight_VH,
            settings.drafter.layer_ids,
            settings.seed,
            fingerprint,
        )
    else:
        read_drafter(path, head, fingerprint)  # refuse what could not be trained
        bundle = read_bundle(path)
        manifest, content = bundle.manifest, bundle.files[TENSORS]
    publish_initial(store, manifest, content)
