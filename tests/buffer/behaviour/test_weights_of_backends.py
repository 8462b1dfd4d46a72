"""In every backend a visible version is whole and as published, and its number is never reused."""

import dataclasses
import threading
import time
import tracemalloc

import numpy as np
import pytest

from buffer.bundles import BundleError, HostBuffer
from buffer.interface import ServiceAwayError
from buffer.tensors import join_tensors
from buffer.weights_store import SupersededError
from tests.buffer.sample_bundle import EXPECTED, MANIFEST, tensors


def publish(store, version, parent=None, files=None, epoch=None):
    manifest = dataclasses.replace(MANIFEST, version=version, parent=parent)
    content = {"drafter.safetensors": join_tensors(tensors(), {})} if files is None else files
    return store.publish(manifest, content, epoch)


def read_in_place(store, version, expected=None):
    """``read_into``, returning the content of ``drafter.safetensors``."""
    return store.read_into(HostBuffer(), version, expected).content.tobytes()


def read_whole(store, version, expected=None):
    return store.read(version, expected).files["drafter.safetensors"]


each_reader = pytest.mark.parametrize("read", [read_whole, read_in_place])


@pytest.fixture
def store(open_buffer):
    return open_buffer().open_weights()


def test_a_published_version_is_read_as_it_was_written(store, open_buffer):
    content = {
        "drafter.safetensors": join_tensors(tensors(), {}),
        "policy.json": b'{"k": 4}',
    }
    published = publish(store, 0, files=content)

    other = open_buffer().open_weights()
    bundle = other.read(0, EXPECTED)
    assert bundle.manifest == published == other.read_manifest(0)
    assert dataclasses.replace(published, files={}) == MANIFEST
    assert bundle.files == content
    assert other.versions() == [0]


def test_an_empty_store_has_no_versions_and_begins_with_0(store):
    assert store.versions() == []
    assert store.next_version() == 0
    assert store.read_denied() == set()
    with pytest.raises(ValueError, match=r"no version in .* can be used: it is empty"):
        store.newest_sound()


def test_a_file_that_the_weights_in_use_cannot_need_is_refused_before_memory_is_taken(store):
    publish(store, 0)
    size = len(store.read(0).files["drafter.safetensors"])
    assert store.read_into(HostBuffer(size), 0).content.nbytes == size

    class NoMemory(HostBuffer):
        def take(self, num_bytes):
            raise AssertionError("memory was taken")

    with pytest.raises(BundleError, match=f"has {size} bytes, at most {size - 1} make sense"):
        store.read_into(NoMemory(size - 1), 0)


@each_reader
def test_a_version_that_does_not_exist_is_refused(store, read):
    publish(store, 0)
    with pytest.raises(BundleError, match="snapshot 7 is damaged: "):
        read(store, 7)
    with pytest.raises(BundleError, match="snapshot 7 is damaged: "):
        store.read_manifest(7)


def test_the_newest_sound_version_was_not_rolled_back(store, open_buffer):
    for version in range(4):
        publish(store, version, parent=version - 1 if version else None)
    open_buffer().open_weights().write_denied({2, 3})

    bundle, passed_over = store.newest_sound()

    assert store.read_denied() == {2, 3}
    assert bundle.manifest.version == 1
    assert passed_over == ["version 3 was rolled back.", "version 2 was rolled back."]
    store.write_denied({0, 1, 2, 3})
    with pytest.raises(ValueError, match=r"no version in .* can be used: version 3 was rolled"):
        store.newest_sound()


def test_a_version_is_never_used_twice(store):
    publish(store, 3)
    with pytest.raises(ValueError, match="3 was published before, and versions are never reused"):
        publish(store, 3)
    with pytest.raises(ValueError, match="Publish as version 4 or higher"):
        publish(store, 2)
    assert store.versions() == [3]


def test_a_version_is_never_used_twice_even_after_it_was_pruned(store, open_buffer):
    for version in range(4):
        publish(store, version)
    assert store.prune(keep=1) == [1, 2]

    again = open_buffer().open_weights()
    assert again.next_version() == 4
    for version in range(4):
        with pytest.raises(ValueError, match="never reused"):
            publish(again, version)


def test_if_two_publish_the_same_version_one_wins_and_the_others_are_told(open_buffer):
    outcomes = []

    def race():
        try:
            outcomes.append(publish(open_buffer().open_weights(), 1).version)
        except ValueError as error:
            outcomes.append(str(error)[:9])

    threads = [threading.Thread(target=race) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes, key=str) == [1] + ["version 1"] * 5
    assert open_buffer().open_weights().read(1).manifest.version == 1


