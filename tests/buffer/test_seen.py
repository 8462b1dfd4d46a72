"""What was seen is remembered exactly, however many gaps and epochs there are, and takes little."""

import json
import random
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer import seen as seen_module
from buffer.seen import SeenTraces


def through_json(seen):
    return SeenTraces.from_json(json.loads(json.dumps(seen.to_json())))


@given(
    seqs=st.lists(st.integers(0, 200) | st.integers(2**63 - 200, 2**63 - 1)),
    restarts=st.sets(st.integers(0, 100)),
    most_runs=st.integers(1, 4),
)
def test_seen_traces_are_remembered_exactly_and_across_restarts(seqs, restarts, most_runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seen_module, "_MAX_RUNS", most_runs)  # so that few numbers take every form
        patch.setattr(seen_module, "_CHUNK", 32)
        seen, truth = SeenTraces(), set()
        for index, seq in enumerate(seqs):
            if index in restarts:
                seen = through_json(seen)
            assert (("p", 1, seq) in seen) == (seq in truth)
            assert seen.add("p", 1, seq) == (seq not in truth)
            truth.add(seq)
        assert set(seen.beyond(SeenTraces())) == {("p", 1, seq) for seq in truth}


@given(
    older=st.sets(st.integers(0, 120)),
    newer=st.sets(st.integers(0, 120)),
    most_runs=st.sampled_from([1, 2, 64]),
)
def test_what_is_seen_beyond_an_older_memory_is_found(older, newer, most_runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seen_module, "_MAX_RUNS", most_runs)
        patch.setattr(seen_module, "_CHUNK", 32)
        before, after = SeenTraces(), SeenTraces()
        for seq in older:
            before.add("p", 1, seq)
        for seq in newer:
            after.add("p", 1, seq)
            after.add("q", 7, seq)
        found = {("p", 1, seq) for seq in newer - older} | {("q", 7, seq) for seq in newer}
        assert set(after.beyond(before)) == found


def test_no_gap_and_no_epoch_is_given_up():
    seen = SeenTraces()
    for start in (0, 1):  # of alternate tenants, one after the other
        for seq in range(start, 6000, 2):
            assert seen.add("p", 1, seq)
    for is_new in (True, False):
        for epoch in range(3000):
            assert seen.add("q", epoch, 5) is is_new
    again = through_json(seen)
    assert not any(again.add("p", 1, seq) for seq in range(6000))
    assert not any(again.add("q", epoch, 5) for epoch in range(3000))
    assert again.add("p", 1, 6000)


def held_by_seen():
    """Bytes allocated by the module; other threads of this process allocate, too."""
    own = tracemalloc.Filter(True, seen_module.__file__)
    return sum(one.size for one in tracemalloc.take_snapshot().filter_traces([own]).traces)


def test_memory_is_bounded_by_a_bit_a_number_and_by_the_number_of_epochs():
    chance, num = random.Random(0), 400_000
    seqs = chance.sample(range(2 * num), num)
    tracemalloc.start()
    try:
        before = held_by_seen()
        seen = SeenTraces()
        for seq in seqs:
            seen.add("p", 1, seq)
        held = held_by_seen() - before
        assert held < 2 * num / 8 * 1.1 + 20_000
        epochs = SeenTraces()
        before = held_by_seen()
        for epoch in range(10_000):
            epochs.add("p", epoch, 1)
        assert held_by_seen() - before < 10_000 * 300
    finally:
        tracemalloc.stop()
    assert len(json.dumps(seen.to_json())) < 2 * num / 8 * 1.5
    assert sys.getsizeof(json.dumps(epochs.to_json())) < 10_000 * 40


def test_once_the_gaps_are_filled_hardly_anything_is_left():
    chance, num = random.Random(0), 200_000
    seqs = chance.sample(range(num), num)
    seen = SeenTraces()
    assert all(seen.add("p", 1, seq) for seq in seqs)
    assert len(json.dumps(seen.to_json())) < 150
    assert not seen.add("p", 1, 77)


def test_checkpoints_from_before_are_read():
    seen = SeenTraces.from_json([["p", 1, [[0, 3], [5, 6]]], ["q", 2, []]])
    assert {seq for _, _, seq in seen.beyond(SeenTraces())} == {0, 1, 2, 5}


@pytest.mark.parametrize(
    "stored",
    [
        [["p", 1, [[3, 3]]]],
        [["p", 1, [[3, 1]]]],
        [["p", 1, [[0, 3], [2, 6]]]],
        [["p", 1, [[0, 1 << 65]]]],
        [["p", 1, {"0": "AAAA"}]],
        [["p", 1, {"0": 7}]],
        [["p", 1, {"x": [[0, 1]]}]],
        [["p", "1", []]],
        [[1, 1, []]],
        [["p", 1]],
    ],
)
def test_what_no_memory_writes_is_refused(stored):
    with pytest.raises(ValueError, match="traces seen"):
        SeenTraces.from_json(stored)
