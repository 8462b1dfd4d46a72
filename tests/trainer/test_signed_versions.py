"""A trainer with a private key signs what it publishes, and continues from nothing else."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest

from buffer.backends import open_backend
from buffer.signatures import write_key_pair
from buffer.signed_weights import open_weights
from configs.schema import Settings
from tests.trainer.conftest import World
from tests.trainer.traffic import settings_for, train, write_traces
from trainer.build import build_trainer


def with_key(settings: Settings, public: Path | None) -> Settings:
    swap = settings.swap.model_copy(update={"public_key": public})
    return settings.model_copy(update={"swap": swap})


def test_every_version_is_signed_from_the_first_on(world: World, tmp_path: Path) -> None:
    private, public = tmp_path / "own.key", tmp_path / "own.pub"
    write_key_pair(private, public)
    write_traces(tmp_path, world.traces)

    train(settings_for(tmp_path, world.target, signing_key=private, max_steps=30, gate_margin=0.5))

    store = open_weights(open_backend("log:", tmp_path), public)
    assert store.versions()[:2] == [0, 1]
    assert [store.read(version).manifest.version for version in store.versions()[:2]] == [0, 1]

    # Somebody publishes a version that nobody signed: the next trainer does not continue from it.
    newest = store.read(max(store.versions()))
    number = newest.manifest.version + 1
    forged = dataclasses.replace(newest.manifest, version=number, signature=None)
    open_backend("log:", tmp_path).open_weights().publish(forged, newest.files)
    settings = settings_for(tmp_path, world.target, signing_key=private)
    trainer = build_trainer(with_key(settings, public), threading.Event())
    assert trainer.published.version == newest.manifest.version
    trainer.intake.close()


def test_a_trainer_whose_versions_nobody_would_take_does_not_start(
    world: World, tmp_path: Path
) -> None:
    for name in ("own", "other"):
        write_key_pair(tmp_path / f"{name}.key", tmp_path / f"{name}.pub")
    settings = settings_for(tmp_path, world.target)
    with pytest.raises(ValueError, match=r"trainer\.signing_key is not: nobody would take"):
        build_trainer(with_key(settings, tmp_path / "own.pub"), threading.Event())
    settings = settings_for(tmp_path, world.target, signing_key=tmp_path / "own.key")
    with pytest.raises(ValueError, match=r"other\.pub does not hold the public key of .*own\.key"):
        build_trainer(with_key(settings, tmp_path / "other.pub"), threading.Event())
    assert not (tmp_path / "weights").exists()
