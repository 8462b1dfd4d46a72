"""The weights that a trainer starts from."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from buffer.records import Manifest
from buffer.run_target import former_of
from buffer.weights_store import WeightsStore
from configs.schema import Settings
from drafters.initial import (
    StoredDrafter,
    TargetFacts,
    first_drafter,
    new_drafter,
    stored_drafter,
)
from drafters.trainable import trainable
from targets.head import TargetHead


def newest_drafter(
    settings: Settings, store: WeightsStore, head: TargetHead, fingerprint: str
) -> tuple[Manifest, nn.Module]:
    """Newest sound version of the run as a float32 model; publishes version 0 if there is none.

    Raises:
        ValueError: see ``drafters.initial.first_drafter``.
    """
    drafter = settings.drafter
    stored = first_drafter(
        store,
        drafter.kind,
        TargetFacts(
            head.config,
            head.lm_head.weight_VH,
            fingerprint,
            former_of(settings.run_dir, fingerprint),
        ),
        path=drafter.path,
        new=new_drafter(settings),
    )
    return _as_model(stored)


def read_drafter(path: Path, head: TargetHead, fingerprint: str) -> tuple[Manifest, nn.Module]:
    """A bundle folder as a float32 model.

    Raises:
        ValueError: see ``drafters.initial.stored_drafter``.
    """
    return _as_model(
        stored_drafter(path, TargetFacts(head.config, head.lm_head.weight_VH, fingerprint))
    )


def _as_model(stored: StoredDrafter) -> tuple[Manifest, nn.Module]:
    manifest = stored.manifest
    model: nn.Module = trainable(manifest.kind).load_model(manifest.drafter_config, stored.tensors)
    return manifest, model
