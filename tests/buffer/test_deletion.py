"""What a deletion leaves in files: nothing of the tenant, and everything else as it was."""

import json
import os
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from buffer.backends import open_backend
from buffer.cli import app
from buffer.codec import encode_trace
from buffer.deletions import Deletions, digest_of, owner_of
from buffer.forgetting_writer import ForgettingWriter
from buffer.frames import pack_deleted_head, read_frame, scan
from buffer.interface import TraceLimits
from buffer.layout import segment_path
from buffer.memory import MemoryBackend
from buffer.traces import TraceReader
from oracles.small_disk import small_file_system

CANARY = np.array([1_234_567_891, 1_987_654_321, 1_111_222_333], np.int32)
LIMITS = TraceLimits(segment_bytes=1 << 16, max_bytes=1 << 24, ttl_s=3600.0, sync_interval_s=0.0)


@pytest.fixture
def theirs(make_trace):
    """Make a trace of ``umbrella``, whose token ids are found nowhere else."""

    def make(seq):
        return encode_trace(
            make_trace(
                seq=seq,
                tenant="umbrella",
                token_ids=np.concatenate([CANARY, CANARY]),
                prompt_length=3,
            )
        )

    return make


def files_with(folder, needle):
    return [path for path in folder.rglob("*") if path.is_file() and needle in path.read_bytes()]


def write_mixed(writer, make_trace, theirs, first, count):
    for seq in range(first, first + count):
        writer.append(theirs(seq) if seq % 2 else encode_trace(make_trace(seq=seq)))
    writer.sync()


def test_on_a_full_disk_records_are_deleted_and_what_was_not_done_is_said(
    tmp_path, make_trace, theirs
):
    with small_file_system(tmp_path / "disk", "256k") as disk:
        log = open_backend("log:", disk)
        with log.open_trace_writer(LIMITS) as writer:
            write_mixed(writer, make_trace, theirs, 0, 20)
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize))
        call = ["delete", "--tenant", "umbrella", str(disk)]
        found = CliRunner().invoke(app, call)
        assert found.exit_code == 2
        assert f"{disk}/traces/DELETED.json: No space left on device. 10 records and 0 that " in (
            found.stderr
        )
        assert found.stderr.rstrip().endswith("Make room, and repeat the deletion")
        assert files_with(disk / "traces", CANARY.tobytes()) == []
        ballast.unlink()
        assert CliRunner().invoke(app, call).exit_code == 0
        assert log.deletions().until_ms.keys() == {digest_of("umbrella")}
        assert log.stats().held == 10


def test_no_file_holds_anything_of_the_tenant_and_the_writer_goes_on(tmp_path, make_trace, theirs):
    log = open_backend("log:", tmp_path)
    with log.open_trace_writer(LIMITS) as writer:
        write_mixed(writer, make_trace, theirs, 0, 20)
        log.keep_unreadable("content-w-1", theirs(1)[:-1])
        assert files_with(tmp_path, CANARY.tobytes())
        assert log.delete("umbrella").records == 10
        assert files_with(tmp_path, CANARY.tobytes()) == []
        assert files_with(tmp_path, b"umbrella") == []
        write_mixed(writer, make_trace, theirs, 20, 4)
    reader = TraceReader(log)
    assert [trace.seq for trace in reader.read(100)] == [*range(0, 24, 2)]
    assert (reader.counts.damaged, reader.counts.deleted) == (0, 12)


def test_bytes_of_damaged_and_torn_records_go_too(tmp_path, make_trace, theirs):
    log = open_backend("log:", tmp_path)
    with log.open_trace_writer(LIMITS) as writer:
        write_mixed(writer, make_trace, theirs, 0, 6)
        name = writer.name
    path = segment_path(tmp_path / "traces" / name, 0)
    content = bytearray(path.read_bytes())
    at = content.find(CANARY.tobytes())
    content[at - 1] ^= 0xFF  # of record 1
    path.write_bytes(content[:-5])  # and record 5 is torn
    log.delete("umbrella")
    assert files_with(tmp_path, CANARY.tobytes()[:8]) == []
    reader = TraceReader(log)
    assert [trace.seq for trace in reader.read(100)] == [0, 2, 4]
    counts = reader.counts
    assert (counts.damaged, counts.torn, counts.deleted) == (1, 1, 1)


