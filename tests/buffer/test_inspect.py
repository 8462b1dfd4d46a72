"""``buffer inspect`` tells a sound run from a damaged one, in its output and its exit code."""

import dataclasses
import json
import os

import numpy as np
import pytest
from typer.testing import CliRunner

from buffer.backends import open_backend
from buffer.cli import app, inspect_backend
from buffer.codec import encode_trace
from buffer.folder_weights import FolderWeights
from buffer.interface import TraceLimits
from buffer.records import Manifest
from buffer.tensors import join_tensors

LIMITS = TraceLimits(segment_bytes=1 << 16, max_bytes=1 << 22, ttl_s=3600.0, sync_interval_s=0.0)


@pytest.fixture
def run(tmp_path, make_trace):
    """A run folder with three traces and two versions."""
    with open_backend("log:", tmp_path).open_trace_writer(LIMITS) as writer:
        for seq, tenant in enumerate(["acme", "acme", "umbrella"]):
            writer.append(encode_trace(make_trace(seq=seq, tenant=tenant)))
    blob = join_tensors({"w": ("F32", np.ones(4, np.float32))}, {})
    manifest = Manifest(0, None, "eagle3", {}, "target", {}, gate={"tokens_per_step": 2.5})
    for version, parent in ((0, None), (1, 0)):
        one = dataclasses.replace(manifest, version=version, parent=parent)
        FolderWeights(tmp_path / "weights").publish(one, {"drafter.safetensors": blob})
    return tmp_path


def inspect(*arguments):
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    return result.exit_code, result.stdout


def test_a_sound_run_is_summed_up(run):
    code, output = inspect(run)
    segment, log, traces, *bundles = output.splitlines()

    assert code == 0
    assert segment.startswith("segment w")
    assert "/000000: 3 records, " in segment
    assert segment.endswith("bytes, torn 0 bytes, damaged 0")
    num_bytes = segment.split(", ")[1].removesuffix(" bytes")
    assert log.startswith(f"log: {num_bytes} bytes in 1 segments, written at ")
    assert log.endswith(" bytes (an hour of traffic, disk permitting)")
    assert traces == (
        "traces: 3, tokens 6 prompt + 9 completion, tokens_per_step 2.000, "
        "tenants: acme 2, umbrella 1; unreadable: none"
    )
    assert bundles == [
        "bundle 0: parent none, gate: tokens_per_step 2.500; ok",
        "bundle 1: parent 0, gate: tokens_per_step 2.500; ok",
    ]


def test_json_output_is_one_object_per_line(run):
    code, output = inspect(run, "--json")
    lines = [json.loads(line) for line in output.splitlines()]

    assert code == 0
    assert [line["kind"] for line in lines] == ["segment", "log", "traces", "bundle", "bundle"]
    assert lines[0]["records"] == lines[2]["traces"] == 3
    assert lines[2]["tenants"] == {"acme": 2, "umbrella": 1}
    assert lines[2]["tokens_per_step"] == 2.0
    assert lines[4] == {
        "kind": "bundle",
        "version": 1,
        "parent": 0,
        "gate": {"tokens_per_step": 2.5},
        "problem": None,
        "line": "",
    }


def test_a_damaged_trace_is_an_exit_code_of_1(run):
    path = next(run.glob("traces/*/*.seg"))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    code, output = inspect(run)
    assert code == 1
    assert "2 records" in output
    assert "damaged 1" in output


def test_a_record_that_is_no_trace_is_an_exit_code_of_1(run):
    with open_backend("log:", run).open_trace_writer(LIMITS) as writer:
        writer.append(b"no trace")
    code, output = inspect(run)
    assert code == 1
    assert "unreadable: header 1" in output
    assert not (run / "traces" / "quarantine").exists()


def test_a_damaged_bundle_is_an_exit_code_of_1_and_is_named(run):
    os.truncate(run / "weights" / "1" / "drafter.safetensors", 10)
    code, output = inspect(run)
    assert code == 1
    assert "bundle 0: parent none, gate: tokens_per_step 2.500; ok" in output
    assert "bundle 1: parent 0, gate: tokens_per_step 2.500; DAMAGED: " in output
    (run / "weights" / "1" / "manifest.json").unlink()
    code, output = inspect(run)
    assert code == 1
    assert "bundle 1: parent none, gate: no figures; DAMAGED: " in output


def test_a_torn_tail_is_told_and_is_no_damage(run):
    path = next(run.glob("traces/*/*.seg"))
    with path.open("ab") as file:
        file.write(b"\xf5\xaa\xd7")
    code, output = inspect(run)
    assert code == 0
    assert "torn 3 bytes" in output


def test_an_empty_run_is_fine(tmp_path):
    code, output = inspect(tmp_path)
    assert (code, output) == (
        0,
        "traces: 0, tokens 0 prompt + 0 completion, tokens_per_step unknown, tenants: none; "
        "unreadable: none\n",
    )


