"""Storage that cannot be opened costs the records, which are counted, and is tried again."""

from __future__ import annotations

import pytest

from buffer.backends import open_backend
from buffer.codec import encode_trace
from buffer.interface import TraceLimits
from buffer.late_writer import LateWriter
from buffer.traces import TraceReader

LIMITS = TraceLimits(1 << 20, 1 << 24, 3600.0, 0.0)


def test_records_are_refused_until_the_folder_is_mended(tmp_path, make_trace):
    traces = tmp_path / "traces"
    traces.symlink_to("traces")
    backend = open_backend("log:", tmp_path)
    with pytest.raises(OSError, match="symbolic links"):
        backend.open_trace_writer(LIMITS)
    writer = LateWriter(lambda: backend.open_trace_writer(LIMITS))
    records = [encode_trace(make_trace(seq=seq)) for seq in range(3)]
    assert len(writer.append_all(records)) == 3
    assert (writer.counts.appended, writer.tend(), writer.sync()) == (0, range(0), range(0))
    with pytest.raises(OSError, match="symbolic links"):
        writer.append(records[0])

    traces.unlink()
    assert writer.append_all([]) == [] and not traces.exists()
    assert writer.append_all(records[:2]) == []
    assert writer.sync() == range(2)
    assert (writer.append(records[2]), writer.counts.appended) == (2, 3)
    writer.close()
    assert [trace.seq for trace in TraceReader(backend).read(10)] == [0, 1, 2]


def test_a_log_with_another_key_is_not_written_either(tmp_path):
    """Nobody may open it while the folder is away; its key may be another when it is back."""

    def refused():
        raise ValueError("the key is not that of the log")

    errors = LateWriter(refused).append_all([b"a", b"b"])
    assert [str(error) for error in errors] == ["the key is not that of the log"] * 2