def test_a_deletion_that_was_killed_half_way_is_finished_by_the_next(tmp_path, make_trace, theirs):
    log = open_backend("log:", tmp_path)
    with log.open_trace_writer(LIMITS) as writer:
        write_mixed(writer, make_trace, theirs, 0, 4)
        path = segment_path(tmp_path / "traces" / writer.name, 0)
    with path.open("r+b") as file:
        frames = list(scan(file.fileno(), path.stat().st_size))
        file.seek(frames[1].start)
        file.write(pack_deleted_head(frames[1]))  # killed before its payload was overwritten
    assert files_with(tmp_path, CANARY.tobytes())
    assert log.delete("umbrella").records == 1
    assert files_with(tmp_path, CANARY.tobytes()) == []
    assert log.stats().deleted == 2


def test_a_reader_in_the_middle_of_it_finds_no_damage(tmp_path, make_trace, monkeypatch):
    """It has read the old head, and the payload is being overwritten."""
    log = open_backend("log:", tmp_path)
    with log.open_trace_writer(LIMITS) as writer:
        writer.append(encode_trace(make_trace()))
        path = segment_path(tmp_path / "traces" / writer.name, 0)
    descriptor = os.open(path, os.O_RDWR)
    size = path.stat().st_size
    (frame,) = scan(descriptor, size)
    head = pack_deleted_head(frame)
    os.pwrite(descriptor, bytes(8), frame.end - 8)
    assert read_frame(descriptor, 0, size) is None  # damage, as long as the head is the old one

    preadv = os.preadv

    def then_the_head_is_written(fd, buffers, offset):
        num_bytes = preadv(fd, buffers, offset)
        os.pwrite(descriptor, head, frame.start)
        return num_bytes

    monkeypatch.setattr(os, "preadv", then_the_head_is_written)
    found = read_frame(descriptor, 0, size)
    os.close(descriptor)
    assert found is not None and found.is_deleted
    assert (found.number, len(found.payload), found.end) == (0, 0, size)


def test_a_flipped_bit_makes_no_deleted_record(tmp_path, make_trace):
    log = open_backend("log:", tmp_path)
    with log.open_trace_writer(LIMITS) as writer:
        writer.append(encode_trace(make_trace()))
        path = segment_path(tmp_path / "traces" / writer.name, 0)
    content = bytearray(path.read_bytes())
    content[10] ^= 1  # the flag
    path.write_bytes(content)
    reader = TraceReader(log)
    assert reader.read(10) == []
    assert (reader.counts.damaged, reader.counts.deleted) == (1, 0)


def test_a_damaged_list_of_deletions_stops_no_reader(tmp_path, make_trace):
    log = open_backend("log:", tmp_path)
    with log.open_trace_writer(LIMITS) as writer:
        writer.append(encode_trace(make_trace()))
    (tmp_path / "traces" / "DELETED.json").write_text("{]")
    assert len(TraceReader(log).read(10)) == 1
    with pytest.raises(ValueError, match=r"DELETED\.json is damaged"):
        log.delete("acme")


def test_a_writer_drops_what_was_deleted_on_its_way(make_trace):
    buffer = MemoryBackend.private()
    writer = ForgettingWriter(buffer.open_trace_writer(LIMITS), buffer.deletions, every_s=0.01)
    buffer.delete("umbrella")
    deadline = time.monotonic() + 60
    while writer.counts.deleted == 0:
        assert time.monotonic() < deadline
        assert writer.append_all([encode_trace(make_trace(tenant="umbrella"))]) == []
        time.sleep(0.01)
    writer.append_all([encode_trace(make_trace())])
    writer.close()
    counts = writer.counts
    assert counts.appended == counts.durable + counts.deleted
    assert counts.deleted == 1


