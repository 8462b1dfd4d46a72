"""Files in a log's folder that no log makes: they end no reader and no writer, hide no record, cost
neither memory nor time, and are named."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from buffer.bundles import BundleError
from buffer.cli import app
from buffer.committed import read_committed
from buffer.disk_spool import DiskSpool
from buffer.embedded_log import EmbeddedLog
from buffer.folder_weights import FolderWeights
from buffer.interface import TraceLimits
from buffer.layout import Tombstone, read_tombstone, writer_names
from buffer.log_deletion import read_deletions
from buffer.segment_member import SegmentMember
from buffer.segment_reader import SegmentReader
from buffer.segment_stats import log_stats
from buffer.segment_writer import SegmentWriter
from buffer.small_json import SmallJsonError, parse_small_json, read_small_json
from serving.http.server_file import living_owner
from trainer.cli import app as trainer_app

LIMITS = TraceLimits(segment_bytes=4096, max_bytes=1 << 30, ttl_s=3600.0, sync_interval_s=0.0)
HUGE = 30 << 30
pytestmark = pytest.mark.timeout(60)


def write(root: Path, payloads: list[bytes], limits: TraceLimits = LIMITS) -> Path:
    """The folder of a writer that has ended."""
    with SegmentWriter(root, limits) as writer:
        for payload in payloads:
            writer.append(payload)
        return root / writer.name


def read_all(reader: SegmentReader | SegmentMember) -> list[bytes]:
    found: list[bytes] = []
    while records := reader.read(64):
        found += [bytes(record.payload) for record in records]
    return found


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(HUGE)


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def nested(path: Path) -> None:
    path.write_bytes(b"[" * 500_000)


def full_folder(path: Path) -> None:
    path.mkdir()
    (path / "something").write_text("")


def as_position(**values: object) -> Callable[[Path], object]:
    text = json.dumps({"segment": 0, "offset": 0, "number": 0, "lost": 0, "deleted": 0} | values)
    return lambda path: path.write_text(text)


THINGS: dict[str, Callable[[Path], object]] = {
    "folder": full_folder,
    "pipe": os.mkfifo,
    "link": link_to_itself,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "30 GB": sparse,
    "nested": nested,
    "no JSON": lambda path: path.write_bytes(b"\xff\x00{"),
    "a list": lambda path: path.write_text("[1]"),
    "null": lambda path: path.write_text("null"),
}
POSITIONS: dict[str, Callable[[Path], object]] = THINGS | {
    "negative offset": as_position(offset=-1),
    "negative segment": as_position(segment=-5),
    "negative number": as_position(number=-5),
    "negative lost": as_position(lost=-5),
    "huge segment": as_position(segment=2**80),
    "huge offset": as_position(offset=2**80, number=2),
    "huge number": as_position(offset=64, number=2**80),
    "huge lost": as_position(lost=2**62),
    "float": as_position(number=1.0),
    "NaN": lambda path: path.write_text('{"segment": 0, "offset": 0, "number": NaN}'),
    "text": as_position(number="1"),
    "true": as_position(number=True),
    "segment beyond the last": as_position(segment=999, number=1),
    "largest segment": as_position(segment=2**63 - 1),
    "offset beyond the end": as_position(offset=1 << 40),
    "offset within a record": as_position(offset=50, number=1),
    "number that is ahead": as_position(number=1000),
    "later segment, first number": as_position(segment=1),
    "more lost than read": as_position(segment=1, number=1, lost=2),
}


@pytest.mark.parametrize("make", POSITIONS.values(), ids=POSITIONS.keys())
def test_a_position_that_no_group_has_stored_skips_no_writer(tmp_path, make, caplog):
    payloads = [bytes([number]) * 3000 for number in range(3)]  # a segment for each
    folder, other = write(tmp_path, payloads), write(tmp_path, [b"other"])
    group = tmp_path / "groups" / "trainers"
    group.mkdir(parents=True)
    make(group / f"{folder.name}.json")

    stats = log_stats(tmp_path)
    assert [(one.committed, one.pending, one.lost) for one in stats.groups] == [(0, 4, 0)]
    member = SegmentMember(tmp_path, "trainers")
    with caplog.at_level(logging.WARNING, "buffer"):
        assert sorted(read_all(member)) == sorted([*payloads, b"other"])
    assert f"{folder.name}.json" in caplog.text
    member.commit(member.offsets())
    member.close()
    assert read_committed(group, folder.name).number == 3
    assert read_committed(group, other.name).number == 1
    assert [(one.committed, one.pending) for one in log_stats(tmp_path).groups] == [(4, 0)]
    assert read_all(SegmentMember(tmp_path, "trainers")) == []


@pytest.mark.parametrize("num_damaged", [0, 1, 2])
def test_every_position_that_a_reader_comes_to_is_believed(tmp_path, num_damaged, caplog):
    payloads = [bytes([number]) * size for number in range(9) for size in (10, 1500)]
    folder = write(tmp_path, payloads)
    for number in range(num_damaged):
        path = folder / f"{2 * number:06d}.seg"
        content = bytearray(path.read_bytes())
        content[[-20, 40][number]] ^= 1  # the last record, and the first
        path.write_bytes(content)

    reader = SegmentReader(tmp_path)
    while records := reader.read(1):
        offsets = reader.offsets()
        for group in (f"g{len(records)}", "trainers"):
            shutil.rmtree(tmp_path / "groups", ignore_errors=True)
            path = tmp_path / "groups" / group / f"{folder.name}.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(offsets[folder.name]))
            member = SegmentMember(tmp_path, group)
            rest, counts = read_all(member), member.counts
            member.close()
            assert len(rest) + counts.damaged + offsets[folder.name]["number"] == len(payloads)
    assert "is not what this group" not in caplog.text


@pytest.mark.parametrize("make", THINGS.values(), ids=THINGS.keys())
@pytest.mark.parametrize("name", ["{}.lock", "{}.json", "foreign.member", "EVICT.lock"])
def test_a_group_goes_on_whatever_lies_where_its_files_belong(tmp_path, make, name):
    if name.startswith("foreign") and make is nested:
        pytest.skip("a file that nobody has locked is that of a dead member")
    folder = write(tmp_path, [b"one", b"two"])
    group = tmp_path / "groups" / "trainers"
    group.mkdir(parents=True)
    path = (tmp_path if name.startswith("EVICT") else group) / name.format(folder.name)
    path.unlink(missing_ok=True)
    make(path)

    members = [SegmentMember(tmp_path, "trainers") for _ in range(2)]
    found = [payload for member in members for payload in read_all(member)]
    assert sorted(found) == [b"one", b"two"]
    for member in members:
        member.commit(member.offsets())
        member.close()
    assert read_committed(group, folder.name).number == 2
    with SegmentWriter(tmp_path, LIMITS, clock=lambda: 9e9) as writer:  # all else has expired
        writer.append(b"three")
        assert writer.counts.evicted_records == 2


def endless(path: Path) -> None:
    path.write_bytes(b"x" * ((1 << 26) + 1))


def strange_claims(path: Path) -> None:
    long = "9" * 400
    lines = [
        ["claimed", "../x", [["w" * 300, "0-0", "server", 1, 0]]],
        ["claimed", "x\0", [["../..", f"{long}-0", "server", 1, 1]]],
        ["claimed", "x" * 300, [["w\0", "0-0", "server", 1, 2]]],
        ["gone", 5],
        ["done", "x", {"w": [1]}, True],
        ["seen", [["server", 1, [[5, 2**70]]]]],
        {"a": 1},
    ]
    text = "\n".join([*map(json.dumps, lines), "[" * 500_000, ""])
    path.write_text(text)


@pytest.mark.parametrize(
    "make", [*THINGS.values(), endless, strange_claims], ids=[*THINGS, "endless", "strange claims"]
)
def test_a_group_claims_whatever_lies_where_its_claims_belong(tmp_path, make, caplog):
    write(tmp_path, [b"zero", b"one", b"two", b"one again"])
    group = tmp_path / "groups" / "trainers"
    group.mkdir(parents=True)
    make(group / "claims")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    member = SegmentMember(tmp_path, "trainers")
    records = member.read(9)
    found = [(one, ("server", 1, seq)) for one, seq in zip(records, (0, 1, 2, 1), strict=True)]
    with caplog.at_level(logging.WARNING, "buffer"):
        assert member.claim(found) == [True, True, True, False]
    if make in (full_folder, endless, strange_claims):  # a line without an end is cut off
        assert caplog.text
    member.commit(member.offsets())
    member.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # KiB
    other = SegmentMember(tmp_path, "trainers")
    write(tmp_path, [b"one, sent again"])
    [again] = other.read(9)
    assert other.claim([(again, ("server", 1, 1))]) == [False]
    other.close()


TOMBSTONES: dict[str, Callable[[Path], object]] = THINGS | {
    str(values): lambda path, values=values: path.write_text(json.dumps(values))
    for values in (
        asdict(Tombstone(0, -1, 0, 0)),
        asdict(Tombstone(-7, 0, 0, 0)),
        asdict(Tombstone(0, 2**80, 0, 0)),
        asdict(Tombstone(0, 10**12, 0, 0)),
        asdict(Tombstone(10**12, 1, 0, 0)),
        asdict(Tombstone(0, 1, 2**64, 0)),
        {**asdict(Tombstone(0, 1, 1, 1)), "more": 1},
        {"segment": 0.0, "next_number": 1.5, "records": "1", "num_bytes": None},
    )
}


@pytest.mark.parametrize("make", TOMBSTONES.values(), ids=TOMBSTONES.keys())
def test_counts_of_evictions_that_cannot_be_true_change_no_count(tmp_path, make, caplog):
    payloads = [bytes([number]) * 3000 for number in range(3)]
    folder = write(tmp_path, payloads)
    make(folder / "EVICTED.json")

    reader = SegmentReader(tmp_path)
    with caplog.at_level(logging.WARNING, "buffer"):
        assert read_all(reader) == payloads
    assert (reader.counts.evicted_unread, reader.counts.damaged) == (0, 0)
    assert "EVICTED.json cannot be used" in caplog.text
    assert log_stats(tmp_path).appended == 3
    limits = replace(LIMITS, max_bytes=8192)
    with SegmentWriter(tmp_path, limits, clock=lambda: 9e9) as writer:
        writer.append(b"new")
        assert writer.counts.evicted_records == 3


@pytest.mark.parametrize("make", THINGS.values(), ids=THINGS.keys())
def test_a_list_of_deletions_that_is_none_is_refused_and_named(tmp_path, make):
    write(tmp_path, [b"one"])
    make(tmp_path / "DELETED.json")
    with pytest.raises(ValueError, match=r"DELETED\.json is damaged"):
        read_deletions(tmp_path)


@pytest.mark.parametrize("text", ['{"a": -1}', '{"a": 1208925819614629174706176}', '{"a": NaN}'])
def test_a_deletion_until_no_time_is_refused(tmp_path, text):
    write(tmp_path, [b"one"])
    (tmp_path / "DELETED.json").write_text(text)
    with pytest.raises(ValueError, match=r"DELETED\.json is damaged"):
        read_deletions(tmp_path)


def test_a_writer_with_the_longest_name_is_read_and_committed(tmp_path):
    folder = write(tmp_path / "log", [b"one", b"two"])
    names = ["w" + "x" * 254, "w" + "x" * 252, "w" + "y" * 252]
    for name in names:
        shutil.copytree(folder, tmp_path / "log" / name)
        (tmp_path / "log" / name / "LOCK").unlink()  # it says whose copy that is

    for expected in (8, 0):
        member = SegmentMember(tmp_path / "log", "trainers")
        assert len(read_all(member)) == expected
        member.commit(member.offsets())
        member.close()
    assert log_stats(tmp_path / "log").groups[0].committed == 8
    backend = EmbeddedLog(f"log:{tmp_path / 'log'}", tmp_path)
    backend.keep_unreadable(f"schema-{names[0]}-000000-0", b"rubbish")
    assert [one.num_bytes for one in backend.unreadable()] == [7]


def test_a_hole_of_30_gb_costs_neither_time_nor_memory_and_pushes_nothing_out(tmp_path):
    folder = write(tmp_path, [b"one", b"two"])
    hole = tmp_path / "w1-1" / "000000.seg"
    hole.parent.mkdir()
    sparse(hole)
    within = folder / "000001.seg"
    sparse(within)
    with within.open("r+b") as file:  # a head that claims 3 GiB
        file.write((folder / "000000.seg").read_bytes()[:12] + (3 << 30).to_bytes(4, "little"))
        file.write(bytes(16))

    before, began_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    reader = SegmentReader(tmp_path)
    assert read_all(reader) == [b"one", b"two"]
    assert log_stats(tmp_path).held == 2
    with SegmentWriter(tmp_path, replace(LIMITS, max_bytes=1 << 20)) as writer:
        writer.append(b"three")
        writer.sync()
        assert writer.counts.evicted_records == 0
    assert sorted(read_all(SegmentReader(tmp_path))) == [b"one", b"three", b"two"]
    assert time.monotonic() - began_s < 30, "holes are read"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


@pytest.mark.parametrize("number", [1, 2, 999_999])
@pytest.mark.parametrize("make", [sparse, os.mkfifo, full_folder, "copy"])
def test_a_foreign_segment_hides_nothing_that_a_living_writer_appends(tmp_path, number, make):
    with SegmentWriter(tmp_path, LIMITS) as writer:
        writer.append(b"first")
        writer.sync()
        folder = tmp_path / writer.name
        path = folder / f"{number:06d}.seg"
        if make == "copy":
            shutil.copy(folder / "000000.seg", path)
        else:
            make(path)
        reader = SegmentReader(tmp_path)
        assert [bytes(one.payload) for one in reader.read(9)] == [b"first"]
        for index in range(4):
            writer.append(bytes([index]) * 3000)
            writer.sync()
            # A record of a copied segment may come again.
            found = [bytes(one.payload) for one in reader.read(9)]
            assert [one for one in found if one != b"first"] == [bytes([index]) * 3000]
        assert reader.counts.damaged == 0


@pytest.mark.parametrize("make", THINGS.values(), ids=THINGS.keys())
def test_a_spool_whose_sent_position_is_none_sends_all(tmp_path, make, make_trace):
    check_spool(tmp_path, make)


@pytest.mark.parametrize("values", [{"segment": 77}, {"offset": 1 << 40}, {"number": 50}])
def test_a_spool_whose_sent_position_cannot_be_sends_all(tmp_path, values):
    check_spool(tmp_path, as_position(**values))


def check_spool(tmp_path: Path, make: Callable[[Path], object]) -> None:
    folder = write(tmp_path / "spool", [b"one", b"two"])
    make(folder / "SENT.json")
    with SegmentWriter(tmp_path / "log", LIMITS) as target:
        spool = DiskSpool(target, tmp_path / "spool", LIMITS, 1 << 20)
        deadline = time.monotonic() + 20
        while not writer_names(tmp_path / "log") or time.monotonic() < deadline:
            spool.tend()
            if len(found := read_all(SegmentReader(tmp_path / "log"))) == 2:
                break
        spool.close()
    assert found == [b"one", b"two"]


def test_what_cannot_be_removed_stops_no_writer(tmp_path):
    write(tmp_path, [b"one"])
    (tmp_path / "quarantine" / "x.bin").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "w-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "w-loop").symlink_to("w-loop")
    (tmp_path / "w-file").write_text("")
    with SegmentWriter(tmp_path, LIMITS, clock=lambda: 9e9) as writer:
        writer.append(b"two")
        assert writer.counts.evicted_records == 1
    assert (tmp_path / "elsewhere").is_dir()
    assert read_tombstone(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 40 + b"]" * 40,
        b'{"a":' * 40 + b"1" + b"}" * 40,
        b"1" * 5000,
        b"9223372036854775808",
        b"1e999",
        b"NaN",
        b'{"CANARY": 1, "CANARY": 2}',
        b'"CANARY',
        b"\xff",
        b" " * 2000,
    ],
)
def test_json_beyond_its_caps_is_refused_without_repeating_it(text):
    with pytest.raises(SmallJsonError) as caught:
        parse_small_json(text, 1000 if text.isspace() else 1 << 20)
    error: BaseException | None = caught.value
    while error is not None:
        assert "CANARY" not in str(error)
        error = error.__cause__ or error.__context__


def test_brackets_within_text_are_no_depth(tmp_path):
    value = {"a": '[{"\\' * 500, "b": [1, 2.5, None, True]}
    assert parse_small_json(json.dumps(value).encode()) == value
    (tmp_path / "x").write_text(json.dumps(value))
    assert read_small_json(tmp_path / "x") == value


def test_inspect_names_all_that_is_not_the_logs(tmp_path):
    folder = write(tmp_path / "traces", [b"one"])
    group = tmp_path / "traces" / "groups" / "trainers"
    group.mkdir(parents=True)
    made: dict[str, Callable[[Path], object]] = {
        f"{folder.name}/000001.seg": os.mkfifo,
        f"{folder.name}/1.seg": lambda path: path.write_text(""),
        f"{folder.name}/EVICTED.json": nested,
        f"groups/trainers/{folder.name}.json": as_position(segment=2**80),
        "groups/trainers/x.lock": full_folder,
        "groups/file": lambda path: path.write_text(""),
        "w-file": lambda path: path.write_text(""),
        "w-link": link_to_itself,
        "quarantine/x.bin": full_folder,
    }
    for name, make in made.items():
        path = tmp_path / "traces" / name
        path.parent.mkdir(exist_ok=True)
        make(path)

    found = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    lines = [line for line in found.output.splitlines() if line.startswith("FOREIGN")]
    for name in made:
        assert sum(f"/{name}: " in line for line in lines) == 1, name
    assert len(lines) == len(made)
    assert found.exit_code == 1


def test_folders_among_the_groups_that_no_member_made_are_named_and_counted_as_none(tmp_path):
    write(tmp_path / "traces", [b"one", b"two"])
    member = SegmentMember(tmp_path / "traces", "ok")
    read_all(member)
    member.commit(member.offsets())
    groups = tmp_path / "traces" / "groups"
    forged = "g\ngroup forged: 5 committed"
    for name in ("backup", "node_modules", forged, ".git"):
        (groups / name).mkdir()
        (groups / name / "package.json").write_text("{}")
    (groups / "begins").mkdir()
    new = SegmentMember(tmp_path / "traces", "new")
    new.read(1)

    assert [one.group for one in log_stats(tmp_path / "traces").groups] == ["new", "ok"]
    shown = CliRunner().invoke(app, ["stats", str(tmp_path)]).output
    assert [line for line in shown.splitlines() if "forged" in line] == []
    lines = CliRunner().invoke(app, ["inspect", str(tmp_path)]).output.splitlines()
    foreign = [line for line in lines if line.startswith("FOREIGN")]
    for name in ("backup", "node_modules", r"g\ngroup forged: 5 committed", ".git"):
        assert sum(f"/groups/{name}: " in line for line in foreign) == 1, name
    assert len(foreign) == 4
    assert not [line for line in lines if line.startswith("group")]
    member.close(), new.close()


def test_names_of_foreign_files_forge_no_line_and_no_code_of_the_terminal(tmp_path):
    folder = write(tmp_path / "traces", [b"one"])
    for name in (b"a\ngroup ok: 5 committed.seg", b"\x1b[2J.seg", b"\xff.seg", "ä.seg".encode()):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).touch()
    found = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert found.exit_code == 1 and not isinstance(found.exception, UnicodeError)
    lines = [line for line in found.output.splitlines() if line.startswith("FOREIGN")]
    assert len(lines) == 4 and "\x1b" not in found.output
    for name in (r"a\ngroup ok: 5 committed.seg", r"\x1b[2J.seg", r"\udcff.seg", "ä.seg"):
        assert sum(f"/{name}: " in line for line in lines) == 1, name
    assert not [line for line in found.output.splitlines() if line.startswith("group")]


def test_a_hole_counts_as_no_bytes_that_are_held(tmp_path):
    folder = write(tmp_path / "traces", [b"one"])
    before = log_stats(tmp_path / "traces").held_bytes
    assert 0 < before < 1 << 20
    sparse(folder / "000001.seg")
    assert log_stats(tmp_path / "traces").held_bytes - before < 1 << 20


@pytest.mark.parametrize("make", THINGS.values(), ids=THINGS.keys())
def test_what_lies_in_the_folder_of_versions_ends_nobody(tmp_path, make):
    store = FolderWeights(tmp_path / "weights")
    store.root.mkdir()
    store.mark_in_use("server", [3])
    assert store.marked_in_use() == {3}
    for name in ("DENIED.json", "IN_USE-foreign.json", "HIGHEST", "7", "1"):
        make(store.root / name)

    with suppress(ValueError):  # it says which file is no list
        store.read_denied()
    assert store.marked_in_use() is None  # so nothing is pruned
    with pytest.raises(ValueError, match="HIGHEST must"):
        store.next_version()
    for version in store.versions():
        store.change_mark(version)
        with pytest.raises(BundleError):
            store.read(version)


@pytest.mark.parametrize("make", THINGS.values(), ids=THINGS.keys())
def test_what_lies_in_a_trainers_or_servers_folder_ends_no_command(tmp_path, make):
    folder = tmp_path / "trainer"
    folder.mkdir()
    (folder / "lock").write_text("")
    (folder / "x").mkdir()
    make(folder / "status.json")
    make(folder / "x" / "status.json")
    for name in ("status", "logs"):
        found = CliRunner().invoke(trainer_app, [name, str(tmp_path)])
        assert found.exit_code in (0, 1, 2)
        assert found.exception is None or isinstance(found.exception, SystemExit), found.exception

    make(tmp_path / "server.json")
    with suppress(OSError):
        assert living_owner(tmp_path / "server.json") is None


@pytest.mark.parametrize("name", ["groups", "groups/trainers", "quarantine"])
@pytest.mark.parametrize("make", [sparse, os.mkfifo, link_to_itself], ids=["file", "pipe", "link"])
def test_what_lies_where_a_folder_belongs_is_moved_out_of_the_way(tmp_path, name, make):
    write(tmp_path, [b"one"])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    make(tmp_path / name)

    member = SegmentMember(tmp_path, "trainers")
    assert read_all(member) == [b"one"]
    member.commit(member.offsets())
    member.close()
    backend = EmbeddedLog(f"log:{tmp_path}", tmp_path)
    backend.keep_unreadable("why", b"rubbish")
    sparse(tmp_path / "quarantine" / "hole.bin")
    backend.keep_unreadable("more", b"rubbish")
    assert sorted(one.name for one in backend.unreadable()) == ["hole", "more", "why"]
    [aside] = tmp_path.rglob(".foreign-*")
    assert aside.parent == (tmp_path / name).parent


def test_offsets_of_a_checkpoint_that_cannot_be_skip_nothing(tmp_path):
    folder = write(tmp_path, [b"one", b"two"])
    offsets = {folder.name: {"segment": 5, "offset": 0, "number": 99}}
    assert read_all(SegmentMember(tmp_path, "trainers", offsets)) == [b"one", b"two"]
