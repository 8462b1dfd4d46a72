"""Key files are made with the right permissions, and refused with a reason that quotes nothing."""

import dataclasses
import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from buffer.cli import app
from buffer.folder_weights import FolderWeights
from buffer.manifest import decode_manifest, encode_manifest
from buffer.signatures import (
    KeyFileError,
    read_public_keys,
    read_signing_key,
    write_key_pair,
)
from buffer.tensors import join_tensors
from tests.buffer.sample_bundle import MANIFEST, tensors


@pytest.fixture
def pair(tmp_path):
    private, public = tmp_path / "own.key", tmp_path / "own.pub"
    write_key_pair(private, public)
    return private, public


def keys(*arguments):
    return CliRunner().invoke(app, ["keys", *map(str, arguments)])


def test_a_command_makes_a_pair_that_belongs_together(tmp_path):
    private, public = tmp_path / "a.key", tmp_path / "a.pub"
    assert keys(private, public).exit_code == 0
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    signed = read_signing_key(private).signed(MANIFEST)
    assert read_public_keys(public).problem(signed) is None
    assert read_signing_key(private).public.problem(signed) is None


def test_no_key_is_overwritten(tmp_path, pair):
    private, public = pair
    before = private.read_bytes(), public.read_bytes()
    for arguments in ((private, tmp_path / "new.pub"), (tmp_path / "new.key", public)):
        result = keys(*arguments)
        assert result.exit_code == 2
        assert "exists already" in result.stderr
    assert (private.read_bytes(), public.read_bytes()) == before
    assert not (tmp_path / "new.key").exists() and not (tmp_path / "new.pub").exists()


def test_a_pair_that_cannot_be_written_leaves_no_private_key(tmp_path):
    private = tmp_path / "k1"
    for public, problem in (
        (private, "need a file each"),
        (tmp_path / "." / "x" / ".." / "k1", "need a file each"),
        (tmp_path / "missing" / "k1.pub", "cannot be written: No such file"),
    ):
        result = keys(private, public)
        assert result.exit_code == 2
        assert problem in " ".join(result.stderr.split())
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620])
def test_a_private_key_that_others_may_use_is_refused(pair, mode):
    private, _ = pair
    private.chmod(mode)
    with pytest.raises(KeyFileError, match=rf"mode {mode:04o}\); run chmod 600"):
        read_signing_key(private)


def test_files_that_are_no_keys_are_refused_without_being_quoted(tmp_path, pair):
    private, public = pair
    other = tmp_path / "other"

    def written(content):
        other.unlink(missing_ok=True)
        other.write_bytes(content)
        other.chmod(0o600)
        return other

    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public_pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for content in (b"", b"canary", public.read_bytes(), pem, private.read_bytes()[:60]):
        with pytest.raises(KeyFileError) as error:
            read_signing_key(written(content))
        assert "canary" not in str(error.value) and "BEGIN" not in str(error.value)
    damaged = public.read_bytes().replace(b"MCow", b"MMow")
    for content in (b"", b"canary", private.read_bytes(), public_pem, damaged):
        with pytest.raises(KeyFileError) as error:
            read_public_keys(written(content))
        assert "canary" not in str(error.value)
    for read in (read_signing_key, read_public_keys):
        with pytest.raises(KeyFileError, match="cannot be read: No such file"):
            read(tmp_path / "missing")


SIGNED_FIELDS = {
    "version": 1,
    "parent": 0,
    "kind": "another",
    "drafter_config": {"hidden_size": 5},
    "target_fingerprint": "cd" * 32,
    "gate": {},
    "policy": {},
    "created_unix_ms": 1,
}


def test_every_field_is_signed(pair):
    private, public = pair
    signed = read_signing_key(private).signed(MANIFEST)
    assert {*SIGNED_FIELDS, "files", "signature"} == set(type(MANIFEST).__dataclass_fields__)
    for name, value in SIGNED_FIELDS.items():
        changed = dataclasses.replace(signed, **{name: value})
        assert getattr(changed, name) != getattr(signed, name)
        assert read_public_keys(public).problem(changed) is not None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3)
    | st.tuples(inner, inner)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
_PAIR = []


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_a_manifest_that_was_stored_and_read_is_still_signed(tmp_path_factory, gate):
    if not _PAIR:
        folder = tmp_path_factory.mktemp("keys")
        write_key_pair(folder / "a", folder / "b")
        _PAIR.append((read_signing_key(folder / "a"), read_public_keys(folder / "b")))
    [(private, public)] = _PAIR
    signed = private.signed(dataclasses.replace(MANIFEST, gate=gate))
    assert public.problem(decode_manifest(encode_manifest(signed))) is None


def test_inspect_reports_versions_that_the_key_has_not_signed(tmp_path, pair):
    _, public = pair
    blob = join_tensors(tensors(), {})
    FolderWeights(tmp_path / "weights").publish(MANIFEST, {"drafter.safetensors": blob})
    assert CliRunner().invoke(app, ["inspect", str(tmp_path)]).exit_code == 0
    setting = f"swap.public_key={public}"
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--set", setting])
    assert result.exit_code == 1
    assert "it is not signed" in result.output
