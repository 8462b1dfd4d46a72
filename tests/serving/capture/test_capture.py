"""Captured rows are the target's hidden rows; positions that were not computed are absent."""

from __future__ import annotations

import copy
import random
import threading
import time

import pytest
import torch

from buffer.backends import open_backend
from buffer.codec import decode_trace
from buffer.interface import TraceLimits
from buffer.memory import MemoryWriter
from buffer.memory_held import Held
from buffer.records import Round
from buffer.segment_writer import SegmentWriter
from buffer.traces import TraceReader
from oracles.engines import make_engine, random_model, request_of, run
from serving.capture.recorder import Recorder, num_waiting
from serving.capture.rounds import round_columns
from serving.capture.traces import Producer, TraceMaker
from serving.engine.capture_ring import CaptureRing
from serving.engine.loop import Engine, Listeners
from serving.engine.noted_rounds import NotedRounds, NotedStep
from serving.engine.sequence import Sequence
from serving.requests import Request, SamplingParams

PROMPT = list(range(30))
NEITHER = {"withheld": 0, "deleted": 0, "missing": 0}


@pytest.fixture(params=[False, True], ids=["waits", "overlaps"])
def overlaps(request):
    """Whether rounds are launched before the last one is read."""
    return request.param


def capturing(engine):
    """The engine again with a trace maker that listens to it, and what that makes."""
    programs = engine.programs
    maker = TraceMaker(Producer("test", 1, "f" * 64), programs.ring, programs.target.layer_ids)
    made = []
    listeners = Listeners(on_finished=lambda sequence: made.append(maker.finished(sequence)))
    return Engine(engine.parts, engine.policy, listeners), maker, made


def traces_of(engine, requests):
    """Run and return each request's trace after a round trip through the codec."""
    engine, maker, made = capturing(engine)
    run(engine, requests)
    records = [record for make in made if (record := make()) is not None]
    traces = [decode_trace(record) for record in records]
    return {t.request_id: t for t in traces}, maker.num_lost_rows


def hidden_rows(model, token_ids, layer_ids):
    """[T, m + 1, H] of the plain model: tapped layers, then the lm_head's input."""
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("sdpa")
    with torch.no_grad():
        out = reference.model(torch.tensor([token_ids]), output_hidden_states=True)
    taps = [out.hidden_states[k][0] for k in layer_ids]
    return torch.stack([*taps, out.last_hidden_state[0]], dim=1)


def restored(features):
    bits = torch.from_numpy(features.rows)
    if features.dtype == "bfloat16":
        return bits.view(torch.bfloat16).float()
    return bits.view(torch.float8_e4m3fn).float() * torch.from_numpy(features.scale)[..., None]


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-8), ("float8_e4m3fn", 2**-4)])
def test_rows_equal_the_models_hidden_states(dtype, tolerance, overlaps):
    model = random_model("qwen3")
    engine = make_engine(
        model, prefix_cache=False, overlaps=overlaps, max_batch=4, ring_dtype=dtype
    )
    requests = [request_of(str(i), [*PROMPT, i], 20 + i, capture=i % 3 != 1) for i in range(9)]

    traces, lost = traces_of(engine, requests)

    assert set(traces) == {str(i) for i in range(9) if i % 3 != 1}

    for trace in traces.values():
        tokens = trace.token_ids.tolist()
        want = hidden_rows(model, tokens, trace.features.layer_ids)[:-1]
        assert trace.features.positions.tolist() == list(range(len(tokens) - 1))
        got = restored(trace.features)
        scale = want.abs().amax(-1, keepdim=True)
        assert ((got - want).abs() / scale).max() < tolerance
    assert lost == 0


def test_rows_of_cached_prefix_pages_are_absent_not_invented(overlaps):
    model = random_model("qwen3")
    engine = make_engine(model, prefill_chunk=7, overlaps=overlaps)
    traces_of(engine, [request_of("first", [*PROMPT, 50], 8)])

    traces, _ = traces_of(engine, [request_of("second", [*PROMPT, 60], 8)])

    second = traces["second"]
    assert second.features.positions.tolist() == list(range(28, len(second.token_ids) - 1))
    want = hidden_rows(model, second.token_ids.tolist(), second.features.layer_ids)[28:-1]
    torch.testing.assert_close(restored(second.features), want, atol=0.05, rtol=0.01)


