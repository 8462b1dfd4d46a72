"""Tensors that are made in the memory that servers read are published as any others, and servers
get that memory to themselves while they read."""

import dataclasses
import gc
import shutil
import threading

import numpy as np
import pytest

from buffer import reader_locks
from buffer.bundles import BundleError, HostBuffer
from buffer.folder_weights import FolderWeights
from buffer.manifest import TENSORS
from buffer.mapped_files import MappedFiles
from buffer.reader_locks import is_read, read_lock
from buffer.sealed import seal, seal_in
from buffer.shared_folder import NAME_FILE
from buffer.shared_memory import SharedWeights
from buffer.tensors import tensor_layout
from oracles.small_disk import small_file_system
from tests.buffer.sample_bundle import MANIFEST

NUM = 5000


@pytest.fixture
def store(root, memory):
    return SharedWeights(root, memory)


def folder_of(root, memory):
    return memory / f"slipstream-{(root / NAME_FILE).read_text()}"


def arrays(fill, num=NUM):
    return {
        "w": ("F32", np.full((num, 2), fill, np.float32)),
        "b": ("BF16", np.full(7, 16_000, np.uint16)),
        "none": ("F32", np.zeros((0, 3), np.float32)),
    }


def made(store, fill, num=NUM):
    """A file made in the memory of a store."""
    tensors = arrays(fill, num)
    layout = tensor_layout({name: (tag, one.shape) for name, (tag, one) in tensors.items()})
    place = store.lend(layout.num_bytes)
    assert place is not None and len(place) == layout.num_bytes

    def make(name, start, end):
        at = layout.tensors[name].start
        place[at + start : at + end] = tensors[name][1].tobytes()[start:end]

    content = seal_in(place, layout, make)
    store.prepare(content)
    return content


def publish(store, version, content):
    parent = version - 1 if version else None
    manifest = dataclasses.replace(MANIFEST, version=version, parent=parent)
    return store.publish(manifest, {TENSORS: content})


def test_what_is_made_in_the_memory_of_a_store_is_the_same_file(store, root, memory):
    content = made(store, 3)
    (prepared,) = folder_of(root, memory).glob(f".tmp-*/{TENSORS}")
    before, expected = prepared.stat(), seal(arrays(3))
    assert store.versions() == []
    published = publish(store, 0, content)

    assert content.joined() == expected.joined()
    assert published.files[TENSORS] == expected.digest
    after = (folder_of(root, memory) / "0" / TENSORS).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    for read in (store.read, FolderWeights(root).read):
        assert read(0).files[TENSORS] == expected.joined()


def test_versions_take_turns_in_two_files_whatever_their_length(store, root, memory):
    number_of = {}
    for version, num in enumerate((NUM, NUM, NUM, 9, NUM + 5, NUM)):
        publish(store, version, made(store, version, num))
        file = folder_of(root, memory) / str(version) / TENSORS
        number_of[version] = file.stat().st_ino
        assert file.read_bytes() == seal(arrays(version, num)).joined()
        assert FolderWeights(root).read(version).files[TENSORS] == file.read_bytes()

    assert number_of[0] == number_of[2] == number_of[4] != number_of[1]
    assert number_of[1] == number_of[3] == number_of[5]


def test_what_was_made_in_vain_is_overwritten_by_the_next(store, root):
    made(store, 1)
    store.lend(100)
    publish(store, 0, made(store, 2))
    assert store.read(0).files[TENSORS] == seal(arrays(2)).joined()
    for version, is_prepared in ((1, False), (2, True)):  # made elsewhere
        content = seal(arrays(4 + version))
        store.lend(len(content))
        if is_prepared:
            store.prepare(content)
        publish(store, version, content)
        shutil.rmtree(root / str(version))  # so that it is read from memory
        assert store.read(version).files[TENSORS] == content.joined()


def test_what_somebody_deleted_before_it_was_published_is_written_again(store, root, memory):
    content = made(store, 5)
    for one in folder_of(root, memory).glob(".tmp-*"):
        shutil.rmtree(one)
    publish(store, 0, content)
    shutil.rmtree(root / "0")  # so that it is read from memory
    assert store.read(0).files[TENSORS] == seal(arrays(5)).joined()


