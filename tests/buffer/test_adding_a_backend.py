"""A new backend is one new file and one line of the catalog."""

import pytest

from oracles.one_line import run_in, with_addition

JSON_LINES = '''
"""Traces in one file of JSON lines, weights in one folder per version."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from buffer.counts import BufferStats, ReaderCounts, WriterCounts
from buffer.folder_weights import FolderWeights
from buffer.interface import MAX_READ_BYTES, Backend, Record, RecordReader, TraceWriter


class JsonLines(Backend):
    def __init__(self, url, run_dir):
        self.file = run_dir / url.removeprefix("jsonl:")
        self.weights = run_dir / "weights"

    def open_trace_writer(self, limits):
        return Writer(self.file)

    def open_record_reader(self, offsets=None, group=None):
        return Reader(self.file, offsets, group)

    def keep_unreadable(self, name, payload):
        pass

    def open_weights(self, line=""):
        return FolderWeights(self.weights)

    def stats(self):
        num_lines = self.file.read_bytes().count(b"\\n")
        return BufferStats(1, num_lines, num_lines, self.file.stat().st_size, ())

    def reports(self, limits):
        return ()


class Writer(TraceWriter):
    name = "only"

    def __init__(self, path):
        self._file = path.open("a")
        self._appended = self._durable = 0

    @property
    def counts(self):
        return WriterCounts(
            self._appended, self._durable, self._appended - self._durable, 0, 0, 0
        )

    def append(self, payload):
        self._file.write(json.dumps(base64.b64encode(payload).decode()) + "\\n")
        self._appended += 1
        return self._appended - 1

    def sync(self):
        self._file.flush()
        newly = range(self._durable, self._appended)
        self._durable = self._appended
        return newly

    tend = sync

    def close(self):
        self.sync()
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.close()


class Reader(RecordReader):
    def __init__(self, path, offsets, group):
        self._path, self._read = path, 0
        self._mark = None if group is None else path.with_suffix("." + group)
        committed = json.loads(self._mark.read_text()) if self._mark and self._mark.exists() else {}
        self._byte = (offsets or committed).get("byte", 0)

    @property
    def counts(self):
        return ReaderCounts(read=self._read)

    def offsets(self):
        return {"byte": self._byte}

    def read(self, max_records, max_bytes=MAX_READ_BYTES):
        records = []
        with self._path.open("rb") as file:
            file.seek(self._byte)
            while len(records) < max_records and (line := file.readline()):
                payload = base64.b64decode(json.loads(line))
                records.append(Record(payload, "only", str(self._byte)))
                self._byte = file.tell()
        self._read += len(records)
        return records

    def commit(self, offsets):
        if self._mark is None:
            raise ValueError("a reader without a group has nothing to commit")
        self._mark.write_text(json.dumps(offsets))
'''

LINE = '    "jsonl": "buffer.json_lines:JsonLines",'

SERVER_AND_TRAINER = """
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from buffer.backends import open_backend
from buffer.codec import encode_trace
from buffer.interface import TraceLimits
from buffer.records import Manifest, Rounds, Sampling, Trace
from buffer.tensors import join_tensors
from buffer.traces import TraceReader

run_dir = Path(sys.argv[1])
limits = TraceLimits(segment_bytes=4096, max_bytes=1 << 20, ttl_s=60.0, sync_interval_s=0.0)
sampling = Sampling({"temperature": 0.0})
ids = np.arange(5, dtype=np.int32)
trace = Trace("server", 1, 0, "cmpl-1", "acme", "ab" * 32, sampling, 2, ids, Rounds.of(), None, 7)

server = open_backend("jsonl:traces.jsonl", run_dir)
with server.open_trace_writer(limits) as writer:
    for seq in range(3):
        writer.append(encode_trace(replace(trace, seq=seq)))
    writer.tend()
    print("durable", writer.counts.durable)

trainer = open_backend("jsonl:traces.jsonl", run_dir)
reader = TraceReader(trainer, group="trainer")
print("read", [one.seq for one in reader.read(2)])
print("again", [one.seq for one in TraceReader(trainer, group="trainer").read(2)])
reader.commit(reader.offsets())
print("read", [one.seq for one in TraceReader(trainer, group="trainer").read(9)])
print("stored", trainer.stats().held)

blob = join_tensors({"w": ("F32", np.ones(4, np.float32))}, {})
manifest = Manifest(0, None, "eagle3", {}, "ab" * 32, {})
trainer.open_weights().publish(manifest, {"drafter.safetensors": blob})
bundle, passed_over = server.open_weights().newest_sound()
print("serving", bundle.manifest.version, passed_over)
"""


@pytest.fixture
def root(tmp_path):
    return with_addition(
        tmp_path, "buffer/json_lines.py", JSON_LINES, "buffer/backends.py", LINE, after='"log": '
    )


def test_a_backend_of_one_file_and_one_line_carries_traces_and_weights(root, tmp_path):
    done = run_in(root, SERVER_AND_TRAINER, str(tmp_path))

    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "durable 3",
        "read [0, 1]",
        "again [0, 1]",
        "read [2]",
        "stored 3",
        "serving 0 []",
    ]
    assert len((tmp_path / "traces.jsonl").read_text().splitlines()) == 3


def test_buffer_inspect_reads_the_new_backend_from_the_settings(root, tmp_path):
    run_in(root, SERVER_AND_TRAINER, str(tmp_path))
    code = "from buffer.cli import app; app()"
    url = "buffer.url=jsonl:traces.jsonl"

    done = run_in(root, code, "inspect", str(tmp_path), "--set", url)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "traces: 3, tokens 6 prompt + 9 completion, tokens_per_step unknown, "
        "tenants: acme 3; unreadable: none",
        "bundle 0: parent none, gate: no figures; ok",
    ]


def test_without_the_line_the_scheme_is_unknown(tmp_path):
    root = with_addition(
        tmp_path, "buffer/json_lines.py", JSON_LINES, "buffer/backends.py", "", after='"log": '
    )
    done = run_in(root, SERVER_AND_TRAINER, str(tmp_path))
    assert "buffer.url cannot be used: scheme 'jsonl' is unknown" in done.stderr