def test_rounds_tell_the_whole_completion(overlaps):
    engine = make_engine(random_model("qwen3"), overlaps=overlaps)
    traces, _ = traces_of(engine, [request_of("a", PROMPT, 25), request_of("b", [1, 2], 25)])

    for trace in traces.values():
        tokens = trace.token_ids.tolist()
        position = trace.rounds[0].anchor
        assert position == trace.prompt_length, "the first token came from prefill"
        for one in trace.rounds:
            assert one.anchor == position
            emitted = [*one.draft_ids[: one.num_accepted], one.next_id]
            assert tokens[position + 1 : position + 1 + len(emitted)] == emitted[: len(tokens)]
            position += len(emitted)


def test_a_request_that_opts_out_leaves_no_trace(overlaps):
    engine = make_engine(random_model("qwen3"), overlaps=overlaps)
    traces, _ = traces_of(
        engine, [request_of("in", PROMPT, 9), request_of("out", PROMPT, 9, capture=False)]
    )
    assert set(traces) == {"in"}


def test_rows_overwritten_in_the_ring_are_counted_and_masked(overlaps):
    engine = make_engine(
        random_model("qwen3"), ring_rows=216, prefix_cache=False, overlaps=overlaps
    )
    traces, lost = traces_of(engine, [request_of("long", PROMPT, 200)])

    features = traces["long"].features
    assert lost == 229 - len(features.positions) > 0
    assert features.positions.tolist() == list(range(229 - len(features.positions), 229))


def test_a_recorder_that_is_late_skips_traces_instead_of_writing_all_with_holes(tmp_path):
    engine, maker, made = capturing(
        make_engine(random_model("qwen3"), ring_rows=442, prefix_cache=False)
    )
    # 50 rows each. Rounds and prompts under way may overwrite 186, so 5 requests are held.
    run(engine, [request_of(str(i), [*PROMPT, i], 20) for i in range(8)])
    backend = open_backend("memory:late", tmp_path)
    limits = TraceLimits(segment_bytes=1 << 20, max_bytes=1 << 24, ttl_s=1e6, sync_interval_s=0.0)
    recorder = Recorder(backend.open_trace_writer(limits), 100, 0.01, 1 << 24)
    for make in made:
        recorder.put(make)
    recorder.start()
    recorder.close(20.0)

    traces = TraceReader(backend).read(100)
    for trace in traces:
        assert trace.features.positions.tolist() == list(range(len(trace.token_ids) - 1))
    dropped = 8 - len(traces)
    assert 3 <= dropped <= 5
    assert maker.num_lost_rows == dropped * 50
    assert recorder.counts() == {
        "queued": 8, "written": len(traces), "dropped": dropped, "failed": 0, **NEITHER
    }  # fmt: skip


def test_a_ring_that_does_not_hold_the_rows_of_a_step_is_refused():
    with pytest.raises(ValueError, match="186 rows at once do not fit a ring of 185"):
        make_engine(random_model("qwen3"), ring_rows=185)


def written(ring, rows_NH):
    """Append rows of one request, as tapped layer and as last hidden state, and number them."""
    count, none = torch.tensor([len(rows_NH)]), torch.zeros(1)
    ring.append(rows_NH[:, None], rows_NH, count, none, none)
    return ring.number([len(rows_NH)])[0]


def test_the_ring_wraps_without_mixing_rows():
    ring = CaptureRing(10, 1, 4)
    pieces = []
    for start in range(0, 21, 3):
        rows = torch.arange(start, start + 3).float()[:, None].expand(3, 4)
        pieces += (start, written(ring, rows), 3)

    held, lost = ring.read(pieces)

    assert held.positions.tolist() == list(range(11, 21))
    rows = torch.from_numpy(held.rows).view(torch.bfloat16)
    assert rows[:, 0, 0].tolist() == held.positions.tolist()
    assert lost == 11


def test_rows_that_may_be_overwritten_while_they_are_copied_are_lost():
    """Rounds on their way append rows that the host has not heard of."""
    ring = CaptureRing(10, 1, 4)
    rows = torch.arange(8).float()[:, None].expand(8, 4)
    pieces = [0, written(ring, rows), 8]
    ring.reserve(3)

    held, lost = ring.read(pieces)
    ring.number([2])
    later, lost_later = ring.read(pieces)

    assert (held.positions.tolist(), lost) == (list(range(1, 8)), 1)
    assert (later.positions.tolist(), lost_later) == (list(range(3, 8)), 3)