@pytest.mark.parametrize(
    ("fields", "content", "message"),
    [
        ({"version": -1}, tensors(), "version must be an integer >= 0"),
        ({"parent": 0}, tensors(), "parent must be a version below 0"),
        ({"gate": {"x": float("nan")}}, tensors(), "JSON compliant"),
        ({}, tensors(fill=np.nan), r"\['norm'\] hold NaN or infinity"),
        ({}, tensors(fill=-np.inf), r"\['norm'\] hold NaN or infinity"),
        ({}, None, "files must name drafter.safetensors"),
        ({}, b"short", "5 bytes are too few"),
    ],
)
def test_what_a_reader_would_refuse_is_not_published(store, fields, content, message):
    files = {"other.json": b"{}"}
    if content is not None:
        blob = content if isinstance(content, bytes) else join_tensors(content, {})
        files["drafter.safetensors"] = blob
    with pytest.raises(ValueError, match=message):
        store.publish(dataclasses.replace(MANIFEST, **fields), files)
    assert store.versions() == []
    assert store.next_version() == 0


@pytest.mark.parametrize(
    "name", ["../evil.json", "model.bin", ".hidden.json", "manifest.json", "a/b.json"]
)
def test_a_file_name_that_leads_elsewhere_is_not_published(store, name):
    files = {"drafter.safetensors": join_tensors(tensors(), {}), name: b"{}"}
    with pytest.raises(ValueError, match="is not a plain name"):
        publish(store, 0, files=files)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({**EXPECTED, "lm_head": ("F32", (1,))}, r"missing \['lm_head'\]"),
        ({"norm": EXPECTED["norm"]}, r"not expected \['fc.weight'\]"),
        ({**EXPECTED, "norm": ("F32", (5,))}, r"'norm' is F32 \[4\], expected F32 \[5\]"),
        ({**EXPECTED, "norm": ("BF16", (4,))}, r"'norm' is F32 \[4\], expected BF16 \[4\]"),
    ],
)
@each_reader
def test_tensors_of_another_shape_are_refused(store, expected, message, read):
    publish(store, 42)
    with pytest.raises(BundleError, match=message):
        read(store, 42, expected)


def test_the_tensors_are_what_stays_in_the_host_buffer(store):
    blob = join_tensors(tensors(), {})
    others = {"a.json": b"{}" + b" " * 9000, "z.safetensors": join_tensors(tensors(2.0), {})}
    published = publish(store, 0, files={**others, "drafter.safetensors": blob})

    found = store.read_into(HostBuffer(), 0)

    assert found.manifest == published
    assert found.content.tobytes() == blob
    norm = found.tensors["norm"]
    assert found.content[norm.start : norm.end].tobytes() == np.ones(4, np.float32).tobytes()


def test_a_second_version_is_read_into_the_memory_of_the_first(store):
    many = {"w": ("F32", np.ones(10_000_000, np.float32))}
    for version in range(2):
        blob = join_tensors(many, {"told": "x" * 10_000 * version})  # the second header is longer
        publish(store, version, files={"drafter.safetensors": blob})
    host = HostBuffer()
    first = store.read_into(host, 0).content

    tracemalloc.start()
    second = store.read_into(host, 1).content
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert np.shares_memory(first, second)
    assert most < len(second) / 4, "more than checking one chunk needs"


def test_the_change_mark_of_an_unchanged_version_stays(store, open_buffer):
    publish(store, 0)
    mark = store.change_mark(0)
    publish(store, 1)
    assert open_buffer().open_weights().change_mark(0) == mark


def test_pruning_keeps_the_newest_those_in_use_and_their_parents(store, open_buffer):
    for version in range(10):
        publish(store, version, parent=max(0, version - 2) if version else None)
    server = open_buffer().open_weights()
    server.mark_in_use("server-1", [3])
    server.mark_in_use("server-1", [4])  # replaces the first

    assert store.prune(keep=2, in_use={7}) == [1, 3, 6]
    assert store.versions() == [0, 2, 4, 5, 7, 8, 9]
    server.unmark_in_use("server-1")
    server.unmark_in_use("server-1")
    assert store.prune(keep=2) == [2, 4, 5, 7]
    assert [store.read(version).manifest.version for version in store.versions()] == [0, 8, 9]
    assert store.prune(keep=2) == []


def test_a_version_in_use_that_is_gone_stops_no_pruning(store):
    for version in range(3):
        publish(store, version)
    assert store.prune(keep=1, in_use=[99]) == [1]


def test_pruning_everything_is_refused(store):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        store.prune(keep=0)


def test_a_producer_name_that_is_no_plain_name_is_refused(store):
    with pytest.raises(ValueError, match="producer must match"):
        store.mark_in_use("../x", [1])


