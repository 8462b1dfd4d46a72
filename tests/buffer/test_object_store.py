"""Versions in an object store: each change of what there is builds on the one before it."""

import dataclasses
import json
import secrets
import threading

import pytest

from buffer.backends import open_backend
from buffer.bundles import BundleError, HostBuffer
from buffer.interface import ServiceAwayError
from buffer.manifest import TENSORS
from buffer.object_state import KEEP, StateLog
from buffer.object_store import ObjectWeights
from buffer.objects import Objects
from buffer.tensors import join_tensors
from tests.buffer.sample_bundle import MANIFEST, tensors

FILES = {TENSORS: join_tensors(tensors(), {})}


@pytest.fixture(params=["memory", "file"])
def objects(request, tmp_path):
    place = secrets.token_hex(8) if request.param == "memory" else f"{tmp_path}/objects"
    return Objects(f"{request.param}://{place}")


def publish(store, version, **fields):
    return store.publish(dataclasses.replace(MANIFEST, version=version, **fields), FILES)


def test_of_many_that_create_a_name_one_succeeds(objects):
    assert objects.refuses_a_second()
    for number in range(20):
        outcomes, together = [], threading.Barrier(4)

        def create(number=number, outcomes=outcomes, together=together):
            together.wait()
            outcomes.append(objects.create(f"state/{number}", str(threading.get_ident()).encode()))

        threads = [threading.Thread(target=create) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == [False, False, False, True]
    assert sorted(map(int, objects.names("state"))) == list(range(20))


def test_an_object_is_read_in_pieces_as_far_as_it_is_there(objects, monkeypatch):
    monkeypatch.setattr("buffer.objects.PIECE_BYTES", 1000)
    content = secrets.token_bytes(9500)
    objects.write("content/a", content)
    assert b"".join(objects.pieces("content/a", 9500)) == content
    assert b"".join(objects.pieces("content/a", 8000)) == content[:8000]
    assert next(objects.pieces("content/a", 9500)) == content[:1000]
    assert objects.size("content/a") == 9500
    assert objects.size("content/b") is objects.read("content/b") is None
    assert b"".join(objects.pieces("content/b", 10)) == b""


def test_no_change_is_lost_however_many_make_them(objects):
    def mark(number):
        for round_ in range(5):
            ObjectWeights(objects).mark_in_use(f"server-{number}-{round_}", [number])

    threads = [threading.Thread(target=mark, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = StateLog(objects).newest()
    assert state.number == len(state.in_use) == 20


def test_a_change_by_somebody_who_slept_is_made_on_what_is_in_force_now(objects):
    """He creates a number that was used and removed since: that must not count."""
    log, sleeper = StateLog(objects), StateLog(objects)
    seen = []

    def deny(state):
        if not seen:  # between his look and his change, others make three and the first is removed
            for epoch in range(1, 4):
                log.change(lambda before, epoch=epoch: dataclasses.replace(before, epoch=epoch))
            objects.remove("state/00000000000000000001")
        seen.append(state.number)
        return dataclasses.replace(state, denied=(7,))

    after = sleeper.change(deny)
    assert seen == [0, 3]
    assert (after.epoch, after.denied, after.number) == (3, (7,), 4)
    assert StateLog(objects).newest() == log.newest() == after


def test_old_states_are_removed_and_the_newest_stay(objects, monkeypatch):
    monkeypatch.setattr("buffer.object_state.KEEP", 8)
    assert KEEP > 8
    log = StateLog(objects)
    for epoch in range(64):
        log.change(lambda state, epoch=epoch: dataclasses.replace(state, epoch=epoch))
    numbers = sorted(map(int, objects.names("state")))
    assert numbers == list(range(57, 65))
    assert StateLog(objects).newest().epoch == 63


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b'{"schema": "slipstream.weights", "schema_version": 2}', b"x" * 9_000_000],
)
def test_a_damaged_state_is_named_and_stops_nobody_but_publishers(objects, text):
    store = ObjectWeights(objects)
    publish(store, 0)
    objects.write("state/00000000000000000002", text)
    for ask in (store.versions, store.next_version, store.take_over, lambda: publish(store, 1)):
        with pytest.raises(ServiceAwayError, match=r"state/0+2 is damaged"):
            ask()
    objects.remove("state/00000000000000000002")
    assert store.versions() == [0]


def test_a_token_in_a_state_leads_nowhere_else(objects):
    store = ObjectWeights(objects)
    publish(store, 0)
    body = json.loads(objects.read("state/00000000000000000001"))
    body["number"], body["published"]["0"]["token"] = 2, "../../etc"
    objects.write("state/00000000000000000002", json.dumps(body).encode())
    with pytest.raises(ServiceAwayError, match="is no token"):
        ObjectWeights(objects).read(0)


@pytest.mark.parametrize("name", [TENSORS, "manifest.json"])
@pytest.mark.parametrize("harm", ["changed", "longer", "gone"])
def test_a_file_that_is_not_what_was_written_is_refused(objects, name, harm):
    store = ObjectWeights(objects)
    publish(store, 0)
    [token] = objects.names("content")
    path = f"content/{token}/{name}"
    content = bytearray(objects.read(path))
    if harm == "gone":
        objects.remove(path)
    else:
        content[len(content) // 2] ^= harm == "changed"
        objects.write(path, bytes(content) + b" " * (harm == "longer"))
    for read in (store.read, lambda version: store.read_into(HostBuffer(), version)):
        with pytest.raises(BundleError, match=f"snapshot 0 is damaged: .*{name}"):
            read(0)


def test_uploads_of_killed_publishers_are_removed_after_an_hour(objects):
    store = ObjectWeights(objects)
    objects.write("content/000000000001-abc/drafter.safetensors", b"of long ago")
    objects.write("content/999999999999-abc/drafter.safetensors", b"of now")
    publish(store, 0)
    [token] = [one for one in objects.names("content") if not one.endswith("-abc")]
    assert sorted(objects.names("content")) == sorted([token, "999999999999-abc"])
    assert store.prune(1) == []
    publish(store, 1)
    publish(store, 2)
    assert store.prune(1) == [1]
    assert len(objects.names("content")) == 3


def test_a_refused_version_leaves_nothing(objects):
    store = ObjectWeights(objects)
    publish(store, 3)
    for version in (3, 1):
        with pytest.raises(ValueError, match="never reused"):
            publish(store, version)
    assert len(objects.names("content")) == 1


def test_a_store_that_cannot_be_used_is_away(tmp_path):
    (tmp_path / "objects").write_text("no folder")
    store = ObjectWeights(Objects(f"file://{tmp_path}/objects"))
    with pytest.raises(ServiceAwayError, match=r"file://.*objects cannot be used"):
        publish(store, 0)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("fsspec:", "must name a place in a store, as in 'fsspec:gs://bucket/run'"),
        ("fsspec:/some/folder", "must name a place"),
        ("s3:bucket", "must name a place in a store, as in 's3://bucket/run'"),
        ("s3://", "must name a place"),
        ("fsspec:nosuch://bucket/run", "nosuch://, which fsspec does not know"),
        ("fsspec:file:///x?endpoint=1", "there may be traces=URL alone"),
        ("fsspec:sftp://user:secret@host/x", "holds a password"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_without_its_secrets(tmp_path, url, problem):
    with pytest.raises(ValueError, match=problem) as error:
        open_backend(url, tmp_path)
    assert "secret" not in str(error.value)
