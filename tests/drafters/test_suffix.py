"""The suffix index proposes what followed the best match, and forgets what it must."""

from __future__ import annotations

import subprocess
import sys
import zlib

import pytest

from drafters.suffix import compiled, recent
from drafters.suffix.index import SuffixIndex
from drafters.suffix.kinds import KINDS, Kind
from drafters.suffix.layout import LINKED, NUM_SEARCHES
from drafters.suffix.recent import RecentText
from drafters.suffix.running import rungs


def finished(index, key, tokens, *, keep=True, namespace=""):
    index.begin(key, tokens, namespace)
    index.finish(key, keep)


def observe(index, key):
    """The kind of its match; ``None`` without one."""
    number = index.observe([key])[0]
    return KINDS[number - 1] if number else None


def own(votes, least):
    return Kind(True, votes, least)


def recent_text(votes, least):
    return Kind(False, votes, least)


def propose(index, key, k):
    return index.propose([key], [k])[0]


def test_a_request_that_repeats_itself_is_continued():
    index = SuffixIndex(2, 12, 0)
    index.begin("a", [1, 2, 3, 4, 5, 9, 1, 2, 3])
    assert observe(index, "a") == own("alone", 3)
    assert propose(index, "a", 3) == [4, 5, 9]


def test_a_repetition_runs_on_into_its_own_draft():
    index = SuffixIndex(2, 12, 0)
    index.begin("a", [7, 8, 7, 8, 7, 8])
    assert propose(index, "a", 7) == [7, 8, 7, 8, 7, 8, 7]


def test_a_short_match_is_no_match():
    index = SuffixIndex(3, 12, 0)
    index.begin("a", [1, 2, 5, 1, 2])
    assert (observe(index, "a"), propose(index, "a", 4)) == (None, [])
    index.extend(["a"], [[5, 1, 2, 5]])
    assert observe(index, "a") == own("alone", 6)


def test_finished_traffic_helps_the_next_request():
    index = SuffixIndex(2, 12, 1000)
    finished(index, "a", [1, 2, 3, 4, 5])
    index.begin("b", [9, 2, 3])
    assert (observe(index, "b"), propose(index, "b", 8)) == (recent_text("alone", 1), [4, 5])


def ranked(index, kinds):
    """Values these kinds of match in this order, the first most, above all others."""
    values = [0.0] * (len(KINDS) + 1)
    for place, kind in enumerate(kinds):
        values[1 + KINDS.index(kind)] = 1.0 / (1 + place)
    index.rank(values)


def test_of_two_matches_the_kind_that_is_kept_more_often_wins_though_it_is_shorter():
    index = SuffixIndex(2, 12, 1000)
    finished(index, "a", [9, 8, 7, 1, 2, 3, 40])
    index.begin("b", [2, 3, 50, 0, 9, 8, 7, 1, 2, 3])
    here, there = own("alone", 1), recent_text("alone", 6)
    assert (observe(index, "b"), propose(index, "b", 1)) == (here, [50])
    ranked(index, [there, here])
    assert (observe(index, "b"), propose(index, "b", 1)) == (there, [40])
    ranked(index, [here, there])
    assert (observe(index, "b"), propose(index, "b", 1)) == (here, [50])
    index.rank(None)
    assert (observe(index, "b"), propose(index, "b", 1)) == (here, [50])


def test_a_match_whose_occurrences_are_divided_gives_way_to_one_that_agrees():
    index = SuffixIndex(2, 12, 1000)
    for key in "abc":
        finished(index, key, [7, 8, 1, 2, 3, 4, 5, 6, 40])
    index.begin("b", [1, 2, 60, 5, 6, 50, 5, 6, 51, 1, 2, 3, 4, 5, 6])
    assert (observe(index, "b"), propose(index, "b", 1)) == (recent_text("agreed", 6), [40])
    index.begin("c", [1, 2, 60, 5, 6, 50, 5, 6, 50, 1, 2, 3, 4, 5, 6])
    assert (observe(index, "c"), propose(index, "c", 1)) == (own("agreed", 1), [50])


def test_the_request_itself_wins_on_ties():
    index = SuffixIndex(2, 12, 1000)
    finished(index, "a", [1, 2, 3, 40])
    index.begin("b", [1, 2, 3, 50, 0, 1, 2, 3])
    index.rank([0.0] + [1.0] * len(KINDS))
    assert (observe(index, "b"), propose(index, "b", 1)) == (own("alone", 3), [50])