def test_what_a_server_holds_when_it_sees_a_deletion_goes_whatever_the_list_says(make_trace):
    """The list says an hour after the newest stored trace, which may be long ago; what waits here
    was stamped by the clock of this host, which now shows a later time."""
    listed, now = [Deletions().with_tenant(digest_of("old"), 5)], [10_000_000]
    below = MemoryBackend.private()
    writer = ForgettingWriter(
        below.open_trace_writer(LIMITS), lambda: listed[0], every_s=3600.0, now=lambda: now[0]
    )

    def put(tenant, at):
        before = writer.counts.deleted
        trace = make_trace(tenant=tenant, finished_unix_ms=at)
        assert writer.append_all([encode_trace(trace)]) == []
        return writer.counts.deleted == before

    writer.look()
    assert put("old", 9_000_000) and put("umbrella", 9_000_000)
    listed[0] = listed[0].with_tenant(digest_of("umbrella"), 1)
    writer.look()
    assert not put("umbrella", 10_000_000)
    now[0] += 1_000_000
    writer.look()
    assert not put("umbrella", 9_000_000) and put("umbrella", 10_000_001)
    assert put("old", 6)
    listed[0] = Deletions()
    writer.look()
    assert put("umbrella", 9_000_000)
    writer.close()


def test_what_was_sent_after_a_deletion_that_a_server_could_not_see_is_kept(make_trace):
    """The buffer is away when the server starts, and lists an old deletion once it is back."""
    is_away, listed = [True], Deletions().with_tenant(digest_of("umbrella"), 5)

    def read():
        if is_away[0]:
            raise OSError("away")
        return listed

    below = MemoryBackend.private().open_trace_writer(LIMITS)
    writer = ForgettingWriter(below, read, every_s=3600.0)
    writer.look()
    is_away[0] = False
    writer.look()
    writer.append_all(
        [encode_trace(make_trace(tenant="umbrella", finished_unix_ms=at)) for at in (5, 6)]
    )
    assert writer.counts.deleted == 0  # 5 is old: readers drop it
    writer.close()


def test_deletions_are_listed_and_taken_back_by_commands(tmp_path, make_trace, theirs):
    with open_backend("log:", tmp_path).open_trace_writer(LIMITS) as writer:
        write_mixed(writer, make_trace, theirs, 0, 6)

    def call(*arguments):
        result = CliRunner().invoke(app, [*arguments, str(tmp_path)])
        return result.exit_code, result.output

    digest = digest_of("umbrella")
    assert call("delete", "--list")[1].startswith("no deletion is listed; log:")
    code, output = call("delete", "--tenant", "umbrella")
    assert code == 0
    assert "what ended until 2023-11-14 23:13:21 UTC is dropped if it still arrives" in output
    assert "repeat it with --until now" in output
    assert call("delete", "--tenant", "umbrella", "--until", "3000-01-01")[0] == 0
    code, output = call("delete", "--list")
    assert (code, output) == (
        0, f"{digest}: what ended until 3000-01-01 00:00:00 UTC (in the future)\n",
    )  # fmt: skip
    assert json.loads(call("delete", "--list", "--json")[1])["digest"] == digest
    assert call("delete", "--list", "--tenant", "acme")[1].startswith("no deletion is listed")
    assert call("undelete", "--tenant", "acme")[0] == 1
    assert call("undelete", "--digest", digest)[0] == 0
    assert call("undelete", "--tenant", "umbrella")[0] == 1
    for wrong in (["undelete"], ["delete"], ["delete", "--list", "--until", "now"]):
        code, output = call(*wrong)
        assert code == 2 and len(output.splitlines()) == 1
    audited = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    undone = [line for line in audited if line["action"] == "undelete"]
    assert [line["was_listed"] for line in undone] == [False, True, False]
    assert {line["tenant"] for line in undone} == {digest, digest_of("acme")}
    assert {"deletions", "delete"} <= {line["action"] for line in audited}


