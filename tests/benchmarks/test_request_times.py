"""What is compared with faults and without: a machine that is busy with something else raises the
first figure alone."""

import threading
import time

import pytest

from benchmarks.faults.request_times import Moment, Pair, Window, clock_of, figures_of


def window(taken_s, kept_waiting_s=0.0, processor_s=0.1):
    """100 requests, of which the last took ``kept_waiting_s`` longer for want of a core."""
    found = Window(processor_s=100 * processor_s)
    for number in range(100):
        waited_s = kept_waiting_s if number == 99 else 0.0
        found.add(Moment(5.0, 1.0, 2.0), Moment(5.0 + taken_s + waited_s, 1.1, 2.0 + waited_s))
    return found


def test_waiting_for_a_core_raises_the_clients_time_alone():
    pairs = [Pair(faulty=window(0.5, kept_waiting_s=2.0), quiet=window(0.5))] * 4
    found = figures_of(pairs)
    assert found["p99"]["ratio"] == pytest.approx(5.0)
    assert found["own_p99"]["ratio"] == found["processor"]["ratio"] == pytest.approx(1.0)


def test_a_serving_path_that_waits_for_the_buffer_is_slower_by_both_times():
    pairs = [Pair(faulty=window(0.6), quiet=window(0.5))] * 4
    found = figures_of(pairs)
    assert found["p99"]["ratio"] == found["own_p99"]["ratio"] == pytest.approx(1.2)
    assert found["processor"]["ratio"] == pytest.approx(1.0)


def test_a_serving_path_that_does_more_work_takes_more_processor_time():
    found = figures_of([Pair(faulty=window(0.5, processor_s=0.2), quiet=window(0.5))] * 4)
    assert found["processor"] == {
        "without": pytest.approx(0.1),
        "with": pytest.approx(0.2),
        "ratio": pytest.approx(2.0),
        "interval": [pytest.approx(2.0)] * 2,
    }


def test_the_interval_is_as_wide_as_pairs_differ():
    pairs = [Pair(window(0.5 * factor), window(0.5)) for factor in (0.9, 1.0, 1.1, 1.2)]
    least, most = figures_of(pairs)["p99"]["interval"]
    assert 0.85 < least < 1.1 < most < 1.25


def test_a_window_in_which_no_request_ended_says_nothing():
    pair = Pair(faulty=window(0.6), quiet=window(0.5))
    assert figures_of([pair, Pair(Window(), window(0.1)), pair]) == figures_of([pair, pair])
    with pytest.raises(ValueError, match="make them longer"):
        figures_of([Pair(window(0.5), Window())])


def test_a_threads_clock_counts_its_own_work_and_not_its_sleep():
    works, ends = threading.Event(), threading.Event()

    def run():
        works.wait()
        until_s = time.thread_time() + 0.05
        while time.thread_time() < until_s:
            pass
        ends.wait()

    thread = threading.Thread(target=run)
    thread.start()
    now = clock_of(thread)
    begun = now()
    time.sleep(0.02)
    slept = now()
    works.set()
    while now().processor_s < begun.processor_s + 0.04:
        time.sleep(0.001)
    ended = now()
    ends.set()
    thread.join()
    assert slept.processor_s - begun.processor_s < 0.01
    assert ended.wall_s - begun.wall_s >= 0.02 + 0.04