def test_fp8_rows_keep_small_and_large_values():
    ring = CaptureRing(2, 1, 4, dtype="float8_e4m3fn")
    values = torch.tensor([[1e-3, 5.0, -448.0, 0.0]])

    written(ring, values)
    held, _ = ring.read([0, 0, 1])

    assert restored(ring.features(held, (1,)))[0, 0, 2] == -448.0


def test_columns_of_rounds_are_what_the_rounds_were():
    """With and without drafts, with fewer draft tokens than K, drawn or not."""
    luck = random.Random(0)
    noted_of = [
        ("", None, ""),
        ("ucb", 1, "probe", False, ("ucb.z", "ucb.a"), (1.5, 2.5)),
        ("goodput", 2, "rest", True, ("goodput.tokens", "goodput.large"), (0.25, 1e300)),
    ]
    kept_of = [(), (("ucb.a", 2.5), ("ucb.z", 1.5)), (("goodput.tokens", 0.25),)]
    steps = [
        NotedStep(kind, version, k, 0.5, 3, 0.25, *noted_of[version])
        for version, (kind, k) in enumerate([("none", 0), ("eagle3", 4), ("suffix", 8)])
    ]
    noted, rounds = NotedRounds(), []
    for anchor in range(0, 60, 3):
        step = luck.choice(steps)
        drafted = [luck.randrange(99) for _ in range(luck.randrange(step.draft_k + 1))]
        step = step if drafted else steps[0]
        kept = luck.randint(0, len(drafted))
        p = [-luck.randrange(64) / 4 for _ in range(8)]
        q = [-1.5] * len(drafted) if step.drafter == "eagle3" else ()
        if drafted:
            noted.add(step, anchor, drafted, q, p, kept, 7)
        else:
            noted.add_plain(step, anchor, 7)
        seen = min(kept + 1, len(drafted))
        rounds.append(
            Round(
                anchor, step.drafter, step.version, tuple(drafted), tuple(q) or None,
                tuple(p[:seen]), kept, 7, step.draft_k, 0.5, 3, 0.25,
                policy=step.policy, step=step.step, reason=step.reason, is_timed=step.is_timed,
                notes=kept_of[step.version],
            )
        )  # fmt: skip

    assert tuple(round_columns(noted)) == tuple(rounds)
    assert tuple(round_columns(NotedRounds())) == ()


