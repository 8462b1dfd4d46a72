"""A recorder in a process of its own makes the traces that one beside the engine makes, and its end
harms nothing but what it had not written."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from msgspec.structs import replace as replace_in

from buffer.backends import open_backend
from buffer.traces import TraceReader
from configs.checks import check_settings
from configs.schema import Settings
from oracles.engines import Collected, request_of
from serving.build import build_service
from serving.capture import apart
from serving.capture.apart import RecorderProcess, _Line, spawn
from serving.capture.finished import Finished
from serving.capture.messages import frame
from serving.capture.recorder import num_waiting
from serving.capture.shared_counts import SharedCounts, new_counts
from serving.engine.capture_ring import CaptureRing
from serving.engine.captured_rows import CapturedRows
from serving.engine.shared_memory import SharedMemory
from serving.sampling import SamplingParams, trace_values

PROMPT = [40, 41, 42, 43]
SAMPLING = trace_values(SamplingParams())


@pytest.fixture
def serve(tiny_target_dir, tmp_path):
    """Start a service with these settings of ``capture``."""
    started = []

    def start(name="run", url="log:", **capture):
        settings = Settings.model_validate(
            {
                "target": str(tiny_target_dir),
                "run_dir": tmp_path / name,
                "device": "cpu",
                "engine": {"max_batch": 2, "max_model_len": 100, "page_size": 4},
                "policy": {"kind": "fixed", "draft_k": 2},
                "buffer": {"sync_interval_s": 0.02, "url": url},
                "capture": capture,
            }
        )
        service = build_service(settings)
        service.start()
        started.append(service)
        return service

    yield start
    for service in started:
        service.stop()


def ask(service, name, num_tokens=9):
    collected, done = Collected(), threading.Event()

    def take(output):
        collected.take(output)
        if output.finish_reason:
            done.set()

    service.inbox.submit(replace(request_of(name, PROMPT, num_tokens), tenant="acme"), take)
    assert done.wait(60)


def until(is_so, what):
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def without_times(trace):
    """What a trace says, but for what differs from one run to the other."""
    return replace(
        trace,
        producer="",
        epoch=0,
        finished_unix_ms=0,
        rounds=len(trace.rounds),
        features=None,
        token_ids=trace.token_ids.tolist(),
        sampling=dict(trace.sampling.values),
    )


def traces_of(service, folder, names):
    for name in names:
        ask(service, name)
    until(lambda: service.recorder.counts()["written"] == len(names), service.recorder.counts)
    return TraceReader(open_backend("log:", folder)).read(99)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_its_traces_are_those_of_a_recorder_beside_the_engine(serve, tmp_path, dtype):
    beside = traces_of(serve("beside", process=False, dtype=dtype), tmp_path / "beside", "abc")
    service = serve("apart", process=True, dtype=dtype)
    assert isinstance(service.recorder, RecorderProcess)
    found = traces_of(service, tmp_path / "apart", "abc")

    assert [without_times(t) for t in found] == [without_times(t) for t in beside]
    for one, other in zip(found, beside, strict=True):
        assert one.features.rows.tobytes() == other.features.rows.tobytes()
        assert one.features.positions.tolist() == other.features.positions.tolist()
        assert [(r.anchor, r.draft_ids, r.next_id, r.drafter, r.policy) for r in one.rounds] == [
            (r.anchor, r.draft_ids, r.next_id, r.drafter, r.policy) for r in other.rounds
        ]
    assert service.figures().capture_rows_dropped == 0


def test_rows_that_the_ring_has_overwritten_are_counted(serve, tmp_path):
    """A ring that is smaller than one request: the rows that are left are used."""
    service = serve(process=True, ring_rows=1)
    capacity = service.engine.programs.ring._capacity
    ask(service, "long", 90)
    until(lambda: service.recorder.counts()["written"] == 1, service.recorder.counts)
    (trace,) = TraceReader(open_backend("log:", tmp_path / "run")).read(9)
    lost = 93 - len(trace.features.positions)
    assert capacity < 9000 and service.figures().capture_rows_dropped == lost


def test_a_recorder_that_is_killed_is_started_again_and_what_it_had_is_counted(serve, tmp_path):
    service = serve(process=True)
    recorder = service.recorder
    ask(service, "first")
    until(lambda: recorder.counts()["written"] == 1, recorder.counts)
    former = recorder.pid
    os.kill(former, signal.SIGSTOP)  # it reads nothing any more
    for name in "abc":
        ask(service, name)
    assert num_waiting(recorder.counts()) == 3
    os.kill(former, signal.SIGKILL)
    until(lambda: recorder._line is None, "its end to be noticed")
    ask(service, "last")  # for the next one
    until(lambda: num_waiting(recorder.counts()) == 0, recorder.counts)
    assert recorder.pid != former

    counts = recorder.counts()
    assert (counts["queued"], counts["dropped"], num_waiting(counts)) == (5, 3, 0)
    traces = TraceReader(open_backend("log:", tmp_path / "run")).read(9)
    assert {(trace.request_id, trace.seq) for trace in traces} == {("first", 0), ("last", 4)}


def test_processes_that_die_at_once_are_started_ever_more_rarely(serve, monkeypatch, caplog):
    """What finishes meanwhile is kept, up to ``capture.queue_traces``."""
    monkeypatch.setattr(apart, "_FIRST_PAUSE_S", 0.001)
    service = serve(process=True, queue_traces=2)
    recorder = service.recorder
    good = apart.COMMAND
    monkeypatch.setattr(apart, "COMMAND", ["-c", "raise SystemExit(3)"])
    former = recorder.pid
    os.kill(former, signal.SIGKILL)
    until(lambda: "recorder's processes in a row died" in caplog.text, "a line in the log")
    for name in "abc":
        ask(service, name)
    assert recorder.counts()["dropped"] == 1 and num_waiting(recorder.counts()) == 2
    monkeypatch.setattr(apart, "COMMAND", good)
    until(lambda: recorder.counts()["written"] == 2, recorder.counts)
    assert "ended with exit code 3 before it could write traces" in caplog.text


def test_starting_is_never_given_up(serve, monkeypatch, caplog):
    """Also where the system starts no process, and after any number of deaths."""
    assert apart._pause_s(1) == apart._FIRST_PAUSE_S
    assert apart._pause_s(5000) == apart._LONGEST_PAUSE_S

    monkeypatch.setattr(apart, "_FIRST_PAUSE_S", 0.001)
    service = serve(process=True)
    recorder = service.recorder
    good = sys.executable
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    os.kill(recorder.pid, signal.SIGKILL)
    until(lambda: "/no/such/python" in caplog.text, "a start that fails")
    ask(service, "a")
    monkeypatch.setattr(sys, "executable", good)
    until(lambda: recorder.counts()["written"] == 1, recorder.counts)


def test_what_was_deleted_while_it_waited_for_a_process_is_not_written(
    serve, tmp_path, monkeypatch
):
    monkeypatch.setattr(apart, "_FIRST_PAUSE_S", 0.001)
    service = serve(process=True)
    recorder = service.recorder
    ask(service, "a")
    until(lambda: recorder.counts()["written"] == 1, recorder.counts)
    good = apart.COMMAND
    monkeypatch.setattr(apart, "COMMAND", ["-c", "raise SystemExit(3)"])
    os.kill(recorder.pid, signal.SIGKILL)
    until(lambda: recorder._line is None, "its end to be noticed")
    ask(service, "b")
    assert open_backend("log:", tmp_path / "run").delete("acme").records == 1
    monkeypatch.setattr(apart, "COMMAND", good)
    until(lambda: num_waiting(recorder.counts()) == 0, recorder.counts)
    counts = recorder.counts()
    assert (counts["queued"], counts["written"], counts["deleted"]) == (2, 1, 1)


def test_stopping_ends_a_process_that_is_being_started(serve, monkeypatch):
    """What is kept for it counts as dropped, once."""
    service = serve(process=True)
    recorder = service.recorder
    former = recorder.pid
    monkeypatch.setattr(apart, "COMMAND", ["-c", "import time; time.sleep(600)"])
    os.kill(former, signal.SIGKILL)
    until(lambda: recorder._line is None, "its end to be noticed")
    ask(service, "a")
    until(lambda: recorder.pid != former, "another process")
    recorder.close(5.0)
    assert not recorder._keeper.is_alive()
    with pytest.raises(ProcessLookupError):
        os.kill(recorder.pid, 0)
    assert recorder.counts()["dropped"] == 1 and num_waiting(recorder.counts()) == 0
    recorder.put(finished(5))
    assert recorder.counts()["dropped"] == 2, "so does what comes after that"


def test_what_no_message_can_hold_is_counted_and_harms_no_request(tmp_path, caplog):
    """``put`` is called by the engine's thread."""
    ring = CaptureRing(64, 1, 16, is_shared=True)
    settings = Settings.model_validate({"target": "none", "run_dir": tmp_path})
    recorder = RecorderProcess(settings, ring.shared, (1,), spawn())
    good = finished(5)
    recorder.put(replace_in(good, tenant="\ud800"))
    recorder.put(replace_in(good, rounds=[("a", 0, 0, 1.0, 1, 0.1, Fraction(1, 3)), 1, 0, 0, 0, 1]))
    recorder.put(good)
    recorder.close(60)
    counts = recorder.counts()
    assert (counts["queued"], counts["failed"], counts["written"]) == (3, 2, 1)
    assert caplog.text.count("cannot be sent") == 1


