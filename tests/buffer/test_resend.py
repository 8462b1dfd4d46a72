"""``buffer copy`` and ``buffer replay``: what they print, when they fail, and after ``kill -9``."""

import dataclasses
import json
import os
import time

import pytest
from typer.testing import CliRunner

from buffer.backends import open_backend
from buffer.cli import app
from buffer.codec import UnreadableRecordError, decode_trace, encode_trace, identity_of
from buffer.interface import TraceLimits
from buffer.records import Rounds, Sampling
from buffer.resend import StoppedError, Wanted, copy_traces, replay_traces
from oracles.forked import Forked
from oracles.small_disk import small_file_system
from oracles.support import REPOSITORY

LIMITS = TraceLimits(segment_bytes=1 << 16, max_bytes=1 << 26, ttl_s=1e9, sync_interval_s=0.0)


def write(folder, traces):
    with open_backend("log:", folder).open_trace_writer(LIMITS) as writer:
        for trace in traces:
            writer.append(encode_trace(trace))


@pytest.fixture
def run(tmp_path, make_trace):
    """A run folder with six traces of two tenants."""
    folder = tmp_path / "run"
    write(folder, (make_trace(seq=seq, tenant=f"tenant-{seq % 2}") for seq in range(6)))
    return folder


def traces_in(url_or_folder, run_dir=None):
    is_folder = run_dir is None
    backend = open_backend("log:", url_or_folder) if is_folder else open_backend(*url_or_folder)
    reader, found = backend.open_record_reader(), []
    while records := reader.read(64):
        found += [decode_trace(record.payload) for record in records]
    return found


