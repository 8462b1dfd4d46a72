"""Reading runs ahead of the trainer, and a checkpoint never skips what was not handed over."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from buffer.backends import open_backend
from buffer.codec import encode_trace
from buffer.interface import ServiceAwayError, TraceLimits
from buffer.traces import TraceReader
from drafters.samples import Sample
from oracles.kafka_brokers import running_broker
from oracles.redis_servers import RedisServer, valkey_binary
from tests.trainer.conftest import World
from tests.trainer.traffic import HIDDEN, LAYER_IDS, VOCAB, write_traces
from trainer.dataset import Expected
from trainer.intake import BATCHES_AHEAD, TRACES_AT_ONCE, Intake
from trainer.journal import Journal
from trainer.target import TargetWatch


def intake_of(
    world: World, run_dir: Path, offsets: dict[str, Any] | None = None, *, url: str = "log:"
) -> Intake:
    reader = TraceReader(open_backend(url, run_dir), offsets)
    expected = Expected(world.fingerprint, LAYER_IDS, HIDDEN, VOCAB)
    return Intake(reader, expected, 64, Journal(run_dir / "trainer"), TargetWatch(run_dir))


def many(world: World, count: int, first: int = 0) -> list[Any]:
    return [
        replace(world.traces[i % len(world.traces)], seq=first + i, epoch=5) for i in range(count)
    ]


def keys(samples: list[Sample]) -> list[str]:
    return [sample.key for sample in samples]


def wait_until(holds: Any) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_reading_ahead_gives_what_reading_gives_in_the_same_pieces(
    world: World, tmp_path: Path
) -> None:
    write_traces(tmp_path, many(world, 300))
    plain, ahead = intake_of(world, tmp_path), intake_of(world, tmp_path)
    ahead.start()

    for _ in range(7):
        assert keys(plain.read()) == keys(ahead.read())
        assert plain.offsets() == ahead.offsets()
        assert plain.counts == ahead.counts
    assert plain.counts.read == 300
    ahead.stop()


def test_a_checkpoint_has_the_offsets_of_what_was_handed_over(world: World, tmp_path: Path) -> None:
    write_traces(tmp_path, many(world, 400))
    first = intake_of(world, tmp_path)
    first.start()
    got = keys(first.read())
    wait_until(lambda: first._ahead is not None and len(first._ahead._ready) == BATCHES_AHEAD)
    assert first.counts.read == len(got) == TRACES_AT_ONCE
    offsets = first.offsets()
    first.stop()

    again = intake_of(world, tmp_path, offsets)
    while samples := again.read():
        got += keys(samples)
    assert got == [f"server/5/{seq}" for seq in range(400)]


def test_what_is_written_later_arrives_and_an_idle_log_is_never_waited_for(
    world: World, tmp_path: Path
) -> None:
    intake = intake_of(world, tmp_path)
    intake.start()
    begun = time.monotonic()
    assert [intake.read() for _ in range(50)] == [[]] * 50
    assert time.monotonic() - begun < 5

    write_traces(tmp_path, many(world, 3))
    got: list[str] = []
    wait_until(lambda: got.extend(keys(intake.read())) or len(got) == 3)
    intake.stop()


def test_new_traces_are_read_while_the_trainer_is_busy(world: World, tmp_path: Path) -> None:
    """It finds them at its next look, and not what was true when it last looked."""
    intake = intake_of(world, tmp_path)
    intake.start()
    assert intake.read() == []
    write_traces(tmp_path, many(world, 3))
    ahead = intake._ahead
    assert ahead is not None
    wait_until(lambda: any(batch.samples for batch in ahead._ready))

    assert len(intake.read()) == 3
    intake.stop()


class NotReadThrough(TraceReader):
    """Of a log that is too long to be read from its beginning."""

    def read_located(self, max_traces: int) -> Any:
        raise AssertionError("the log was read from its beginning")


LIMITS = TraceLimits(segment_bytes=1 << 20, max_bytes=1 << 28, ttl_s=1e6, sync_interval_s=0.0)
GONE = {"log": "000099-0", "redis": "9999", "kafka": "0-9999"}
"""Locations without a record."""


@pytest.fixture(params=["log", "redis", "kafka"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "log":
        yield "log:"
    elif request.param == "redis":
        server = RedisServer(valkey_binary())
        yield f"{server.url}?run=intake"
        server.close()
    else:
        with running_broker("tansu", tmp_path / "broker") as broker:
            yield f"kafka://{broker.address}/intake?partitions=1"


def test_traces_are_found_where_they_are_and_not_by_reading_the_log(
    world: World, tmp_path: Path, url: str
) -> None:
    with open_backend(url, tmp_path).open_trace_writer(LIMITS) as writer:
        for trace in many(world, 200):
            writer.append(encode_trace(trace))
    first = intake_of(world, tmp_path, url=url)
    got = [key for _ in range(5) for key in keys(first.read())]
    wanted = set(got[3::40])
    locations = first.locations(wanted)
    assert locations.keys() == wanted
    evicted, gone = got[3], {got[3]: (locations[got[3]][0], GONE[url.partition(":")[0]])}

    again, backend = intake_of(world, tmp_path, url=url), open_backend(url, tmp_path)
    assert again.find(wanted, NotReadThrough(backend), locations).keys() == wanted
    assert again.locations(wanted) == locations  # for its own checkpoints
    found = again.find(wanted, NotReadThrough(backend), locations | gone)
    assert found.keys() == wanted - {evicted}


def test_a_log_that_is_a_copy_is_read_from_its_beginning(world: World, tmp_path: Path) -> None:
    write_traces(tmp_path, many(world, 200))
    first = intake_of(world, tmp_path)
    wanted = set(keys(first.read())[::9])
    elsewhere = {key: ("w1-1", at) for key, (_, at) in first.locations(wanted).items()}

    for known in (elsewhere, {}):
        again = intake_of(world, tmp_path)
        found = again.find(wanted, TraceReader(open_backend("log:", tmp_path)), known)
        assert found.keys() == wanted
        assert again.locations(wanted) == first.locations(wanted)


def test_what_another_record_holds_now_is_not_taken_for_the_trace(
    world: World, tmp_path: Path
) -> None:
    write_traces(tmp_path, many(world, 20))
    first = intake_of(world, tmp_path)
    one, other, third = keys(first.read())[:3]
    at = first.locations({one, other, third})

    again = intake_of(world, tmp_path)
    mixed = {one: at[other], third: at[third]}
    reader = NotReadThrough(open_backend("log:", tmp_path))
    assert again.find({one, third}, reader, mixed).keys() == {third}


def test_refused_traces_are_counted_and_told_when_they_are_handed_over(
    world: World, tmp_path: Path
) -> None:
    foreign = [replace(t, target_fingerprint="f" * 64) for t in many(world, 5, first=1000)]
    write_traces(tmp_path, [*foreign, *many(world, 5)])
    intake = intake_of(world, tmp_path)
    intake.start()

    assert len(intake.read()) == 5
    assert intake.num_refused == {"target": 5}
    assert (tmp_path / "trainer" / "log.jsonl").read_text().count('"refused"') == 5
    intake.stop()


def test_what_ends_the_thread_ends_the_trainer(world: World, tmp_path: Path) -> None:
    write_traces(tmp_path, many(world, 3))
    intake = intake_of(world, tmp_path)

    class Failing(TraceReader):
        def read_located(self, max_traces: int) -> Any:
            raise OSError(errno.EIO, "Input/output error")

    intake.continue_with(Failing(open_backend("log:", tmp_path)))
    intake.start()
    with pytest.raises(OSError, match="Input/output error"):
        intake.read()
    intake.stop()


def test_stopping_ends_the_thread_at_any_time(world: World, tmp_path: Path) -> None:
    write_traces(tmp_path, many(world, 400))
    for delay_s in (0.0, 0.01, 0.1):
        intake = intake_of(world, tmp_path)
        intake.start()
        time.sleep(delay_s)
        intake.stop()
        assert not [t for t in threading.enumerate() if t.name == "intake"]


def test_an_intake_waits_for_a_service_that_is_away_and_goes_on(
    world: World, tmp_path: Path
) -> None:
    write_traces(tmp_path, many(world, 3))
    intake = intake_of(world, tmp_path)
    backend = open_backend("log:", tmp_path)

    class Away(TraceReader):
        is_away = True

        def read_located(self, max_traces: int) -> Any:
            if self.is_away:
                raise ServiceAwayError(errno.EIO, "redis://there: no answer")
            return super().read_located(max_traces)

    reader = Away(backend)
    intake.continue_with(reader)
    intake.start()
    for _ in range(3):
        assert intake.read() == []
    reader.is_away = False
    samples: list[Sample] = []
    wait_until(lambda: samples.extend(intake.read()) or len(samples) == 3)
    intake.close()
    told = (tmp_path / "trainer" / "log.jsonl").read_text()
    assert told.count('"buffer_away"') == told.count('"buffer_back"') == 1


def test_a_trainer_with_enough_to_train_on_does_not_wait_for_a_batch_in_progress(
    world: World, tmp_path: Path
) -> None:
    write_traces(tmp_path, many(world, 3))
    intake = intake_of(world, tmp_path)
    may_read, real = threading.Event(), intake._next_batch

    def slow() -> Any:
        may_read.wait(20)
        return real()

    intake._next_batch = slow  # type: ignore[method-assign]
    intake.start()

    assert intake.read(wait=False) == []
    may_read.set()
    assert len(intake.read()) == 3
    intake.stop()