def test_settings_that_cannot_be_used_are_refused_before_serving(serve, tmp_path):
    key = tmp_path / "key"
    key.write_bytes(os.urandom(32))
    serve("run", process=True)
    until(lambda: (tmp_path / "run" / "traces").exists(), "a log")
    with pytest.raises(ValueError, match="no_such_module"):
        serve("other", process=True, redact="no_such_module:function")
    with pytest.raises(ValueError, match="key"):
        serve("run", url=f"log:?key_file={tmp_path / 'none'}", process=True)


def test_memory_of_one_process_is_refused():
    """Nobody could read the traces that the recorder's process writes there."""
    buffer = {"url": "memory:"}
    for wanted, problems in ((True, 1), (False, 0), (None, 0)):
        settings = Settings.model_validate({"buffer": buffer, "capture": {"process": wanted}})
        found = check_settings(settings)
        assert len(found) == problems
    off = {"process": True, "enabled": False}
    assert check_settings(Settings.model_validate({"buffer": buffer, "capture": off})) == []


def test_a_process_that_dies_at_the_start_is_an_error_that_is_shown(serve, monkeypatch):
    """``launch`` prints the message of an OSError. It says how the process ended, even though that
    takes Python a moment after the connection."""
    code = (
        "import os, sys, time; border = int(sys.argv[1]); os.read(border, 1); os.close(border); "
        "time.sleep(0.2); sys.exit(3)"
    )
    monkeypatch.setattr(apart, "COMMAND", ["-c", code])
    with pytest.raises(OSError, match="ended with exit code 3 before it could write traces"):
        serve(process=True)