def test_a_folder_that_does_not_exist_is_wrong_usage(tmp_path):
    assert inspect(tmp_path / "nope")[0] == 2


def test_the_url_of_the_settings_is_followed(run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (run / "traces").rename(elsewhere)
    assert inspect(run)[1].splitlines()[0].startswith("traces: 0, ")
    code, output = inspect(run, "--set", f"buffer.url=log:{elsewhere}")
    assert code == 0
    assert output.splitlines()[2].startswith("traces: 3, ")


def test_the_run_folder_of_the_settings_is_the_default(run, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(f"run_dir: {run}\n")
    assert inspect("--config", config) == inspect(run)


@pytest.mark.parametrize(
    "setting", ["buffer.url=nope:", "buffer.url=log:relative", "buffer.ur=log:"]
)
def test_settings_that_name_no_buffer_are_wrong_usage(run, setting):
    assert inspect(run, "--set", setting)[0] == 2


def test_python_m_buffer_is_the_same_command_and_needs_no_torch(run, start_python):
    code = (
        "import runpy, sys; sys.argv = ['buffer', 'inspect', sys.argv[1]]\n"
        "try: runpy.run_module('buffer', run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    process = start_python(code, run)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.splitlines()[-1] == "False"
    assert output.startswith("segment w")


def test_stats_count_records_and_what_each_group_has_done(run):
    backend = open_backend("log:", run)
    member = backend.open_record_reader(group="trainer")
    assert len(member.read(2)) == 2
    member.commit(member.offsets())
    member.close()

    result = CliRunner().invoke(app, ["stats", str(run)])
    assert result.exit_code == 0, result.output
    records, group = result.stdout.splitlines()
    assert records.startswith("records: 3 written by 1 writers, 3 held, ")
    assert group == "group trainer: 2 committed, 1 pending, 0 lost"
    result = CliRunner().invoke(app, ["stats", str(run), "--json"])
    assert [json.loads(line)["kind"] for line in result.stdout.splitlines()] == ["records", "group"]


def test_a_buffer_that_cannot_be_reached_is_named_without_its_password(tmp_path):
    url = "buffer.url=redis://me:s3cret@127.0.0.1:1/0"
    for command in ("stats", "inspect"):
        result = CliRunner().invoke(app, [command, str(tmp_path), "--set", url])
        assert result.exit_code == 2
        assert "redis://127.0.0.1:1/0" in result.output
        assert "s3cret" not in result.output


def test_damaged_lists_of_versions_and_deletions_are_told(run):
    (run / "weights" / "HIGHEST").write_text("soon\n")
    (run / "traces" / "DELETED.json").write_text("[")
    code, output = inspect(run)
    deletions, versions = output.splitlines()[-2:]

    assert code == 1
    assert deletions.startswith("DAMAGED: ") and "DELETED.json" in deletions
    assert versions.startswith("DAMAGED: ") and "HIGHEST" in versions
    assert inspect(run, "--json")[1].count('"kind": "problem"') == 2


@pytest.mark.parametrize("url", ["log:", "shm:"])
def test_versions_of_every_drafter_are_listed_and_checked(run, url):
    beside = FolderWeights(run / "weights" / "mtp")
    blob = join_tensors({"w": ("F32", np.ones(4, np.float32))}, {})
    for version in (0, 1):
        one = Manifest(version, None, "mtp", {}, "target", {})
        beside.publish(one, {"drafter.safetensors": blob})

    code, output = inspect(run, "--set", f"buffer.url={url}")
    assert code == 0
    lines = [line for line in output.splitlines() if line.startswith("bundle mtp/")]
    assert lines == [
        "bundle mtp/0: parent none, gate: no figures; ok",
        "bundle mtp/1: parent none, gate: no figures; ok",
    ]

    damaged = run / "weights" / "mtp" / "1" / "drafter.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    code, output = inspect(run, "--json")
    assert code == 1
    found = [one for one in map(json.loads, output.splitlines()) if one["kind"] == "bundle"]
    assert [(one["line"], one["version"], one["problem"] is None) for one in found] == [
        ("", 0, True), ("", 1, True), ("mtp", 0, True), ("mtp", 1, False),
    ]  # fmt: skip


def test_versions_of_a_drafter_in_memory_are_found_by_the_settings(run):
    """As in Redis and Kafka, which cannot list the drafters of a run."""
    backend = open_backend("memory:inspected", run)
    blob = join_tensors({"w": ("F32", np.ones(4, np.float32))}, {})
    backend.open_weights("mtp").publish(
        Manifest(0, None, "mtp", {}, "target", {}), {"drafter.safetensors": blob}
    )
    reports = [one.to_line() for one in inspect_backend(backend, LIMITS, beside=["mtp"])]
    assert "bundle mtp/0: parent none, gate: no figures; ok" in reports
