"""On disk a visible bundle is whole, and a bundle that is not what was published is refused."""

import dataclasses
import hashlib
import json
import os
import resource

import numpy as np
import pytest

from buffer import bundles
from buffer.bundles import (
    BundleError,
    HostBuffer,
    check_bundle,
    read_bundle,
    read_bundle_into,
    read_manifest,
)
from buffer.folder_weights import FolderWeights
from buffer.tensors import TensorFileError, check_safetensors, join_tensors
from tests.buffer.sample_bundle import EXPECTED, MANIFEST, tensors


@pytest.fixture
def store(tmp_path):
    return FolderWeights(tmp_path)


def publish_version(store, version, parent=None):
    manifest = dataclasses.replace(MANIFEST, version=version, parent=parent)
    return store.publish(manifest, {"drafter.safetensors": join_tensors(tensors(), {})})


@pytest.fixture
def bundle(store, tmp_path):
    """A sound bundle of version 42."""
    publish_version(store, 42, parent=41)
    return tmp_path / "42"


def read_in_place(path, expected=None):
    """Like ``read_bundle``, but with the tensors alone."""
    found = read_bundle_into(HostBuffer(), path, expected)
    return bundles.Bundle(found.manifest, {bundles.TENSORS: found.content.tobytes()})


each_reader = pytest.mark.parametrize("read", [read_bundle, read_in_place])


def rewrite_manifest(bundle, **fields):
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_newest_sound_version_is_neither_damaged_nor_rolled_back(store, tmp_path):
    for version in range(4):
        publish_version(store, version, parent=version - 1 if version else None)
    (tmp_path / "3" / "drafter.safetensors").unlink()
    store.write_denied({2})

    bundle, passed_over = store.newest_sound()

    assert bundle.manifest.version == 1
    assert "drafter.safetensors" in passed_over[0]
    assert "version 2 was rolled back" in passed_over[1]
    store.write_denied({0, 1, 2})
    with pytest.raises(ValueError, match=r"no version in .* can be used"):
        store.newest_sound()


def test_a_damaged_list_of_rolled_back_versions_is_named(store, tmp_path):
    (tmp_path / "DENIED.json").write_text("{")
    with pytest.raises(ValueError, match=r"DENIED\.json must be a list"):
        store.read_denied()


def test_a_version_is_never_used_twice_even_if_its_bundle_is_gone(store, tmp_path):
    for version in range(4):
        publish_version(store, version)
    assert store.prune(keep=1) == [1, 2]
    for path in (tmp_path / "3").iterdir():
        path.unlink()
    (tmp_path / "3").rmdir()

    assert store.next_version() == 4
    for version in range(4):
        with pytest.raises(ValueError, match="never reused"):
            publish_version(store, version)


def test_versions_are_not_reused_when_the_memory_of_the_highest_is_lost_or_damaged(store, tmp_path):
    publish_version(store, 5)
    (tmp_path / "HIGHEST").unlink()
    assert store.next_version() == 6
    (tmp_path / "HIGHEST").write_text("what?")
    with pytest.raises(ValueError, match="must hold the highest version ever published"):
        publish_version(store, 6)


def test_a_full_disk_leaves_no_trace_of_a_bundle(store, tmp_path, start_python):
    code = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from buffer.records import Manifest; from buffer.tensors import join_tensors\n"
        "from buffer.folder_weights import FolderWeights\n"
        "store = FolderWeights(Path(sys.argv[1]))\n"
        "blob = join_tensors({'w': ('F32', np.zeros(100_000, np.float32))}, {})\n"
        "try: store.publish(Manifest(7, None, 'e', {}, 't', {}), {'drafter.safetensors': blob})\n"
        "except OSError as error:\n"
        "    print(error.strerror, store.versions(), list(store.root.glob('.tmp*')))\n"
    )
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # noqa: E731
    output, _ = start_python(code, tmp_path, preexec_fn=limit).communicate(timeout=30)
    assert output == "File too large [] []\n"