def command(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_copy_says_what_it_did_and_a_second_one_adds_nothing(run, tmp_path):
    there = tmp_path / "there"
    code, output, _ = command("copy", run, there)
    assert (code, output.split(" (")[0]) == (0, "copy: 6 records read, 6 sent")
    code, output, _ = command("copy", run, f"log:{there}/traces", "--json")
    assert code == 0
    line = json.loads(output)
    assert (line["kind"], line["sent"], line["already_there"]) == ("copy", 0, 6)
    assert len(traces_in(there)) == 6


def test_copy_takes_urls_of_every_kind(run, tmp_path):
    there = f"shm:?traces=log:{tmp_path}/copied"
    assert command("copy", run, there)[0] == 0
    assert len(traces_in((f"log:{tmp_path}/copied", run), run)) == 6
    assert "6 already there" in command("copy", run, there)[1]


@pytest.mark.parametrize("url", ["memory:x", "shm:?traces=memory:x"])
def test_no_command_pretends_to_reach_the_memory_of_one_process(run, url):
    """What was copied there would have ended with the command that said so."""
    for call in (
        *(("copy", run, url), ("replay", run, url), ("copy", url, run)),
        *(("stats", url), ("inspect", url), ("delete", "--tenant", "x", url)),
    ):
        code, output, error = command(*call)
        assert (code, output) == (2, "")
        assert "keeps traces in the memory of one process" in error


@pytest.mark.parametrize("name", ["copy", "replay"])
def test_what_was_deleted_is_left_out_and_counted(run, tmp_path, make_trace, name):
    """Also what came to the source after its tenant was deleted, and what was deleted there."""
    open_backend("log:", run).delete("tenant-1")
    write(run, [make_trace(seq=20, tenant="tenant-1"), make_trace(seq=21)])
    there = tmp_path / "there"
    (there / "traces").mkdir(parents=True)
    open_backend("log:", there).delete("acme", until_ms=1_800_000_000_000)
    code, output, _ = command(name, run, there)
    assert code == 0
    assert output.startswith(f"{name}: 5 records read, 3 sent")
    assert "2 left out because their tenant was deleted, 3 deleted from there before" in output
    assert {trace.tenant for trace in traces_in(there)} == {"tenant-0"}
    code, output, _ = command(name, run, tmp_path / "other", "--json")
    assert (json.loads(output)["deleted"], json.loads(output)["removed"]) == (1, 3)


def test_what_cannot_be_copied_is_an_exit_code_of_1_and_is_named(run, tmp_path, make_trace):
    with open_backend("log:", run).open_trace_writer(LIMITS) as writer:
        writer.append(b"no trace")
    code, output, _ = command("copy", run, tmp_path / "there")
    assert code == 1
    assert output.endswith("; PROBLEMS: 1 unreadable\n")
    assert len(traces_in(tmp_path / "there")) == 6


def test_damaged_records_of_the_source_are_counted(run, tmp_path):
    path = next(run.glob("traces/*/*.seg"))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    code, output, _ = command("copy", run, tmp_path / "there")
    assert code == 1
    assert output.startswith("copy: 5 records read, 5 sent")
    assert output.endswith("; PROBLEMS: 1 damaged or evicted before they were read\n")


def test_a_record_that_the_destination_refuses_is_counted(run, tmp_path):
    one = len(encode_trace(traces_in(run)[0]))
    limits = dataclasses.replace(LIMITS, segment_bytes=4096, max_bytes=8192)
    assert one < 4096
    big = dataclasses.replace(traces_in(run)[0], seq=99, request_id="x" * 4000)
    write(run, [big])
    sent = copy_traces(open_backend("log:", run), open_backend("memory:small", run), limits)
    assert sent.too_large == 1
    assert sent.is_damaged


def test_a_destination_that_evicts_what_it_got_is_an_exit_code_of_1(run, tmp_path, make_trace):
    write(run, (make_trace(seq=seq) for seq in range(100, 140)))
    settings = ["buffer.segment_bytes=4096", "buffer.max_bytes=8192"]
    options = [word for one in settings for word in ("--set", one)]
    code, output, _ = command("copy", run, tmp_path / "there", *options)
    assert code == 1
    assert "evicted there to keep buffer.max_bytes" in output


@pytest.mark.parametrize("name", ["copy", "replay"])
def test_wrong_places_are_wrong_usage(name, run, tmp_path):
    code, _, error = command(name, tmp_path / "nope", tmp_path / "there")
    assert (code, error) == (2, f"{tmp_path / 'nope'} is neither a run folder nor a URL\n")
    assert not (tmp_path / "there").exists()
    code, _, error = command(name, run, "nope://me:s3cret@host/0")
    assert code == 2
    assert "scheme 'nope' is unknown" in error and "s3cret" not in error
    code, _, error = command(name, run, "redis://me:s3cret@127.0.0.1:1/0")
    assert code == 2
    assert "redis://127.0.0.1:1/0" in error and "s3cret" not in error


def test_replay_filters_by_tenant_domain_version_and_time(run, tmp_path, make_trace):
    sampling = Sampling({"temperature": 0.0, "domain": "code"})
    at = 1_764_000_000_000  # 2025-11-24T16:00:00Z
    write(run, [make_trace(seq=50, sampling=sampling, finished_unix_ms=at, rounds=Rounds.of())])

    def sent(*options):
        code, output, _ = command("replay", run, tmp_path / "there", "--json", *options)
        assert code == 0
        return json.loads(output)["sent"]

    assert sent() == 7
    assert sent("--tenant", "tenant-0") == 3
    assert sent("--tenant", "tenant-0", "--tenant", "acme") == 4
    assert sent("--domain", "code") == 1
    assert sent("--drafter-version", 3) == 6
    assert sent("--drafter-version", 4) == 0
    assert sent("--since", "2025-11-24T16:00:00") == 1
    assert sent("--since", "2025-11-24T17:00:00.001+01:00") == 0
    assert sent("--until", "2025-11-24T16:00") == 6
    assert len(traces_in(tmp_path / "there")) == 7 + 3 + 4 + 1 + 6 + 0 + 1 + 0 + 6
    assert command("replay", run, tmp_path / "there", "--since", "noon")[0] == 2


def test_replayed_traces_keep_their_identity_unless_they_shall_be_learnt_again(run, tmp_path):
    before = {(t.producer, t.epoch, t.seq) for t in traces_in(run)}
    command("replay", run, tmp_path / "same")
    assert {(t.producer, t.epoch, t.seq) for t in traces_in(tmp_path / "same")} == before

    for _ in range(2):
        assert command("replay", run, tmp_path / "new", "--as-new")[0] == 0
    new = traces_in(tmp_path / "new")
    assert len({(t.producer, t.epoch, t.seq) for t in new}) == 12
    assert not {t.producer for t in new} & {t.producer for t in traces_in(run)}
    assert [t.token_ids.tolist() for t in new[:6]] == [t.token_ids.tolist() for t in traces_in(run)]


def test_a_replay_into_the_buffer_that_it_reads_ends(run, make_trace):
    """As new traces it read what it had sent, without end, until the disk was full."""
    write(run, (make_trace(seq=seq, producer="other") for seq in range(200)))
    code, output, _ = command("replay", run, run, "--as-new", "--json")
    assert code == 0
    line = json.loads(output)
    assert (line["read"], line["sent"]) == (206, 206)
    assert len(traces_in(run)) == 412


def test_a_replay_is_no_faster_than_its_rate(run, tmp_path):
    started = time.monotonic()
    places = open_backend("log:", run), open_backend("log:", tmp_path / "there")
    sent = replay_traces(*places, LIMITS, Wanted(), rate=20.0)
    assert sent.sent == 6
    assert time.monotonic() - started >= 5 / 20


def test_a_destination_that_fails_on_the_way_says_what_it_has(run, tmp_path, monkeypatch):
    """A real destination whose disk fails from the third acknowledgement on."""
    from buffer import resend

    monkeypatch.setattr(resend, "_RECORDS_AT_ONCE", 2)
    there = open_backend("memory:failing", tmp_path)

    class Failing:
        def __getattr__(self, name):
            return getattr(there, name)

        def open_trace_writer(self, limits):
            writer = there.open_trace_writer(limits)
            sync, calls = writer.sync, []

            def fail_later():
                calls.append(1)
                if len(calls) > 2:
                    raise OSError("the disk is gone")
                return sync()

            writer.sync = fail_later
            return writer

    with pytest.raises(StoppedError, match="the disk is gone") as stopped:
        copy_traces(open_backend("log:", run), Failing(), LIMITS)
    assert stopped.value.sent.sent == 4
    assert copy_traces(open_backend("log:", run), there, LIMITS).sent in (0, 1, 2)
    assert len(traces_in(("memory:failing", run), run)) == 6


@pytest.mark.parametrize(
    ("command", "advice"),
    [("copy", "start it again to continue"), ("replay", "sends all of them again")],
)
def test_who_stops_at_a_full_disk_is_told_what_another_run_would_do(
    tmp_path, make_trace, command, advice
):
    source = tmp_path / "source"
    write(source, [make_trace(seq=seq) for seq in range(300)])
    num_bytes = open_backend("log:", source).stats().held_bytes
    with small_file_system(tmp_path / "disk", f"{num_bytes // 2048}k") as disk:
        call = [command, str(source), str(disk / "to"), "--set", "buffer.max_bytes=1073741824"]
        found = CliRunner().invoke(app, call)
    assert found.exit_code == 1
    assert "No space left" in found.stderr and advice in found.stderr
    assert "[Errno" not in found.stderr
    assert ("to continue" in found.stderr) == (command == "copy")


COPY = """
import sys
from buffer.command_resend import copy
copy(sys.argv[1], sys.argv[2], as_json=True)
"""


def test_a_copy_that_is_killed_is_completed_by_the_next_one(tmp_path, make_trace):
    run, there = tmp_path / "run", tmp_path / "there"
    write(run, (make_trace(seq=seq) for seq in range(3000)))
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    env = {**os.environ, "PYTHONPATH": path}
    killed = 0
    for _ in range(3):
        before = len(traces_in(there)) if there.exists() else 0
        arguments = ["-c", COPY, str(run), str(there)]
        process = Forked(arguments, env, tmp_path, tmp_path / "output")
        deadline = time.monotonic() + 60
        while len(traces_in(there)) <= before and process.poll() is None:
            assert time.monotonic() < deadline
        killed += process.poll() is None
        process.kill()
    assert killed

    copy_traces(open_backend("log:", run), open_backend("log:", there), LIMITS)

    assert sorted(trace.seq for trace in traces_in(there)) == list(range(3000))
    assert copy_traces(open_backend("log:", run), open_backend("log:", there), LIMITS).sent == 0


# ---- inspect -------------------------------------------------------------------------------------


def test_inspect_shows_metadata_of_records_and_no_tokens_unless_asked(run):
    code, output, _ = command("inspect", run, "--records", "--limit", 2)
    lines = [line for line in output.splitlines() if line.startswith("record ")]
    assert code == 0
    assert len(lines) == 2
    assert lines[1].partition("bytes, ")[2] == (
        "server-1/1700000000000/1, tenant tenant-1, domain (none), finished "
        "2023-11-14T22:13:21.000+00:00, target abababababab, tokens 2 prompt + 3 completion, "
        "rounds 2, proposed 2, accepted 2, versions 3, rows 3 bfloat16"
    )
    code, output, _ = command("inspect", run, "--records", "--json")
    records = [json.loads(line) for line in output.splitlines()]
    records = [line for line in records if line["kind"] == "record"]
    assert len(records) == 6
    assert not {"token_ids", "request_id"} & records[0].keys()
    assert "token ids" not in command("inspect", run)[1]
    code, output, _ = command("inspect", run, "--records", "--token-ids")
    assert output.count("token ids [5, 6, 7, 8, 9]") == 6


def test_inspect_shows_what_was_put_aside_and_what_is_no_trace(run):
    backend = open_backend("log:", run)
    with backend.open_trace_writer(LIMITS) as writer:
        writer.append(b"no trace")
    backend.keep_unreadable("header-w1-000000-7", b"12345")
    code, output, _ = command("inspect", run)
    assert code == 1
    assert output.splitlines()[-1] == "quarantine: 1 records, 5 bytes"
    code, output, _ = command("inspect", run, "--records")
    assert "8 bytes, UNREADABLE: header" in output
    assert output.splitlines()[-1] == (
        "quarantine: 1 records, 5 bytes: header-w1-000000-7 (5 bytes)"
    )


def test_inspect_and_stats_take_a_url(run):
    url = f"log:{run}/traces"
    code, output, _ = command("inspect", url)
    assert code == 0
    assert "traces: 6, " in output
    code, output, _ = command("stats", url)
    assert output.startswith("records: 6 written by 1 writers, 6 held")
    assert command("stats", "nope://x")[0] == 2


# ---- identity ------------------------------------------------------------------------------------


def test_the_identity_of_a_record_is_that_of_its_trace(make_trace):
    trace = make_trace(seq=7)
    assert identity_of(encode_trace(trace)) == ("server-1", 1_700_000_000_000, 7)
    record = bytes(encode_trace(trace))
    for damaged in (b"", b"no trace", record[:40], record.replace(b'"seq":7', b'"seq":"')):
        with pytest.raises(UnreadableRecordError):
            identity_of(damaged)
    with pytest.raises(UnreadableRecordError, match="misstates producer, epoch or seq"):
        identity_of(record.replace(b'"epoch":1700000000000', b'"epoch":-700000000000'))