def test_whose_a_record_is_is_read_off_its_header(make_trace):
    record = bytes(encode_trace(make_trace(tenant="acme", finished_unix_ms=7)))
    owner = owner_of(record)
    assert (owner.tenant, owner.finished_unix_ms) == ("acme", 7)
    for end in range(len(record) // 2):
        found = owner_of(record[:end])
        assert found is None or found == owner
    assert owner_of(b"") is owner_of(b"x" * 1000) is None
    listed = Deletions().with_tenant(digest_of("acme"), 10).with_tenant(digest_of("acme"), 5)
    assert listed.covers("acme", 10) and not listed.covers("acme", 11)
    assert not listed.covers("umbrella", 1)
    assert listed.since(9).covers("acme", 10) and not listed.since(10)


def test_the_command_deletes_and_leaves_a_line_that_names_nobody(tmp_path, make_trace, theirs):
    log = open_backend("log:", tmp_path)
    with log.open_trace_writer(LIMITS) as writer:
        write_mixed(writer, make_trace, theirs, 0, 6)
    call = ["delete", "--tenant", "umbrella", "log:", "--run", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["records"] == 3
    CliRunner().invoke(app, ["stats", str(tmp_path)])
    text = (tmp_path / "audit.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["action"] for line in lines] == ["delete", "stats"]
    assert lines[0]["tenant"] == digest_of("umbrella") and lines[0]["records"] == 3
    assert all({"unix_ms", "user", "host", "pid", "buffer"} <= line.keys() for line in lines)
    assert "umbrella" not in text
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_run_folder_names_a_buffer_and_a_folder_that_is_not_there_is_refused(
    tmp_path, make_trace, theirs
):
    with open_backend("log:", tmp_path).open_trace_writer(LIMITS) as writer:
        write_mixed(writer, make_trace, theirs, 0, 6)
    call = ["delete", "--tenant", "umbrella"]
    result = CliRunner().invoke(app, [*call, str(tmp_path), "--json"])
    assert (result.exit_code, json.loads(result.stdout)["records"]) == (0, 3)
    for command in (call, ["stats"], ["inspect"]):
        for place in (str(tmp_path / "mistyped"), f"log:{tmp_path}/mistyped"):
            result = CliRunner().invoke(app, [*command, place])
            assert result.exit_code == 2
            assert "mistyped" in result.output


def test_each_access_is_noted_though_there_is_no_run_folder(tmp_path, make_trace, theirs):
    with open_backend("log:", tmp_path).open_trace_writer(LIMITS) as writer:
        write_mixed(writer, make_trace, theirs, 0, 6)
    url, run = f"log:{tmp_path}/traces", tmp_path / "its" / "run"
    calls = (
        ["delete", "--tenant", "umbrella", url, "--run", str(run)],
        ["undelete", "--tenant", "umbrella", url, "--run", str(run)],
        ["delete", "--list", url, "--run", str(run)],
        ["stats", url, "--set", f"run_dir={run}"],
        ["inspect", url, "--set", f"run_dir={run}"],
        ["copy", url, str(tmp_path / "other"), "--set", f"run_dir={run}"],
    )
    for call in calls:
        assert CliRunner().invoke(app, call).exit_code == 0
    lines = [json.loads(line) for line in (run / "audit.jsonl").read_text().splitlines()]
    actions = ["delete", "undelete", "deletions", "stats", "inspect", "copy", "copy"]
    assert [line["action"] for line in lines] == actions
    assert run.stat().st_mode & 0o777 == 0o700
    assert (run / "audit.jsonl").stat().st_mode & 0o777 == 0o600
    assert (lines[3]["written"], lines[3]["held"], lines[3]["deleted"]) == (6, 3, 3)
    assert (lines[4]["traces"], lines[4]["put_aside"]) == (3, 0)
    other = [
        json.loads(line) for line in (tmp_path / "other" / "audit.jsonl").read_text().splitlines()
    ]
    for role, (began, done) in (("from", lines[5:]), ("to", other)):
        assert (began["action"], began["role"], began["began"]) == ("copy", role, True)
        assert (done["action"], done["role"], done["read"], done["sent"]) == ("copy", role, 3, 3)
        assert done["sent_bytes"] > 0 and "began" not in done


def test_stats_tell_the_bytes_of_deleted_records_from_those_that_are_held(
    tmp_path, make_trace, theirs
):
    with open_backend("log:", tmp_path).open_trace_writer(LIMITS) as writer:
        write_mixed(writer, make_trace, theirs, 0, 8)
    with open_backend("log:", tmp_path / "held").open_trace_writer(LIMITS) as writer:
        for seq in range(0, 8, 2):
            writer.append(encode_trace(make_trace(seq=seq)))
    assert " of deleted records" not in CliRunner().invoke(app, ["stats", str(tmp_path)]).output
    open_backend("log:", tmp_path).delete("umbrella")
    stats = open_backend("log:", tmp_path).stats()
    held_alone = open_backend("log:", tmp_path / "held").stats().held_bytes
    assert stats.held_bytes - stats.deleted_bytes == held_alone
    said = CliRunner().invoke(app, ["stats", str(tmp_path)]).output
    assert f"4 held, {stats.held_bytes} bytes ({stats.deleted_bytes} of deleted records)" in said
    said = CliRunner().invoke(app, ["stats", str(tmp_path), "--json"]).output
    values = json.loads(said.splitlines()[0])
    assert values["written"] == values["appended"] == 8


def test_a_replay_of_a_tenant_tells_its_deleted_traces_from_those_removed_before(
    tmp_path, make_trace
):
    def write(tenants, first):
        with open_backend("log:", tmp_path).open_trace_writer(LIMITS) as writer:
            for seq, tenant in enumerate(tenants, first):
                writer.append(encode_trace(make_trace(seq=seq, tenant=tenant)))

    write("aabbbc", 0)
    open_backend("log:", tmp_path).delete("b")
    # They come late, and are there although their tenants are deleted now.
    other = open_backend("log:", tmp_path / "other")
    other.open_trace_writer(LIMITS).close()
    for tenant in "ac":
        other.delete(tenant, until_ms=1 << 60)
    call = ["replay", str(tmp_path), str(tmp_path / "other"), "--tenant", "a"]
    said = CliRunner().invoke(app, [*call, "--json"]).output
    found = json.loads(said)
    counts = [found[name] for name in ("read", "sent", "filtered", "deleted", "removed")]
    assert counts == [3, 0, 1, 2, 3]
    said = CliRunner().invoke(app, call).output
    assert "2 left out because their tenant was deleted, 3 deleted from there before" in said


def test_a_replay_into_the_same_run_leaves_lines_that_tell_source_from_destination(
    tmp_path, make_trace, theirs
):
    with open_backend("log:", tmp_path).open_trace_writer(LIMITS) as writer:
        write_mixed(writer, make_trace, theirs, 0, 4)
    call = ["replay", str(tmp_path), str(tmp_path), "--tenant", "umbrella"]
    assert CliRunner().invoke(app, call).exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(line["role"], line.get("sent")) for line in lines] == [
        *(("from", None), ("to", None)),
        *(("from", 2), ("to", 2)),
    ]
    (tmp_path / "traces" / "DELETED.json").write_text("[]")
    assert CliRunner().invoke(app, call).exit_code == 2
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [line.get("failed") for line in lines[4:]] == [None, None, "ValueError", "ValueError"]


def test_the_audit_line_holds_no_password(tmp_path):
    call = ["delete", "--tenant", "x", "redis://me:hunter2@127.0.0.1:1/0?timeout_s=0.2"]
    result = CliRunner().invoke(app, [*call, "--run", str(tmp_path)])
    assert result.exit_code == 2
    text = (tmp_path / "audit.jsonl").read_text()
    assert json.loads(text)["failed"] == "ServiceAwayError"
    assert "hunter2" not in text + result.output and "127.0.0.1:1/0" in text