def test_what_a_killed_publisher_left_is_neither_seen_nor_kept(store, tmp_path):
    publish_version(store, 1)
    (tmp_path / ".tmp-2").mkdir()
    (tmp_path / ".tmp-2" / "drafter.safetensors").write_bytes(b"half")

    assert store.versions() == [1]
    publish_version(store, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "1", "2", "HIGHEST"]


@each_reader
def test_a_damaged_file_is_refused_with_what_to_do(bundle, read):
    path = bundle / "drafter.safetensors"
    content = bytearray(path.read_bytes())
    expected = read_manifest(bundle).files["drafter.safetensors"].sha256
    content[-1] ^= 1
    path.write_bytes(content)

    with pytest.raises(BundleError) as caught:
        read(bundle)
    found = hashlib.sha256(content).hexdigest()
    assert str(caught.value) == (
        f"snapshot 42 is damaged: {path} has sha256 {found[:12]}, the trainer wrote "
        f"{expected[:12]}; not swapping. Restore the file, or wait: the next published version "
        f"supersedes it."
    )


@each_reader
def test_a_file_cut_anywhere_is_refused(bundle, read):
    path = bundle / "drafter.safetensors"
    size = path.stat().st_size
    for length in reversed(range(size)):
        os.truncate(path, length)
        with pytest.raises(BundleError, match=f"has {length} bytes, the trainer wrote {size}"):
            read(bundle)


@each_reader
def test_every_flipped_byte_of_a_bundle_is_noticed_or_leaves_its_meaning_alone(bundle, read):
    sound = read(bundle)
    for path in sorted(bundle.iterdir()):
        content = path.read_bytes()
        for index in range(len(content)):
            flipped = bytearray(content)
            flipped[index] ^= 0x04
            path.write_bytes(flipped)
            try:
                assert read(bundle).files == sound.files
                assert path.name == "manifest.json"  # has no digest of its own
            except BundleError:
                pass
        path.write_bytes(content)


def damage_extra_file(bundle):
    (bundle / "extra.pkl").write_bytes(b"x")


def damage_missing_file(bundle):
    (bundle / "drafter.safetensors").unlink()


def damage_missing_manifest(bundle):
    (bundle / "manifest.json").unlink()


def damage_link(bundle):
    (bundle / "drafter.safetensors").rename(bundle.parent / "elsewhere")
    (bundle / "drafter.safetensors").symlink_to(bundle.parent / "elsewhere")


def damage_folder(bundle):
    (bundle / "drafter.safetensors").unlink()
    (bundle / "drafter.safetensors").mkdir()


def damage_pipe(bundle):
    (bundle / "drafter.safetensors").unlink()
    os.mkfifo(bundle / "drafter.safetensors")


def damage_longer(bundle):
    with (bundle / "drafter.safetensors").open("ab") as file:
        file.write(b"x")


def damage_huge_manifest(bundle):
    (bundle / "manifest.json").write_bytes(b" " * (1 << 20) + b"{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_extra_file, r"holds \['extra.pkl'\], which the manifest lacks"),
        (damage_missing_file, "drafter.safetensors cannot be read: No such file"),
        (damage_missing_manifest, "manifest.json cannot be read: No such file"),
        (damage_link, "drafter.safetensors is a link"),
        (damage_folder, "drafter.safetensors is not a plain file"),
        (damage_pipe, "drafter.safetensors is not a plain file"),
        (damage_longer, "bytes, at most"),
        (damage_huge_manifest, "at most 1048576 were expected"),
    ],
)
@each_reader
def test_a_folder_that_is_not_what_was_published_is_refused(bundle, damage, message, read):
    damage(bundle)
    with pytest.raises(BundleError, match=message) as caught:
        read(bundle)
    assert str(caught.value).startswith("snapshot 42 is damaged: ")
    assert "not swapping" in str(caught.value)


@each_reader
def test_a_file_that_does_not_belong_there_is_to_be_removed(bundle, read):
    damage_extra_file(bundle)
    with pytest.raises(BundleError, match=r"not swapping\. Remove it, or wait: the next") as caught:
        read(bundle)
    assert "Restore" not in str(caught.value)
    (bundle / "another").touch()
    with pytest.raises(BundleError, match=r"not swapping\. Remove them, or wait"):
        read(bundle)


