"""A server with a public key keeps serving what it has, whoever else publishes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from buffer.backends import open_backend
from buffer.folder_weights import FolderWeights
from buffer.manifest import MANIFEST, TENSORS
from buffer.signatures import write_key_pair
from buffer.signed_weights import open_weights
from serving.build import build_service
from tests.serving.swap.test_swaps import ask, settings_for, wait_until


@pytest.fixture
def keys(tmp_path):
    """(private, public) of the trainer, and of somebody else."""
    pairs = [(tmp_path / f"{name}.key", tmp_path / f"{name}.pub") for name in ("own", "other")]
    for pair in pairs:
        write_key_pair(*pair)
    return pairs


def test_versions_that_are_not_signed_are_refused_counted_and_named(
    tiny_target_dir, tmp_path, keys, caplog
):
    (private, public), (other, _) = keys
    root, backend = tmp_path / "weights", open_backend("log:", tmp_path)
    service = build_service(settings_for(tiny_target_dir, tmp_path, public_key=public))
    service.start()
    try:
        # It has no private key, so it stores nothing, and serves the version 0 that all would make.
        before = ask(service, "before")
        assert FolderWeights(root).versions() == []
        other_run = build_service(settings_for(tiny_target_dir, tmp_path / "elsewhere"))
        other_run.stop()
        first = FolderWeights(tmp_path / "elsewhere" / "weights").read(0)

        def publish(version, key=None):
            manifest = replace(first.manifest, version=version, parent=0)
            store = open_weights(backend, None, key)
            store.publish(manifest, {TENSORS: first.files[TENSORS]})

        def refusals():
            return service.figures().refusals

        publish(1)
        wait_until(lambda: refusals() == {"unsigned": 1})
        publish(2, other)
        wait_until(lambda: refusals() == {"unsigned": 1, "signature": 1})
        publish(3, private)
        wait_until(lambda: service.drafter_status()["version"] == 3)
        publish(4, private)
        wait_until(lambda: service.drafter_status()["version"] == 4)

        path = root / "4" / MANIFEST
        changed = json.loads(path.read_bytes())
        changed["gate"]["tokens_per_step"] = 100.0
        path.write_text(json.dumps(changed))
        service.swapper.swap(3)
        with pytest.raises(ValueError, match="its signature is of another key, or of another"):
            service.swapper.swap(4)

        status, after = service.drafter_status(), ask(service, "after")
        assert after.token_ids == before.token_ids
        assert (status["version"], after.last.stats.drafter_version) == (3, 3)
        assert status["refusals"] == {"unsigned": 1, "signature": 2}
        assert status["swaps"]["rejected"] == 3
        assert "snapshot 4 is refused: " in status["last_error"]
        assert "snapshot 1 is refused: " in caplog.text and "it is not signed" in caplog.text
    finally:
        service.stop()


def test_a_start_takes_no_unsigned_version_either(tiny_target_dir, tmp_path, keys):
    (private, public), _ = keys
    build_service(settings_for(tiny_target_dir, tmp_path)).stop()
    settings = settings_for(tiny_target_dir, tmp_path, public_key=public)
    with pytest.raises(ValueError, match=r"can be used: snapshot 0 is refused: .*not signed"):
        build_service(settings)

    first = FolderWeights(tmp_path / "weights").read(0)
    store = open_weights(open_backend("log:", tmp_path), None, private)
    store.publish(replace(first.manifest, version=1, parent=0), first.files)
    service = build_service(settings)
    assert service.drafter_status()["version"] == 1
    service.stop()
