"""Whatever holds the versions, a store with a public key takes none that its key has not signed."""

import dataclasses

import pytest

from buffer.bundles import BundleError, HostBuffer
from buffer.signatures import read_public_keys, read_signing_key, write_key_pair
from buffer.signed_weights import SignatureError, open_weights
from buffer.tensors import join_tensors
from tests.buffer.sample_bundle import EXPECTED, MANIFEST, tensors

FILES = {"drafter.safetensors": join_tensors(tensors(), {})}


@pytest.fixture
def keys(tmp_path):
    """(private, public) of the publisher, and of somebody else."""
    pairs = []
    for name in ("ours", "theirs"):
        pairs.append((tmp_path / f"{name}.key", tmp_path / f"{name}.pub"))
        write_key_pair(*pairs[-1])
    return pairs


def as_version(version):
    return dataclasses.replace(MANIFEST, version=version, parent=version - 1 if version else None)


def read(store, version):
    """Both ways of reading; returns the manifest."""
    manifest = store.read(version, EXPECTED).manifest
    assert store.read_into(HostBuffer(), version, EXPECTED).manifest == manifest
    assert store.read_manifest(version) == manifest
    return manifest


def refused(store, version):
    """Reason and text with which every way of reading refuses a version."""
    found = set()
    for way in (
        lambda: store.read_manifest(version),
        lambda: store.read(version),
        lambda: store.read_into(HostBuffer(), version),
    ):
        with pytest.raises(BundleError) as error:
            way()
        found.add((error.value.reason, str(error.value)))
    [(reason, text)] = found
    return reason, text


def test_only_versions_of_the_key_are_taken(open_buffer, keys):
    (private, public), (other_private, other_public) = keys
    trainer = open_weights(open_buffer(), None, private)
    server = open_weights(open_buffer(), public)
    trainer.publish(as_version(0), FILES, trainer.take_over())
    assert read(server, 0).signature.startswith("ed25519:")
    assert read(trainer, 0) == read(open_buffer().open_weights(), 0)

    open_buffer().open_weights().publish(as_version(1), FILES)
    open_weights(open_buffer(), None, other_private).publish(as_version(2), FILES)
    signed = read_signing_key(private).signed(as_version(3))  # without its files
    open_buffer().open_weights().publish(signed, FILES)

    assert refused(server, 1)[0] == "unsigned"
    assert "snapshot 1 is refused: " in refused(server, 1)[1]
    assert "it is not signed; not swapping" in refused(server, 1)[1]
    for version in (2, 3):
        reason, text = refused(server, version)
        assert reason == "signature"
        assert "its signature is of another key, or of another manifest" in text
    bundle, passed_over = server.newest_sound()
    assert bundle.manifest.version == 0
    assert len(passed_over) == 3
    assert server.versions() == [0, 1, 2, 3]
    assert read(open_weights(open_buffer(), other_public), 2).version == 2


def test_a_signature_belongs_to_its_version(open_buffer, keys):
    (private, public), _ = keys
    trainer = open_weights(open_buffer(), None, private)
    first = trainer.publish(as_version(0), FILES)
    plain = open_buffer().open_weights()
    plain.publish(dataclasses.replace(first, version=1), FILES)
    plain.publish(dataclasses.replace(first, version=2, gate={"tokens_per_step": 9.0}), FILES)
    plain.publish(dataclasses.replace(first, version=3, signature="ed25519:00"), FILES)

    server = open_weights(open_buffer(), public)
    assert read(server, 0) == first
    assert [refused(server, version)[0] for version in (1, 2, 3)] == ["signature"] * 3


def test_a_server_publishes_nothing_that_it_would_refuse(open_buffer, keys):
    (_, public), _ = keys
    server = open_weights(open_buffer(), public)
    with pytest.raises(PermissionError, match="this process has no private key"):
        server.publish(as_version(0), FILES)
    assert server.versions() == []


def test_a_changed_file_is_refused_before_it_is_used(place, open_buffer, keys):
    if place.damage is None:
        pytest.skip("no way to change what this store holds")
    (private, public), _ = keys
    open_weights(open_buffer(), None, private).publish(as_version(0), FILES)
    place.damage(0)
    server = open_weights(open_buffer(), public)
    with pytest.raises(BundleError) as error:
        server.read(0)
    assert not isinstance(error.value, SignatureError)
    assert error.value.reason == "damaged"


def test_both_keys_are_taken_while_keys_change(open_buffer, keys, tmp_path):
    both = tmp_path / "both.pub"
    both.write_bytes(b"".join(public.read_bytes() for _, public in keys))
    for version, (private, _) in enumerate(keys):
        open_weights(open_buffer(), both, private).publish(as_version(version), FILES)
    server = open_weights(open_buffer(), both)
    assert [read(server, version).version for version in (0, 1)] == [0, 1]
    assert len(read_public_keys(both).keys) == 2