@each_reader
def test_files_of_file_managers_and_network_file_systems_are_passed_over(bundle, read):
    (bundle / ".DS_Store").write_bytes(b"x")
    os.mkfifo(bundle / ".nfs0001")  # whoever opened it would wait for ever
    (bundle / ".hidden").symlink_to("/nowhere")
    read(bundle)


def test_a_link_to_a_bundle_is_not_a_bundle(bundle):
    (bundle.parent / "43").symlink_to(bundle)
    with pytest.raises(BundleError, match="43 is not a folder, or a link to one"):
        check_bundle(bundle.parent / "43")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema": "other"}, "schema is 'other', expected 'slipstream.bundle'"),
        ({"schema_version": 3}, "schema_version is 3, this reader knows 1 to 2"),
        ({"schema_version": True}, "schema_version is True"),
        ({"version": 43}, "it is version 43, but is in folder '42'"),
        ({"version": "42"}, "version must be an integer"),
        ({"parent": 42}, "parent must be a version below 42"),
        ({"parent": 1.5}, "parent must be a version below 42"),
        ({"kind": None}, "kind must be a text"),
        ({"gate": {"tokens_per_step": 1e999}}, "manifest.json is unreadable: not JSON: Infinity"),
        ({"gate": [1]}, "gate must be an object of finite numbers"),
        ({"created_unix_ms": "now"}, "created_unix_ms must be an integer"),
        ({"files": {}}, "files must name drafter.safetensors"),
        ({"files": {"../../x.json": {"sha256": "0" * 64, "num_bytes": 1}}}, "files must name"),
        ({"files": {"drafter.safetensors": {"sha256": "zz", "num_bytes": 1}}}, "64 hex digits"),
        (
            {"files": {"drafter.safetensors": {"sha256": "0" * 64, "num_bytes": -1}}},
            "num_bytes of drafter.safetensors must be an integer in 0..",
        ),
        (
            {"files": {"drafter.safetensors": {"sha256": "0" * 64, "num_bytes": 17 << 30}}},
            "must be an integer in 0..17179869184, got 18253611008",
        ),
        *(
            (
                {
                    "files": {
                        "drafter.safetensors": {
                            "sha256": "0" * 64,
                            "num_bytes": 1,
                            "piece_bytes": piece_bytes,
                        }
                    }
                },
                "piece_bytes of drafter.safetensors must be an integer in 1048576..1073741824",
            )
            for piece_bytes in (0, -1, 1, True, 4e6, "8388608", 1 << 40)
        ),
        ({"files": {"drafter.safetensors": {}}}, "manifest.json is unreadable: 'sha256'"),
        ({"files": 7}, "manifest.json is unreadable"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(bundle, fields, message):
    rewrite_manifest(bundle, **fields)
    with pytest.raises(BundleError, match=message):
        check_bundle(bundle)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "unreadable"),
        ("[" * 100_000, "nested too deep"),
        ('{"schema": "a", "schema": "b"}', "'schema' appears twice"),
    ],
)
def test_a_manifest_that_is_no_manifest_is_refused(bundle, text, message):
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=message):
        check_bundle(bundle)


def test_a_number_too_large_for_a_float_is_no_finite_figure(bundle):
    path = bundle / "manifest.json"
    path.write_text(path.read_text().replace('"tokens_per_step": 2.5', '"tokens_per_step": 1e999'))
    with pytest.raises(BundleError, match="gate must be an object of finite numbers"):
        check_bundle(bundle)


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
def test_tensors_of_another_shape_are_refused(bundle, expected, message, read):
    with pytest.raises(BundleError, match=message):
        read(bundle, expected)
    with pytest.raises(TensorFileError, match=message):
        check_safetensors(bundle / "drafter.safetensors", expected)