def test_a_match_that_nobody_values_is_found_when_its_value_rises():
    """No match in recent text was searched for, so nothing bounds the length of the next one."""
    index = SuffixIndex(2, 12, 1000)
    finished(index, "a", [4, 5, 6, 7, 8, 9, 1, 2, 3, 40])
    index.begin("b", [1, 2, 50, 0, 4, 5, 6, 7, 8, 9, 1, 2])
    ranked(index, [own("alone", 1)])
    assert observe(index, "b") == own("alone", 1)
    ranked(index, [recent_text("alone", 6), own("alone", 1)])
    assert observe(index, "b") == recent_text("alone", 6)
    index.extend(["b"], [[3]])
    assert (observe(index, "b"), propose(index, "b", 1)) == (recent_text("alone", 9), [40])


def test_the_most_frequent_continuation_wins_and_the_latest_on_ties():
    index = SuffixIndex(2, 12, 1000)
    for key, follower in enumerate([4, 4, 5]):
        finished(index, str(key), [1, 2, follower, 7])
    index.begin("b", [1, 2])
    assert propose(index, "b", 2) == [4, 7]
    finished(index, "3", [1, 2, 5, 8])
    assert propose(index, "b", 2) == [5, 8]


def test_a_draft_goes_on_from_another_sequence_where_one_ends():
    index = SuffixIndex(2, 12, 1000)
    finished(index, "a", [3, 4, 5, 6])
    finished(index, "b", [1, 2, 3, 4])
    index.begin("c", [1, 2])
    assert propose(index, "c", 4) == [3, 4, 5, 6]


def test_the_index_follows_committed_tokens_one_by_one_or_many_at_once():
    tokens = [(i * i) % 7 for i in range(300)]
    one, many = SuffixIndex(2, 6, 0), SuffixIndex(2, 6, 0)
    one.begin("a", tokens[:3])
    many.begin("a", tokens[:3])
    for token in tokens[3:]:
        one.extend(["a"], [[token]])
    many.extend(["a"], [tokens[3:]])
    assert observe(one, "a") == observe(many, "a") == own("agreed", 6)
    assert propose(one, "a", 16) == propose(many, "a", 16)


def test_an_opted_out_request_leaves_no_trace():
    index = SuffixIndex(2, 12, 1000)
    finished(index, "secret", [1, 2, 3, 4], keep=False)
    index.begin("b", [1, 2])
    assert index.num_waiting_tokens == 0
    assert (observe(index, "b"), propose(index, "b", 4)) == (None, [])
    assert (index.num_recent_tokens, index.num_recent_sequences) == (0, 0)
    assert index.num_running == 1


def test_a_running_request_is_seen_by_no_other():
    index = SuffixIndex(2, 12, 1000)
    index.begin("a", [1, 2, 3, 4])
    index.begin("b", [1, 2])
    assert observe(index, "b") is None


def test_namespaces_never_meet():
    index = SuffixIndex(2, 12, 1000)
    finished(index, "a", [1, 2, 3, 4], namespace="tenant-a")
    index.begin("b", [1, 2], namespace="tenant-b")
    index.begin("c", [1, 2], namespace="tenant-a")
    assert propose(index, "b", 4) == []
    assert propose(index, "c", 4) == [3, 4]


def test_namespaces_with_one_hash_never_meet():
    # These two names have the same CRC-32, hence the same chains.
    assert zlib.crc32(b"plumless") == zlib.crc32(b"buckeroo")
    index = SuffixIndex(2, 12, 1000)
    finished(index, "a", [1, 2, 3, 4], namespace="plumless")
    finished(index, "b", [8, 9, 7], namespace="buckeroo")
    index.begin("b", [1, 2], namespace="buckeroo")
    assert propose(index, "b", 4) == []


def test_one_hash_is_not_one_match():
    index = SuffixIndex(2, 12, 10_000)
    finished(index, "a", [token for other in range(4000) for token in (100 + other, 1)])
    for other in range(5000, 6000):  # hundreds of these pairs have the hash of one above
        index.begin("b", [other, 1])
        assert observe(index, "b") is None
        index.finish("b", keep=False)


def test_tokens_after_the_end_are_not_shared():
    index = SuffixIndex(2, 12, 1000)
    index.begin("a", [1, 2, 3, 4])
    index.finish("a", keep=True, num_tokens=3)
    index.begin("b", [1, 2])
    assert propose(index, "b", 4) == [3]


def test_without_recent_tokens_nothing_is_shared():
    index = SuffixIndex(2, 12, 0)
    finished(index, "a", [1, 2, 3, 4])
    index.begin("b", [1, 2])
    assert (observe(index, "b"), index.num_recent_tokens) == (None, 0)