def test_of_two_trainers_the_one_that_took_over_last_publishes(store, open_buffer):
    first = store.take_over()
    publish(store, 0, epoch=first)
    other = open_buffer().open_weights()
    second = other.take_over()
    assert second > first

    with pytest.raises(SupersededError, match="another trainer took over"):
        publish(store, 1, epoch=first)
    assert other.versions() == [0]
    publish(other, 1, epoch=second)
    publish(store, 2)  # whoever has taken over: a server that publishes version 0
    assert store.versions() == [0, 1, 2]


def test_of_many_trainers_at_once_each_version_is_of_one_and_none_is_lost(open_buffer):
    published = []

    def train():
        store = open_buffer().open_weights()
        for _ in range(5):
            version = store.next_version()
            try:
                publish(store, version)
            except ValueError:
                continue  # somebody else was faster
            published.append(version)

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = open_buffer().open_weights()
    assert sorted(published) == store.versions() == list(range(len(published)))
    assert store.next_version() == len(published)
    assert [store.read(version).manifest.version for version in published] == published


def test_every_trainer_that_takes_over_gets_an_epoch_of_its_own(open_buffer):
    epochs = []

    def take_over():
        epochs.append(open_buffer().open_weights().take_over())

    threads = [threading.Thread(target=take_over) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(epochs) == list(range(1, 9))


@each_reader
def test_a_damaged_version_is_refused_and_named_and_the_one_before_is_used(place, read):
    if place.damage is None:
        pytest.skip("nobody can damage this store from outside")
    store = place.open().open_weights()
    publish(store, 0)
    place.damage(0)
    with pytest.raises(BundleError, match=r"snapshot 0 is damaged: .*drafter\.safetensors"):
        read(store, 0)
    publish(store, 1, parent=0)
    bundle, passed_over = store.newest_sound()
    assert (bundle.manifest.version, passed_over) == (1, [])


def test_a_watcher_is_told_of_a_new_version(place):
    heard = threading.Event()
    end = place.open().open_weights().watch(heard.set)
    try:
        if not place.notifies:
            publish(place.open().open_weights(), 0)
            return
        heard.wait(0.5)  # of its own beginning, perhaps
        heard.clear()
        publish(place.open().open_weights(), 0)
        assert heard.wait(60)
    finally:
        end()


PUBLISH_FOREVER = """
import sys
from pathlib import Path
import numpy as np
from buffer.backends import open_backend
from buffer.records import Manifest
from buffer.tensors import join_tensors

store = open_backend(sys.argv[1], Path(sys.argv[2])).open_weights()
while True:
    version = store.next_version()
    tensors = {"w": ("F32", np.full(700_000, version, np.float32))}
    manifest = Manifest(version, version - 1 if version else None, "eagle3", {}, "target", {})
    store.publish(manifest, {"drafter.safetensors": join_tensors(tensors, {})})
    print(version, flush=True)
"""


def test_a_killed_publisher_leaves_whole_versions_only(other_process, fork_python):
    published = []
    for life in range(2):
        process, output = fork_python(PUBLISH_FOREVER, other_process.url, other_process.run_dir)
        deadline = time.monotonic() + 60
        while output().count("\n") < 2 + life:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.wait(60)
        published += map(int, output().split())
        store = other_process.open().open_weights()
        assert set(published) <= set(store.versions())
        for version in store.versions():
            assert store.read(version).manifest.version == version
    assert len(published) == len(set(published))
    assert store.next_version() > max(store.versions())


def test_a_killed_server_loses_no_version(place):
    if place.server is None:
        pytest.skip("there is no server, or it is somebody else's")
    store = place.open().open_weights()
    store.take_over()
    publish(store, 0)
    store.write_denied({0})
    place.server.kill()
    with pytest.raises(ServiceAwayError):
        publish(store, 1)
    with pytest.raises(ServiceAwayError):
        store.versions()
    place.server.start()
    assert store.versions() == [0]
    assert store.read_denied() == {0}
    assert store.take_over() == 2
    publish(store, 1)
    assert store.read(1).manifest.version == 1


def test_drafters_of_one_run_have_version_lines_of_their_own(store, open_buffer):
    second = open_buffer().open_weights("second")
    publish(store, 0)
    publish(store, 1, parent=0)
    publish(second, 0)
    second.write_denied({0})

    again = open_buffer().open_weights("second")
    assert (store.versions(), again.versions()) == ([0, 1], [0])
    assert (store.read_denied(), again.read_denied()) == (set(), {0})
    assert (store.next_version(), again.next_version()) == (2, 1)
    assert store.location != again.location
    assert store.take_over() == again.take_over() == 1
