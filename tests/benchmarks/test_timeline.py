"""What a request costs beyond decoding, told by the times at which it passes its stations."""

from __future__ import annotations

import pytest

from benchmarks.border.stamps import Stamps, Station, read
from benchmarks.border.timeline import passages, summary, table

CLIENT = [
    (0.000, Station.SENT),
    (0.030, Station.FIRST_EVENT),
    (0.100, Station.ANSWERED),
    (0.101, Station.SENT),
    (0.190, Station.ANSWERED),
]
SERVER = [
    (0.001, Station.BYTES),
    (0.005, Station.QUEUED),
    (0.006, Station.WOKE),
    (0.010, Station.PROMPT_LAUNCHED),
    (0.020, Station.PROMPT_READ),
    (0.022, Station.ROUND_LAUNCHED),
    (0.040, Station.ROUND_READ),
    (0.041, Station.ROUND_LAUNCHED),
    (0.042, Station.OUTPUT),
    (0.060, Station.ROUND_READ),
    (0.061, Station.ROUND_LAUNCHED),
    (0.080, Station.ROUND_READ),
    (0.081, Station.FINISH),
    (0.082, Station.ROUND_LAUNCHED),
    (0.090, Station.MAKE),
    # the second request is on its way
    (0.121, Station.MADE),
    (0.122, Station.QUEUED),
    (0.130, Station.PROMPT_READ),
    (0.150, Station.ROUND_READ),
    (0.160, Station.FINISH),
]


def test_decoding_is_from_the_first_token_read_to_the_last():
    first, second = passages(SERVER, CLIENT)

    assert first.total_ms == pytest.approx(100)
    assert first.beyond_ms == pytest.approx(100 - (80 - 20))
    assert first.round_ms == pytest.approx(20)
    assert first.first_event_ms == pytest.approx(30)
    assert first.first_output_ms == pytest.approx(22)
    assert second.beyond_ms == pytest.approx(89 - 20) and second.round_ms is None
    assert first.at_ms["its end is known"] == pytest.approx(81)
    assert second.at_ms["it is in the inbox"] == pytest.approx(21)


def test_rounds_before_the_first_token_and_after_the_end_are_counted():
    first, second = passages(SERVER, CLIENT)

    assert (first.num_rounds, first.num_before, first.num_after) == (4, 0, 1)
    assert (first.num_sleeps, second.num_sleeps) == (1, 0)


def test_a_program_counts_for_the_request_that_waits_for_it():
    """Only the part of its time that has passed since the request was sent."""
    without = [one for one in SERVER if one[1] is not Station.MAKE]

    for began_s, waits_ms in ((0.104, 17), (0.1005, 20)):
        events = sorted([*without, (began_s, Station.MAKE)])
        second = passages(events, CLIENT)[1]
        assert second.num_made == 1 and second.making_ms == pytest.approx(waits_ms)
        assert second.pause_ms == pytest.approx(1)


def test_a_summary_has_a_line_for_each_milestone():
    found = summary(passages(SERVER, CLIENT))

    assert found["requests"] == 2 and found["programs_made"] == 0.5
    assert found["steps_ms"]["the HTTP process reads it"] == pytest.approx(1)
    text = table({"here": found})
    assert "its end is known" in text and "beyond decoding" in text


def test_stamps_of_several_processes_come_in_order_of_time(tmp_path):
    one, other = Stamps(tmp_path, "http"), Stamps(tmp_path, "engine")
    one.note(Station.WRITTEN, 3.0)
    one.note(Station.BYTES, 1.0)
    other.note(Station.QUEUED, 2.0)

    found = read(tmp_path)

    assert found["http"].tolist() == [[1.0, Station.BYTES], [3.0, Station.WRITTEN]]
    assert found["engine"].tolist() == [[2.0, Station.QUEUED]]


def test_what_is_wrapped_notes_its_begin_and_its_end(tmp_path):
    class Made:
        def one(self, value):
            return value

    stamps = Stamps(tmp_path, "engine")
    stamps.if_any(Made, "one", Station.MAKE, Station.MADE)

    assert Made().one(0) == 0 and Made().one(5) == 5
    assert [station for _, station in read(tmp_path)["engine"]] == [Station.MAKE, Station.MADE]