def test_the_oldest_traffic_leaves_and_is_counted():
    index = SuffixIndex(2, 12, 20)
    for key in range(10):
        finished(index, str(key), [key, 100, 50 + key, 200])
        index.catch_up()
        assert index.num_recent_tokens + index.num_recent_sequences <= 20
    assert index.num_recent_sequences == 4
    assert (index.num_evicted_sequences, index.num_evicted_tokens) == (6, 24)
    index.begin("old", [5, 100])
    index.begin("new", [6, 100])
    assert propose(index, "old", 1) == []
    assert propose(index, "new", 1) == [56]


def test_of_a_sequence_beyond_the_bound_the_end_is_kept():
    index = SuffixIndex(2, 12, 5)
    finished(index, "a", [1, 2, 3, 4, 5, 6])
    index.begin("b", [1, 2])
    index.begin("c", [3, 4])
    assert (observe(index, "b"), propose(index, "c", 3)) == (None, [5, 6])
    assert index.num_recent_tokens == 4


def linked(index, key):
    """Tokens of a request that are in its chains."""
    return index._texts.table[index._texts.row(key), LINKED]


def test_a_request_that_nobody_looks_up_is_not_indexed():
    index = SuffixIndex(2, 12, 1000)
    for key in ("asked", "unasked"):
        index.begin(key, [1, 2, 3, 1, 2])
        index.extend([key], [[3, 1, 2]])
    index.finish("unasked", keep=True)
    assert (index.num_waiting_tokens, index.num_recent_tokens) == (8, 0)
    index.begin("unasked", [1, 2, 3])
    assert observe(index, "asked") == own("alone", 3)
    assert (linked(index, "asked"), linked(index, "unasked")) == (7, 0)
    assert (index.num_waiting_tokens, index.num_recent_tokens) == (0, 8)


def test_where_somebody_looks_a_finished_sequence_is_indexed_at_once():
    index = SuffixIndex(2, 12, 1000)
    index.begin("asked", [1, 2, 3])
    observe(index, "asked")
    finished(index, "a", [5, 6, 7])
    assert (index.num_waiting_tokens, index.num_recent_tokens) == (0, 3)
    for key in range(20):
        finished(index, str(key), [5, 6, 7])
    assert index.num_waiting_tokens > 0


def test_a_lookup_that_changes_nothing_searches_nothing():
    index = SuffixIndex(2, 12, 1000)
    index.begin("a", [1, 2, 3, 1, 2])
    observe(index, "a")
    before = index._state[NUM_SEARCHES]
    propose(index, "a", 1)
    observe(index, "a")
    assert index._state[NUM_SEARCHES] == before == 1


def test_where_nobody_looks_only_the_newest_finished_traffic_waits(monkeypatch):
    monkeypatch.setattr(recent, "_MOST_WAITING", 12)
    index = SuffixIndex(2, 12, 1000)
    for key in range(10):
        finished(index, str(key), [key, 100, 50 + key, 200], namespace="xy"[key % 2])
        assert index.num_waiting_tokens == min(4 * (key + 1), 12)
    assert (index.num_skipped_sequences, index.num_skipped_tokens) == (7, 28)
    for key, namespace, draft in [
        (6, "x", []),
        (7, "y", [57, 200]),
        (8, "x", [58, 200]),
        (9, "y", [59, 200]),
        (9, "x", []),
    ]:
        index.begin("probe", [key, 100], namespace)
        assert propose(index, "probe", 2) == draft
        index.finish("probe", keep=False)
    assert (index.num_recent_sequences, index.num_evicted_sequences) == (3, 0)


def test_one_sequence_may_wait_however_long_it_is(monkeypatch):
    monkeypatch.setattr(recent, "_MOST_WAITING", 12)
    index = SuffixIndex(2, 12, 1000)
    finished(index, "a", [1, 2, 3])
    finished(index, "b", list(range(100, 200)))
    assert (index.num_waiting_tokens, index.num_skipped_tokens) == (100, 3)


def test_no_more_waits_than_may_be_kept():
    index = SuffixIndex(2, 12, 20)
    for key in range(10):
        finished(index, str(key), [key, 100, 50 + key, 200])
    assert (index.num_waiting_tokens, index.num_skipped_sequences) == (16, 6)


def test_the_queue_forgets_what_lies_behind_the_end():
    index = SuffixIndex(2, 12, 1000)
    index.begin("a", [1, 2, 3, 4])
    index.finish("a", keep=True, num_tokens=3)
    assert index.num_waiting_tokens == 3


@pytest.mark.parametrize("first", range(20, 60, 10))
def test_a_sequence_may_be_evicted_by_one_that_is_indexed_with_it(first):
    index = SuffixIndex(2, 12, 20)
    finished(index, "a", [7, 7, 7, 7])
    index.catch_up()
    finished(index, "b", [*range(first, first + 9), 3])  # slots 5..15
    finished(index, "c", [1, 2, 1, 2, 1, 1, 2, 9])  # 0..8, for 16..19 are too few
    index.begin("d", [1, 2])
    index.begin("e", [first, first + 1])
    assert (propose(index, "d", 1), propose(index, "e", 1)) == ([1], [])
    assert (index.num_recent_sequences, index.num_evicted_sequences) == (1, 2)