class SlowDisk(MemoryWriter):
    """A disk that is stuck until told otherwise."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.works = threading.Event()

    def append_all(self, payloads):
        self.works.wait(20)
        return super().append_all(payloads)


LIMITS = TraceLimits(segment_bytes=1 << 20, max_bytes=1 << 24, ttl_s=1e6, sync_interval_s=0.0)


def test_a_disk_that_is_stuck_delays_no_copy_until_memory_is_full():
    """Ten traces find room, the rest wait in the queue, whose oldest are dropped."""
    disk = SlowDisk(Held(), LIMITS)
    recorder = Recorder(disk, 5, 0.01, max_waiting_bytes=10_000)
    encoded = threading.Semaphore(0)

    def encode():
        encoded.release()
        return bytes(1000)

    recorder.start()
    for _ in range(10):
        recorder.put(encode)
        assert encoded.acquire(timeout=10), "a trace was not encoded beside the stuck disk"
    deadline = time.monotonic() + 10
    while recorder._waiting_bytes < 10_000 and time.monotonic() < deadline:
        time.sleep(0.001)
    for _ in range(8):
        recorder.put(encode)
    assert recorder.counts() == {"queued": 18, "written": 0, "dropped": 3, "failed": 0, **NEITHER}
    disk.works.set()
    recorder.close(20)
    assert recorder.counts() == {"queued": 18, "written": 15, "dropped": 3, "failed": 0, **NEITHER}


def test_what_a_recorder_that_hangs_has_not_written_in_time_is_counted(caplog):
    recorder = Recorder(MemoryWriter(Held(), LIMITS), 100, 0.01, 1 << 24)
    hangs = threading.Event()

    def hang():
        hangs.wait(60)
        return b"late"

    for encode in (lambda: b"one", hang, lambda: b"two"):
        recorder.put(encode)
    recorder.start()
    recorder.close(0.2)

    assert recorder.counts() == {"queued": 3, "written": 0, "dropped": 3, "failed": 0, **NEITHER}
    assert "3 traces were not written within 0.2 s of the end" in caplog.text
    hangs.set()
    deadline = time.monotonic() + 60
    while recorder.counts()["written"] < 3:  # after all: then they were not dropped
        assert time.monotonic() < deadline and num_waiting(recorder.counts()) == 0
        time.sleep(0.001)
    assert recorder.counts() == {"queued": 3, "written": 3, "dropped": 0, "failed": 0, **NEITHER}


@pytest.mark.parametrize("url", ["log:", "redis://127.0.0.1:1/0?run=away&spool_bytes=350"])
def test_whenever_a_recorder_is_asked_no_trace_is_counted_twice(tmp_path, url):
    """Also while a service is away and the oldest are dropped."""
    writer = open_backend(url, tmp_path).open_trace_writer(LIMITS)
    recorder = Recorder(writer, 50, 0.0, 1 << 24)
    recorder.start()
    found = []
    for _ in range(300):
        for _ in range(5):
            recorder.put(lambda: bytes(300))
        counts = writer.counts
        parts = (counts.durable, counts.pending, counts.doubtful, counts.dropped)
        assert min(parts) >= 0 and counts.appended == sum(parts)
        found.append(num_waiting(recorder.counts()))
    recorder.close(20)
    assert min(found) >= 0 and num_waiting(recorder.counts()) == 0


def test_every_trace_that_cannot_be_encoded_or_written_is_counted(caplog):
    def senseless():
        raise ValueError("tenant must be a short text")

    recorder = Recorder(MemoryWriter(Held(), LIMITS), 100, 0.01, 1 << 24)

    def broken():
        raise KeyError("a fault of the encoder")

    lost = (senseless, broken, lambda: None, lambda: bytes(1 << 23 | 1))
    for encode in (lambda: b"one", *lost):
        recorder.put(encode)
    recorder.start()
    recorder.close(20)

    assert recorder.counts() == {"queued": 5, "written": 1, "dropped": 1, "failed": 3, **NEITHER}
    told = " ".join(record.getMessage() for record in caplog.records)
    assert "tenant must be a short text" in told
    assert "over half of max_bytes" in told


def test_a_disk_that_refuses_every_trace_is_not_named_for_each(caplog, tmp_path):
    (tmp_path / "file").write_text("")
    recorder = Recorder(SegmentWriter(tmp_path / "file" / "x", LIMITS), 100, 0.01, 1 << 24)
    for _ in range(50):
        recorder.put(lambda: b"one")
    recorder.start()
    recorder.close(20)

    assert recorder.counts() == {"queued": 50, "written": 0, "dropped": 0, "failed": 50, **NEITHER}
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_record_holds_what_reading_the_ring_gives(dtype):
    """Rows go from the ring straight to their place in the record; over the ring's end too."""
    ring = CaptureRing(50, 2, 8, dtype=dtype)
    luck = torch.Generator().manual_seed(0)
    pieces, position = [], 0
    for count in (30, 9, 4, 1, 5):
        rows = torch.randn((count, 8), generator=luck)
        twice = torch.stack([rows, rows * 2], dim=1)
        one, none = torch.tensor([count]), torch.zeros(1)
        ring.append(twice, rows, one, none, none)
        pieces += (position, ring.number([count])[0], count)
        position += count
    held, lost = ring.read(pieces[3:])
    sequence = Sequence(
        Request("one", (5,) * 40, SamplingParams()), print, 1, None, frozenset(), [5] * 60
    )
    sequence.capture_rows = pieces[3:]

    maker = TraceMaker(Producer("test", 1, "f" * 64), ring, (1, 2))
    features = decode_trace(maker.finished(sequence)()).features

    assert lost == 0
    assert features.positions.tolist() == list(range(30, 49))
    assert features.rows.tobytes() == held.rows.tobytes()
    assert dtype == "bfloat16" or features.scale.tobytes() == held.scales.tobytes()