@each_reader
@pytest.mark.parametrize("name", ["drafter.safetensors", "heads.safetensors"])
def test_numbers_are_checked_also_where_the_digest_is_right(store, tmp_path, read, name):
    sound = join_tensors(tensors(), {})
    store.publish(MANIFEST, {"drafter.safetensors": sound, "heads.safetensors": sound})
    put_in_place(tmp_path / "0", name, join_tensors(tensors(fill=np.nan), {}))

    with pytest.raises(BundleError, match=rf"{name}: tensors \['norm'\] hold NaN or infinity"):
        read(tmp_path / "0")


def put_in_place(bundle, name, content):
    """Replace a file, and update its entry in the manifest."""
    (bundle / name).write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    rewrite_manifest(bundle, files={**files, name: entry})


@each_reader
def test_a_size_that_no_memory_holds_is_refused_before_there_is_room_for_it(bundle, read):
    size = (bundle / "drafter.safetensors").stat().st_size
    entry = {"sha256": "0" * 64, "num_bytes": 15 << 30}
    rewrite_manifest(bundle, files={"drafter.safetensors": entry})

    with pytest.raises(BundleError, match=f"has {size} bytes, the trainer wrote {15 << 30}"):
        read(bundle)


class Meanwhile(HostBuffer):
    """Runs a function after a file was opened and before it is read."""

    def __init__(self, happens):
        super().__init__()
        self.happens = happens

    def take(self, num_bytes):
        self.happens()
        return super().take(num_bytes)


@pytest.mark.parametrize("by", [-1, 1])
def test_a_file_that_changes_its_size_while_it_is_read_is_refused(bundle, by):
    path = bundle / "drafter.safetensors"
    size = path.stat().st_size

    with pytest.raises(BundleError, match=f"has {size + by} bytes, the trainer wrote {size}"):
        read_bundle_into(Meanwhile(lambda: os.truncate(path, size + by)), bundle)


@pytest.mark.parametrize("by", [-1, 1])
def test_a_file_that_changes_its_size_after_it_was_opened_is_refused(bundle, monkeypatch, by):
    path = bundle / "drafter.safetensors"
    size = path.stat().st_size
    opened = []

    def is_plain(mode):
        opened.append(mode)
        if len(opened) == 2:  # the manifest is the first
            os.truncate(path, size + by)
        return True

    monkeypatch.setattr(bundles.stat, "S_ISREG", is_plain)
    with pytest.raises(BundleError, match=f"has {size + by} bytes, the trainer wrote {size}"):
        read_bundle(bundle)


def test_a_tensor_file_is_judged_by_its_header_alone(tmp_path):
    """The file is sparse, 1 GiB: reading it would take seconds and memory."""
    path = tmp_path / "big.safetensors"
    header = b'{"w":{"dtype":"U8","shape":[1073741824],"data_offsets":[0,1073741824]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + (1 << 30))
    assert check_safetensors(path)["w"].shape == (1 << 30,)
    os.truncate(path, 8 + len(header) + (1 << 30) - 1)
    with pytest.raises(TensorFileError, match="the tensors end at byte"):
        check_safetensors(path)


def test_a_header_over_1_mib_is_not_read(tmp_path):
    header = b"{}" + b" " * (1 << 20)
    with pytest.raises(TensorFileError, match="at most 1048576 are read"):
        check_safetensors(len(header).to_bytes(8, "little") + header)


def test_a_mark_that_nobody_renews_protects_for_a_day_only(store, tmp_path):
    store.mark_in_use("dead", [1])
    now_s = (tmp_path / "IN_USE-dead.json").stat().st_mtime
    assert store.marked_in_use(now_s + 86_000) == {1}
    assert store.marked_in_use(now_s + 87_000) == set()


def test_an_unreadable_mark_stops_all_pruning(store, tmp_path):
    for version in range(5):
        publish_version(store, version)
    (tmp_path / "IN_USE-server-1.json").write_text("{")
    assert store.prune(keep=1) == []
    assert store.versions() == [0, 1, 2, 3, 4]


def test_a_damaged_bundle_in_use_stays_and_stops_nothing(store, tmp_path):
    for version in range(4):
        publish_version(store, version, parent=version - 1 if version else None)
    (tmp_path / "1" / "manifest.json").write_text("{")
    assert store.prune(keep=1, in_use=[1, 99]) == [2]