def test_memory_does_not_grow_with_traffic():
    index = SuffixIndex(2, 4, 500)
    ring, arena = index._recent.ring, index._texts.arena
    for key in range(200):
        finished(index, "a", [(key * 31 + i * i) % 50 for i in range(100)], namespace=str(key))
        index.catch_up()
    assert index._recent.ring is ring and index._texts.arena is arena
    assert index.num_recent_sequences <= 5
    assert len(index._namespaces) == index.num_recent_sequences
    assert index.num_running == 0


def test_the_longest_match_is_found_however_often_its_end_occurs():
    index = SuffixIndex(2, 12, 0)
    index.begin("a", [5, 1, 2, 7, *[6, 1, 2, 8] * 500, 5, 1, 2])
    assert (observe(index, "a"), propose(index, "a", 1)) == (own("alone", 3), [7])


def test_memory_of_requests_is_bounded_by_their_tokens_and_used_again():
    index = SuffixIndex(2, 12, 0)
    for turn in range(100):
        for key in range(20):
            index.begin(str(key), [token % 7 for token in range(1000)])
            for _ in range(10):
                index.extend([str(key)], [[1, 2, 3] * 30])
            observe(index, str(key))
        if not turn:
            size = index._texts.arena.nbytes
            assert size <= 20 * 1900 * 200
        for key in range(20):
            index.finish(str(key), keep=False)
    assert index._texts.arena.nbytes == size


def test_positions_start_again_before_they_overflow(monkeypatch):
    monkeypatch.setattr(RecentText, "_MAX_POSITION", 30)
    index = SuffixIndex(2, 12, 20)
    for key in range(12):
        finished(index, "a", [key, 100, 50 + key, 200])
        index.begin("b", [key, 100])
        assert propose(index, "b", 2) == [50 + key, 200]
        index.finish("b", keep=False)
    assert index.num_evicted_sequences + index.num_recent_sequences == 12


def test_misuse_is_told():
    index = SuffixIndex(2, 12, 20)
    index.begin("a", [])
    assert (observe(index, "a"), propose(index, "a", 4), propose(index, "a", 0)) == (None, [], [])
    with pytest.raises(ValueError, match="'a' has begun already"):
        index.begin("a", [1])
    with pytest.raises(ValueError, match="no sequence 'b' is running"):
        observe(index, "b")
    with pytest.raises(ValueError, match="1 <= min_match <= max_match"):
        SuffixIndex(3, 2, 0)
    with pytest.raises(ValueError, match="recent_tokens must be >= 0"):
        SuffixIndex(2, 3, -1)
    with pytest.raises(ValueError, match="no sequence 'c' is running"):
        index.extend(["a", "c"], [[1], [2]])
    with pytest.raises(ValueError, match="2 sequences, but tokens of 1"):
        index.extend(["a", "b"], [[1]])


def test_before_the_search_is_compiled_text_is_stored_and_nothing_found():
    native = None
    index = SuffixIndex(2, 12, 1000, load=lambda: native)
    finished(index, "a", [1, 2, 3, 4, 5])
    index.begin("b", [9, 1])
    index.extend(["b"], [[2]])
    assert (observe(index, "b"), propose(index, "b", 2)) == (None, [])
    native = compiled.wait()
    assert (observe(index, "b"), propose(index, "b", 2)) == (recent_text("alone", 1), [3, 4])


def test_the_search_is_loaded_in_the_background(monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(compiled.folder().parent))
    code = (
        "import time; from drafters.suffix import compiled\n"
        "while not compiled.now(): time.sleep(0.01)\n"
        "assert compiled.wait() is compiled.now(); print(compiled.folder())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.stdout.strip(), done.stderr) == (str(compiled.folder()), "")


def test_a_folder_that_cannot_be_written_costs_the_kept_code_alone(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    where = compiled.folder.__wrapped__()
    assert where.is_dir() and tmp_path not in where.parents
    assert "each start compiles it again" in caplog.text
    where.rmdir()


@pytest.mark.parametrize("bounds", [(1, 1), (1, 4), (2, 12), (3, 3), (4, 40), (5, 12)])
def test_a_request_has_chains_from_the_shortest_length_up_to_the_longest(bounds):
    lengths = rungs(*bounds)
    assert lengths[0] == bounds[0] and lengths[-1] <= bounds[1] < 2 * max(lengths[-1], 2)
    assert lengths == sorted(set(lengths))
