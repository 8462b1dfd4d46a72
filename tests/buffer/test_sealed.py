"""A bundle's large file in one pass: the same bytes, digest and verdict as one after another."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest

from buffer.bundles import BundleError, HostBuffer
from buffer.folder_weights import FolderWeights
from buffer.manifest import TENSORS
from buffer.records import Manifest
from buffer.sealed import CHUNK_BYTES, PIECE_BYTES, Digesting, seal, sha256_of
from buffer.tensors import FiniteScan, TensorInfo, check_safetensors

FIRST = Manifest(0, None, "eagle3", {}, "ab" * 32, {})
NUM_VALUES = CHUNK_BYTES // 4 + 1000
"""float32 values that do not fit in one chunk."""


def large(**values: float) -> dict[str, tuple[str, np.ndarray]]:
    """Two tensors over several chunks; ``w`` and ``last`` replace single values."""
    w, last = np.ones((2, NUM_VALUES), np.float32), np.ones(7, np.float32)
    for at, value in (((1, NUM_VALUES - 1), "w"), ((0, CHUNK_BYTES // 4), "early")):
        w[at] = values.get(value, 1.0)
    last[-1] = values.get("last", 1.0)
    return {"w": ("F32", w), "z": ("F32", last), "ids": ("I64", np.arange(3))}


def test_a_sealed_file_is_that_of_the_library():
    torch = pytest.importorskip("torch")
    from safetensors.torch import save

    sealed = seal(large())

    expected = save({name: torch.from_numpy(a) for name, (_, a) in large().items()})
    assert sealed.joined() == expected
    assert sealed.digest.sha256 == hashlib.sha256(expected).hexdigest()
    assert sealed.digest.num_bytes == len(expected)
    assert sealed.non_finite == ()


@pytest.mark.parametrize(("where", "name"), [("w", "w"), ("early", "w"), ("last", "z")])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_sealed_file_with_a_nan_anywhere_is_not_published(tmp_path: Path, where, name, value):
    store = FolderWeights(tmp_path)

    with pytest.raises(ValueError, match=rf"tensors \['{name}'\] hold NaN or infinity"):
        store.publish(FIRST, {TENSORS: seal(large(**{where: value}))})

    assert store.versions() == []


def test_what_was_sealed_is_read_back_and_checked_in_one_pass(tmp_path: Path):
    store, host = FolderWeights(tmp_path), HostBuffer()
    store.publish(FIRST, {TENSORS: seal(large())})

    bundle = store.read_into(host, 0)

    assert len(seal(large())) == len(bundle.content)
    assert bundle.content.tobytes() == seal(large()).joined()
    assert bundle.tensors == check_safetensors(bundle.content.data)


@pytest.mark.parametrize("at", [-1, CHUNK_BYTES, CHUNK_BYTES - 1, 3])
def test_a_reader_finds_a_flipped_bit_in_any_chunk(tmp_path: Path, at: int):
    store = FolderWeights(tmp_path)
    store.publish(FIRST, {TENSORS: seal(large())})
    path = tmp_path / "0" / TENSORS
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)

    with pytest.raises(BundleError, match="has sha256"):
        store.read_into(HostBuffer(), 0)


def test_a_value_that_is_cut_in_two_is_looked_at_once_it_has_arrived():
    """Tensors begin at odd bytes and chunks end inside of values, wherever a NaN lies."""
    chance = random.Random(0)
    for position in range(12):
        infos = {"a": TensorInfo("F32", (5,), 3, 23), "b": TensorInfo("BF16", (7,), 23, 37)}
        a, b = np.ones(5, np.float32), np.zeros(7, np.uint16)
        if position < 5:
            a[position] = np.nan
        else:
            b[position - 5] = 0xFF80
        blob = b"xyz" + a.tobytes() + b.tobytes()
        arrived = bytearray(b"\x7f" * len(blob))  # what is not there yet would be NaN
        scan = FiniteScan(memoryview(arrived), infos)
        cuts = sorted(chance.sample(range(1, len(blob)), 6))
        for start, end in zip([0, *cuts], [*cuts, len(blob)], strict=True):
            arrived[start:end] = blob[start:end]
            scan.advance(end)

        assert scan.broken == (["a"] if position < 5 else ["b"])


def test_nothing_is_found_in_finite_values_however_they_arrive():
    values = np.linspace(-3e38, 3e38, 50, dtype=np.float32)
    blob = b"?" + values.tobytes()
    info = {"a": TensorInfo("F32", (50,), 1, len(blob))}
    arrived = bytearray(b"\xff" * len(blob))
    scan = FiniteScan(memoryview(arrived), info)
    for end in range(1, len(blob) + 1):
        arrived[end - 1] = blob[end - 1]
        scan.advance(end)

    assert scan.broken == []


def digest_in_pieces(content: bytes, piece_bytes: int) -> str:
    """The definition."""
    pieces = [content[at : at + piece_bytes] for at in range(0, len(content), piece_bytes)]
    return hashlib.sha256(b"".join(hashlib.sha256(one).digest() for one in pieces)).hexdigest()


@pytest.mark.parametrize("num_bytes", [0, 1, 1000, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
@pytest.mark.parametrize("piece_bytes", [1 << 20, CHUNK_BYTES, CHUNK_BYTES + 7, 1 << 30])
def test_a_digest_in_pieces_is_that_of_the_definition_whatever_the_chunks(num_bytes, piece_bytes):
    content, chance = random.Random(0).randbytes(num_bytes), random.Random(1)
    digesting, at = Digesting(num_bytes, piece_bytes), 0
    while at < num_bytes:
        end = at + chance.randrange(1, CHUNK_BYTES + 1)
        digesting.update(memoryview(content)[at:end])
        at = end
    digesting.end()

    assert digesting.sha256 == digest_in_pieces(content, piece_bytes)
    assert sha256_of(content, piece_bytes) == digesting.sha256
    assert sha256_of(content, None) == hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def huge() -> dict[str, tuple[str, np.ndarray]]:
    """Tensors above the size from which files are digested in pieces."""
    return {"w": ("F32", np.ones(17 << 20, np.float32)), "z": ("F32", np.ones(7, np.float32))}


def test_a_huge_file_is_digested_in_pieces_and_its_manifest_says_so(tmp_path: Path, huge):
    store, host = FolderWeights(tmp_path), HostBuffer()
    content = seal(huge)
    store.publish(FIRST, {TENSORS: content})

    body = json.loads((tmp_path / "0" / "manifest.json").read_bytes())
    digest = digest_in_pieces(content.joined(), PIECE_BYTES)
    assert body["schema_version"] == 2
    assert body["files"][TENSORS] == {
        "sha256": digest, "num_bytes": len(content), "piece_bytes": PIECE_BYTES
    }  # fmt: skip
    assert store.read_into(host, 0).manifest.files[TENSORS] == content.digest
    assert store.read(0).files[TENSORS] == content.joined()

    with (tmp_path / "0" / TENSORS).open("r+b") as file:
        file.seek(3 * PIECE_BYTES)
        file.write(b"\x01")
    for read in (store.read, lambda version: store.read_into(host, version)):
        with pytest.raises(BundleError, match="has sha256"):
            read(0)


def test_a_manifest_of_small_files_can_be_read_by_those_who_know_no_pieces(tmp_path: Path):
    FolderWeights(tmp_path).publish(FIRST, {TENSORS: seal(large())})

    body = json.loads((tmp_path / "0" / "manifest.json").read_bytes())
    assert body["schema_version"] == 1
    assert set(body["files"][TENSORS]) == {"sha256", "num_bytes"}


def test_pieces_that_change_places_are_found(tmp_path: Path):
    store = FolderWeights(tmp_path)
    store.publish(FIRST, {TENSORS: seal({"w": ("F32", np.arange(17 << 20, dtype=np.float32))})})
    path = tmp_path / "0" / TENSORS
    content = bytearray(path.read_bytes())
    first, second = slice(PIECE_BYTES, 2 * PIECE_BYTES), slice(2 * PIECE_BYTES, 3 * PIECE_BYTES)
    content[first], content[second] = content[second], content[first]
    path.write_bytes(content)

    with pytest.raises(BundleError, match="has sha256"):
        store.read_into(HostBuffer(), 0)
