"""A bundle in pieces is read as it was published, or refused for what is wrong with its pieces."""

import json

import pytest

from buffer.bundles import BundleError, HostBuffer, prepare_bundle
from buffer.manifest import MANIFEST as MANIFEST_FILE
from buffer.pieces import PiecedBundle
from buffer.tensors import join_tensors
from tests.buffer.sample_bundle import MANIFEST, tensors

TENSORS = join_tensors(tensors(), {})


def stored(change=lambda content: content, may_hold=True, text=None):
    """A version whose tensors come in pieces of 7 bytes, after a change."""
    manifest, files = prepare_bundle(MANIFEST, {"drafter.safetensors": TENSORS})
    content = change(TENSORS)

    def pieces(name, digest):
        yield from (content[at : at + 7] for at in range(0, len(content), 7))

    return PiecedBundle(
        manifest.version,
        "somewhere",
        files[MANIFEST_FILE] if text is None else text,
        lambda name, digest: may_hold,
        pieces,
    )


READERS = {
    "read": lambda bundle: bundle.read(None).files["drafter.safetensors"],
    "read_into": lambda bundle: bytes(bundle.read_into(HostBuffer(), None).content),
}
each_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


@each_reader
def test_pieces_are_put_together(read):
    assert read(stored()) == TENSORS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content + b"!", f"has over {len(TENSORS)} bytes"),
        (lambda content: content * 1000, f"has over {len(TENSORS)} bytes"),
        (lambda content: content[:-1], f"has {len(TENSORS) - 1} bytes, the trainer wrote"),
        (lambda content: b"", "has 0 bytes, the trainer wrote"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "has sha256"),
    ],
    ids=["longer", "much longer", "shorter", "nothing", "flipped"],
)
@each_reader
def test_other_content_is_refused_and_named(change, message, read):
    with pytest.raises(
        BundleError, match=f"somewhere: drafter.safetensors of version .* {message}"
    ):
        read(stored(change))


def test_a_file_that_cannot_be_so_long_is_refused_before_memory_is_taken():
    class NoMemory(HostBuffer):
        def take(self, num_bytes):
            raise AssertionError("memory was taken")

    with pytest.raises(BundleError, match=f"has less than {len(TENSORS)} bytes"):
        stored(may_hold=False).read_into(NoMemory(), None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is unreadable"),
        (b" " * (1 << 24), "has over"),
        (json.dumps([1]).encode(), "manifest.json of version"),
    ],
    ids=["cut", "huge", "no object"],
)
def test_a_manifest_that_is_none_is_refused(text, message):
    with pytest.raises(BundleError, match=message):
        stored(text=text).manifest()