def test_a_function_that_redacts_runs_there(serve, tmp_path, monkeypatch):
    (tmp_path / "hooks_apart.py").write_text(
        "import os\n"
        "from dataclasses import replace\n"
        "def name(trace):\n"
        "    return replace(trace, tenant=f'process {os.getpid()}')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    service = serve(process=True, redact="hooks_apart:name")
    (trace,) = traces_of(service, tmp_path / "run", "a")
    assert trace.tenant == f"process {service.recorder.pid}"


def test_stopping_writes_what_was_sent(serve, tmp_path):
    service = serve(process=True)
    os.kill(service.recorder.pid, signal.SIGSTOP)
    for name in "abcd":
        ask(service, name)
    os.kill(service.recorder.pid, signal.SIGCONT)
    service.stop()
    assert service.recorder.counts()["written"] == 4
    assert len(TraceReader(open_backend("log:", tmp_path / "run")).read(9)) == 4


def test_what_a_process_that_hangs_has_not_written_is_counted(serve, caplog):
    service = serve(process=True)
    recorder = service.recorder
    os.kill(recorder.pid, signal.SIGSTOP)
    ask(service, "a")
    began_s = time.monotonic()
    recorder.close(0.2)
    assert time.monotonic() - began_s < 20
    assert recorder.counts()["dropped"] == 1 and "1 traces were not written" in caplog.text


def test_when_the_server_is_gone_what_it_sent_is_written(tmp_path):
    """A process that is killed closes its connections, and says nothing."""
    ring = CaptureRing(64, 1, 16, is_shared=True)
    settings = Settings.model_validate({"target": "none", "run_dir": tmp_path})
    spawned = spawn()
    recorder = RecorderProcess(settings, ring.shared, (1,), spawned)
    os.kill(recorder.pid, signal.SIGSTOP)
    for number in range(3):
        recorder.put(finished(5, number))
    spawned.sock.shutdown(socket.SHUT_RDWR)
    os.kill(recorder.pid, signal.SIGCONT)
    assert spawned.process.wait(60) == 0
    assert recorder.counts()["written"] == 3
    assert len(TraceReader(open_backend("log:", tmp_path)).read(9)) == 3
    recorder.close(0.1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_ring_can_be_read_through_its_descriptor(device, dtype):
    """Also by a process that has no torch; on a GPU programs write to pinned memory."""
    ring = CaptureRing(50, 2, 16, device, dtype, is_shared=True)
    shared = ring.shared
    reader = CapturedRows.mapped(shared.memory.descriptor, shared.shape, shared.dtype)
    luck = torch.Generator().manual_seed(0)
    pieces = []
    for position, count in ((0, 30), (30, 15), (45, 9)):
        rows = torch.randn((count, 16), generator=luck).to(device)
        twice = torch.stack([rows, rows * 2], dim=1)
        one, none = torch.tensor([count], device=device), torch.zeros(1, device=device)
        ring.append(twice, rows, one, none, none)
        pieces += (position, ring.number([count])[0], count)
    if device == "cuda":
        torch.cuda.synchronize()

    (own, lost), (theirs, lost_there) = ring.read(pieces), reader.read(pieces)
    assert lost == lost_there == 4 and len(own.rows) == 50
    assert own.rows.tobytes() == theirs.rows.tobytes() and own.rows.any()
    assert (own.scales is None) == (theirs.scales is None) == (dtype == "bfloat16")
    assert own.scales is None or own.scales.tobytes() == theirs.scales.tobytes()
    last = torch.from_numpy(theirs.rows[-1, -1])
    bits = torch.bfloat16 if dtype == "bfloat16" else torch.float8_e4m3fn
    scale = 1.0 if theirs.scales is None else float(theirs.scales[-1, -1])
    torch.testing.assert_close(
        last.view(bits).float() * scale, rows[-1].float().cpu(), atol=0.1, rtol=0.07
    )


def test_memory_that_cannot_be_shared_is_given_back():
    """As where the driver refuses to pin it."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError):
        SharedMemory(0)
    assert len(os.listdir("/proc/self/fd")) == before


def finished(size, seq=0):
    fields = "p", 1, "f" * 64, seq, 0, "r", "t", SAMPLING, 1, [1] * size, [], True
    return Finished(*fields, [], [], [], [], [], [])


def test_a_socket_that_is_full_delays_nobody_and_the_oldest_are_dropped():
    own, other = socket.socketpair()
    own.setblocking(False)
    line = _Line(own, most_waiting=3)
    data = [frame(finished(50_000 + number)) for number in range(40)]
    began_s = time.monotonic()
    dropped = sum(line.put(one) for one in data)
    assert time.monotonic() - began_s < 5
    assert 0 < dropped < 40
    found = bytearray()
    other.settimeout(20)
    expected = sum(map(len, data[:1]))
    while len(found) < expected:
        found += other.recv(1 << 20)
    left_s = time.monotonic() + 20
    while line._waiting and time.monotonic() < left_s:
        other.setblocking(False)
        try:
            found += other.recv(1 << 20)
        except BlockingIOError:
            time.sleep(0.001)
    other.setblocking(False)
    while True:
        try:
            found += other.recv(1 << 20)
        except BlockingIOError:
            break
    messages, at = [], 0
    while at < len(found):
        size = 4 + int.from_bytes(found[at : at + 4], "big")
        messages.append(bytes(found[at : at + size]))
        at += size
    assert len(messages) == 40 - dropped
    assert [one for one in data if one in messages] == messages, "whole, and in order"
    assert messages[-1] == data[-1], "the newest are kept"
    line.close()
    other.close()


class _Slow:
    """A socket whose ``send`` takes until ``goes_on`` is set, once it has taken some bytes."""

    def __init__(self, sock):
        self._sock = sock
        self.fileno, self.close = sock.fileno, sock.close
        self.is_busy, self.goes_on = threading.Event(), threading.Event()
        self._num_sent = 0

    def send(self, data):
        self._num_sent += 1
        if self._num_sent == 1:
            return 1
        self.is_busy.set()
        assert self.goes_on.wait(60)
        return self._sock.send(data)


def test_nobody_who_puts_waits_for_the_thread_that_sends():
    own, other = socket.socketpair()
    slow = _Slow(own)
    line = _Line(slow, most_waiting=9)
    line.put(b"abc")
    assert slow.is_busy.wait(60)
    putting = threading.Thread(target=line.put, args=(b"def",), daemon=True)
    putting.start()
    putting.join(5)
    was_held_up = putting.is_alive()
    slow.goes_on.set()
    assert not was_held_up
    other.settimeout(60)
    found = b""
    while len(found) < 5:
        found += other.recv(9)
    assert found == b"bcdef"  # the first byte was taken by ``_Slow``
    line.close()
    other.close()


def test_counts_are_all_of_one_time():
    """While they are written, and when the writer was killed in between."""
    descriptor = new_counts()
    counts, theirs = SharedCounts(descriptor), SharedCounts(descriptor)
    stop = threading.Event()

    def write():
        number = 0
        while not stop.is_set():
            number += 1
            theirs.write({"written": number, "lost_rows": number})

    thread = threading.Thread(target=write)
    thread.start()
    for _ in range(3000):
        found = counts.read()
        assert found["written"] == found["lost_rows"]
    stop.set()
    thread.join()
    last = counts.read()

    class Killed(dict):
        def get(self, name, default=None):
            if name == "failed":
                raise KeyboardInterrupt
            return 77

    with pytest.raises(KeyboardInterrupt):
        theirs.write(Killed())
    assert counts.read() == last
    assert SharedCounts(descriptor).read() == last, "also who reads for the first time"
    counts.write({"written": 5})
    assert theirs.read()["written"] == 5