def test_bytes_that_change_after_they_were_digested_are_never_served(store, root, memory):
    """Before the version is published, and once it is."""
    content = made(store, 1)
    content.place[-1] ^= 1
    publish(store, 0, content)
    for read in (store.read, lambda version: store.read_into(HostBuffer(), version)):
        with pytest.raises(BundleError, match="has sha256"):
            read(0)

    content = made(store, 2)
    publish(store, 1, content)
    content.place[-1] ^= 1
    assert store.read_into(HostBuffer(), 1).content.tobytes() == seal(arrays(2)).joined()  # disk
    shutil.rmtree(root / "1")
    with pytest.raises(BundleError):
        store.read_into(HostBuffer(), 1)


def test_a_nan_that_is_made_in_lent_memory_is_not_published(store):
    with pytest.raises(ValueError, match=r"tensors \['w'\] hold NaN"):
        publish(store, 0, made(store, np.float32("nan")))
    assert store.versions() == []


def test_full_memory_lends_nothing_and_costs_no_version(root, tmp_path):
    with small_file_system(tmp_path / "small", "64k") as memory:
        store = SharedWeights(root, memory)
        assert store.lend(1 << 20) is None
        assert store.lend(1 << 12) is not None
        assert store.lend(1 << 20) is None
        publish(store, 0, seal(arrays(1, 20_000)))
        assert store.read(0).files[TENSORS] == seal(arrays(1, 20_000)).joined()
        del store
        gc.collect()


def test_a_file_is_mapped_once_and_its_memory_is_there_before_it_is_used(tmp_path):
    files, path = MappedFiles(), tmp_path / "file"
    first = files.of(path, 1 << 20)
    first[:3] = b"abc"
    assert path.stat().st_blocks * 512 >= 1 << 20
    again = files.of(path, 1 << 19)
    assert again.obj is first.obj and again[:3] == b"abc"
    assert path.stat().st_size == 1 << 19
    longer = files.of(path, 1 << 21)
    longer[-1] = 7
    assert path.read_bytes()[-1] == 7 and path.read_bytes()[:3] == b"abc"


# ---- readers -------------------------------------------------------------------------------------


def test_a_reader_is_seen_as_long_as_it_reads(tmp_path):
    assert not is_read(tmp_path)
    with read_lock(tmp_path), read_lock(tmp_path):
        assert is_read(tmp_path)
    assert not is_read(tmp_path)
    with read_lock(tmp_path / "gone"):
        assert not is_read(tmp_path / "gone")


class Publishing:
    """A version that is published on a thread of its own."""

    def __init__(self, store):
        self.thread = threading.Thread(target=publish, args=(store, 0, seal(arrays(1))))
        self.thread.start()

    def is_done(self, within_s):
        self.thread.join(within_s)
        return not self.thread.is_alive()


def test_the_disk_is_written_once_a_server_has_read_the_version_in_memory(
    store, root, memory, monkeypatch
):
    monkeypatch.setattr(reader_locks, "COMES_WITHIN_S", 1e9)
    monkeypatch.setattr(reader_locks, "LONGEST_S", 1e9)
    heard = threading.Event()
    server = SharedWeights(root, memory)
    store.take_over()
    end = server.watch(heard.set)
    heard.wait(20)  # so that it listens
    publishing = Publishing(store)
    while server.versions() != [0]:
        assert not publishing.is_done(0.001)

    with read_lock(folder_of(root, memory) / "0"):
        assert not publishing.is_done(0.1)
        assert FolderWeights(root).versions() == []
        assert server.read_into(HostBuffer(), 0).manifest.version == 0
        assert not publishing.is_done(0.05)
    assert publishing.is_done(60)
    assert FolderWeights(root).versions() == [0]
    end()


@pytest.mark.parametrize("what", ["nobody listens", "nobody reads", "a reader never ends"])
def test_the_disk_does_not_wait_for_long(store, root, memory, monkeypatch, what):
    monkeypatch.setattr(reader_locks, "COMES_WITHIN_S", 0.02 if what == "nobody reads" else 1e9)
    monkeypatch.setattr(reader_locks, "LONGEST_S", 0.02 if "never" in what else 1e9)
    store.take_over()
    heard = threading.Event()
    end = store.watch(heard.set) if what != "nobody listens" else heard.set
    if what != "nobody listens":
        heard.wait(20)
    assert Publishing(store).is_done(60)
    assert FolderWeights(root).versions() == [0]
    end()
