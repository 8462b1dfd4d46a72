"""Versions pass through memory while the disk still writes; the disk alone would do, and memory is
given back however the processes end."""

import dataclasses
import gc
import json
import os
import shutil
import signal
import stat
import threading
import warnings

import numpy as np
import pytest

from buffer import shared_memory
from buffer.backends import open_backend
from buffer.bundles import BundleError, HostBuffer
from buffer.folder_weights import FolderWeights
from buffer.manifest import TENSORS
from buffer.sealed import seal
from buffer.shared_folder import NAME_FILE, remove_abandoned
from buffer.shared_memory import SharedWeights
from buffer.tensors import join_tensors
from oracles.small_disk import small_file_system
from tests.buffer.sample_bundle import EXPECTED, MANIFEST, tensors


def publish(store, version, **fields):
    manifest = dataclasses.replace(
        MANIFEST, version=version, parent=version - 1 if version else None, **fields
    )
    return store.publish(manifest, {TENSORS: join_tensors(tensors(version), {})})


def folder_of(root, memory):
    return memory / f"slipstream-{(root / NAME_FILE).read_text()}"


def in_child(work):
    """Run a function in a forked process that is killed while it holds what that returned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of threads, which the child needs not
        child = os.fork()
    if child == 0:
        try:
            held = work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
        del held
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_the_newest_version_is_in_memory_and_every_version_on_the_disk(root, memory):
    store = SharedWeights(root, memory)
    for version in range(3):
        publish(store, version)
    shared = folder_of(root, memory)
    assert sorted(one.name for one in shared.iterdir() if one.is_dir()) == [".spare", "2"]
    assert FolderWeights(root).versions() == store.versions() == [0, 1, 2]
    assert store.read(2, EXPECTED) == FolderWeights(root).read(2)

    shutil.rmtree(root / "2")  # so what is read now comes from memory
    assert store.read(2).manifest.version == 2
    assert store.read_into(HostBuffer(), 2, EXPECTED).manifest == store.read_manifest(2)


def test_nobody_else_may_look_into_memory(root, memory):
    store = SharedWeights(root, memory)
    publish(store, 0)
    shared = folder_of(root, memory)
    found = [shared, *shared.rglob("*")]
    assert {(one.is_dir(), stat.S_IMODE(one.stat().st_mode)) for one in found} == {
        (True, 0o700),
        (False, 0o600),
    }


def test_what_others_could_have_put_into_memory_is_not_looked_at(root, memory):
    store = SharedWeights(root, memory)
    publish(store, 0)
    shared = folder_of(root, memory)
    shared.chmod(0o770)
    planted = shared / "1"
    shutil.copytree(shared / "0", planted)
    assert store.versions() == [0]
    with pytest.raises(BundleError):
        store.read(1)
    publish(store, 1)  # over the disk alone
    assert FolderWeights(root).read(1).manifest.parent == 0


@pytest.mark.parametrize("harm", ["a bit", "a file"])
def test_if_the_copy_in_memory_is_damaged_the_disk_is_read(root, memory, harm, caplog):
    store = SharedWeights(root, memory)
    publish(store, 0)
    path = folder_of(root, memory) / "0" / TENSORS
    if harm == "a bit":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    assert store.read(0, EXPECTED) == FolderWeights(root).read(0)
    assert "snapshot 0 is damaged" in caplog.text and "Reading it from the disk" in caplog.text


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_without_usable_memory_versions_take_the_way_over_the_disk(root, tmp_path, kind, caplog):
    memory = tmp_path / "none"
    if kind == "a file":
        memory.write_text("")
    store = SharedWeights(root, memory)
    store.take_over()
    publish(store, 0)
    publish(store, 1)
    store.mark_in_use("server", [1])
    end = store.watch(lambda: None)
    assert store.read(1).manifest.version == 1
    assert caplog.text.count("they take the way over the disk") == 1
    end()


def test_full_memory_costs_no_version(root, tmp_path, caplog):
    with small_file_system(tmp_path / "small", "64k") as memory:
        store = SharedWeights(root, memory)
        big = {"w": ("U8", tensors()["norm"][1].repeat(20_000).astype("u1"))}
        files = {TENSORS: join_tensors(big, {})}
        store.publish(MANIFEST, files)
        assert "No space left" in caplog.text
        assert store.versions() == [0]
        assert store.read(0).files == files
        assert [one for one in folder_of(root, memory).iterdir() if one.is_dir()] == []
        del store
        gc.collect()


def test_a_full_disk_shows_a_version_to_nobody(tmp_path, memory):
    with small_file_system(tmp_path / "small", "64k") as disk:
        store = SharedWeights(disk / "weights", memory)
        publish(store, 0)
        big = {"w": ("U8", tensors()["norm"][1].repeat(20_000).astype("u1"))}
        manifest = dataclasses.replace(MANIFEST, version=1, parent=0)
        with pytest.raises(OSError, match="No space left"):
            store.publish(manifest, {TENSORS: join_tensors(big, {})})
        assert store.versions() == [0]
        assert store.read(0).manifest.version == 0


def test_what_a_killed_publisher_showed_is_put_on_the_disk_by_the_next(root, memory):
    store = SharedWeights(root, memory)
    store.mark_in_use("server", [])
    publish(store, 0)

    def show_and_die():
        files = {TENSORS: (root / "0" / TENSORS).read_bytes()}
        text = json.loads((root / "0" / "manifest.json").read_bytes()) | {"version": 1, "parent": 0}
        files["manifest.json"] = json.dumps(text).encode()
        (root / "HIGHEST").write_text("1\n")
        store._shared.put(1, files)

    in_child(show_and_die)
    assert FolderWeights(root).versions() == [0]
    assert store.versions() == [0, 1]
    assert store.read(1).manifest.parent == 0
    with pytest.raises(ValueError, match="1 was published before"):
        publish(store, 1)

    next_one = SharedWeights(root, memory)
    next_one.take_over()
    assert FolderWeights(root).read(1) == store.read(1)
    assert publish(next_one, 2).version == 2


def test_what_a_killed_publisher_had_begun_is_never_seen_and_removed(root, memory):
    store = SharedWeights(root, memory)
    publish(store, 0)
    shared = folder_of(root, memory)
    (shared / ".tmp-1").mkdir()
    (shared / ".tmp-1" / TENSORS).write_bytes(b"half")
    assert store.versions() == [0]
    SharedWeights(root, memory).take_over()
    assert not (shared / ".tmp-1").exists()


def test_the_last_process_gives_the_memory_back(root, memory):
    store, other = SharedWeights(root, memory), SharedWeights(root, memory)
    publish(store, 0)
    other.mark_in_use("server", [0])
    shared = folder_of(root, memory)
    del store
    gc.collect()
    assert shared.is_dir()
    in_child(lambda: other._shared._leave())  # a process forked from a user is no user
    assert shared.is_dir()
    other = None
    gc.collect()
    assert not shared.exists()
    assert SharedWeights(root, memory).read(0).manifest.version == 0


def test_memory_of_killed_processes_is_given_back_by_whoever_begins_to_use_some(tmp_path, memory):
    def publish_and_die():
        store = SharedWeights(tmp_path / "a" / "weights", memory)
        publish(store, 0)
        return store

    in_child(publish_and_die)
    shared = folder_of(tmp_path / "a" / "weights", memory)
    assert shared.is_dir()
    other = SharedWeights(tmp_path / "b" / "weights", memory)
    other.take_over()
    publish(other, 0)
    assert not shared.exists()
    assert folder_of(tmp_path / "b" / "weights", memory).is_dir()


def test_a_version_that_is_in_memory_alone_is_not_given_up(root, memory):
    def publish_and_die():
        store = SharedWeights(root, memory)
        publish(store, 0)
        return store

    in_child(publish_and_die)
    shutil.rmtree(root / "0")
    assert remove_abandoned(memory) == []
    assert SharedWeights(root, memory).versions() == [0]
    shutil.rmtree(root)
    assert [one.exists() for one in remove_abandoned(memory)] == [False]


def test_a_new_run_in_the_same_folder_sees_nothing_of_the_old_one(root, memory):
    store = SharedWeights(root, memory)
    publish(store, 0)
    shutil.rmtree(root)
    assert SharedWeights(root, memory).versions() == store.versions() == []
    assert publish(SharedWeights(root, memory), 0).version == 0


def test_a_watcher_hears_of_a_version_before_the_disk_has_it(root, memory):
    store = SharedWeights(root, memory)
    heard = threading.Event()
    end = store.watch(heard.set)
    assert heard.wait(60)  # that it listens
    heard.clear()
    publish(SharedWeights(root, memory), 0)
    assert heard.wait(60)
    end()


def test_traces_are_in_the_log_or_in_the_buffer_that_the_url_names(tmp_path):
    from buffer.embedded_log import EmbeddedLog
    from buffer.memory import MemoryBackend

    plain = open_backend("shm:", tmp_path)
    assert isinstance(plain._traces, EmbeddedLog) and plain.spool_bytes is None
    named = open_backend(f"shm:?traces=memory:{tmp_path}", tmp_path)
    assert isinstance(named._traces, MemoryBackend)
    with pytest.raises(ValueError, match="there may be traces=URL alone"):
        open_backend("shm:?size=7", tmp_path)
    with pytest.raises(ValueError, match="names a place"):
        open_backend("shm:/dev/shm", tmp_path)
    with pytest.raises(ValueError, match="scheme 'nosuch' is unknown"):
        open_backend("shm:?traces=nosuch:", tmp_path)


def sealed(fill):
    return seal({name: (tag, bits) for name, (tag, bits) in tensors(fill).items()})


def publish_sealed(store, version, content):
    manifest = dataclasses.replace(MANIFEST, version=version, parent=version - 1 or None)
    store.publish(manifest, {TENSORS: content})


def folders(root, memory):
    shared = folder_of(root, memory)
    return sorted(one.name for one in shared.iterdir() if one.is_dir() and one.name != ".spare")


def test_what_was_prepared_is_published_without_being_written_again(root, memory):
    store, content = SharedWeights(root, memory), sealed(1)

    store.prepare(content)
    (prepared,) = (folder_of(root, memory)).glob(f".tmp-*/{TENSORS}")
    before = prepared.stat()
    assert store.versions() == []
    publish_sealed(store, 1, content)

    assert folders(root, memory) == ["1"]
    after = (folder_of(root, memory) / "1" / TENSORS).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    for read in (store.read, FolderWeights(root).read):
        assert read(1, EXPECTED).files[TENSORS] == content.joined()


def test_another_version_than_the_prepared_one_is_published_as_it_is(root, memory):
    store, other = SharedWeights(root, memory), sealed(2)

    store.prepare(sealed(1))
    publish_sealed(store, 1, other)
    assert folders(root, memory) == ["1"]
    shutil.rmtree(root / "1")  # so that it is read from memory
    assert store.read(1).files[TENSORS] == other.joined()

    store.prepare(sealed(3))
    shutil.rmtree(next(folder_of(root, memory).glob(".tmp-*")))  # by whoever took over
    publish_sealed(store, 2, other)
    assert store.read(2).files[TENSORS] == other.joined()
    assert folders(root, memory) == ["2"]


def test_what_was_prepared_in_vain_is_dropped(root, memory):
    store = SharedWeights(root, memory)
    store.prepare(sealed(1))
    store.prepare(sealed(2))
    assert len(folders(root, memory)) == 1
    SharedWeights(root, memory).take_over()
    assert folders(root, memory) == []
    publish_sealed(store, 1, sealed(3))
    assert store.read(1).files[TENSORS] == sealed(3).joined()


def test_a_version_takes_over_the_memory_of_the_one_before_the_last(root, memory):
    store, number_of = SharedWeights(root, memory), {}
    for version in range(1, 6):
        content = sealed(version)
        if version != 4:  # one that nobody prepared
            store.prepare(content)
        publish_sealed(store, version, content)
        file = folder_of(root, memory) / str(version) / TENSORS
        number_of[version] = file.stat().st_ino
        assert file.read_bytes() == content.joined()

    assert [number_of[v] == number_of[v - 2] for v in (3, 4, 5)] == [True, True, True]
    assert number_of[5] != number_of[4]


def test_a_shorter_version_leaves_nothing_of_a_longer_one(root, memory):
    store = SharedWeights(root, memory)
    for version, num in ((1, 900), (2, 800), (3, 7)):
        content = seal({"w": ("F32", np.full(num, version, np.float32))})
        store.prepare(content)
        publish_sealed(store, version, content)

    assert (folder_of(root, memory) / "3" / TENSORS).read_bytes() == content.joined()


def test_who_reads_while_the_memory_is_taken_over_takes_the_version_from_the_disk(
    root, memory, monkeypatch
):
    store, reader = SharedWeights(root, memory), SharedWeights(root, memory)
    publish_sealed(store, 1, sealed(1))
    publish_sealed(store, 2, sealed(2))
    read_bundle_into = shared_memory.read_bundle_into

    def overtaken(host, path, expected):
        """Version 2 becomes the spare one, and the next is written over it, while it is read."""
        if path.parent != root:
            store.prepare(sealed(3))
            publish_sealed(store, 3, sealed(3))
            store.prepare(sealed(4))
            (path,) = folder_of(root, memory).glob(".tmp-*")
            (path / "manifest.json").write_bytes((root / "2" / "manifest.json").read_bytes())
            path = path.rename(path.with_name("2"))
        return read_bundle_into(host, path, expected)

    monkeypatch.setattr(shared_memory, "read_bundle_into", overtaken)
    bundle = reader.read_into(HostBuffer(), 2, EXPECTED)

    assert bundle.content.tobytes() == sealed(2).joined()
