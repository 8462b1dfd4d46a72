"""Drafts from text: what the definition says, and that the kernels say the same."""

from __future__ import annotations

import pytest
import torch

from specops import matches, matches_triton
from specops.matches import BLOCK, END, Bounds, RingText
from specops.matches_triton import Programs

IMPLEMENTATIONS = [
    pytest.param(matches, "cpu", id="definition"),
    pytest.param(matches_triton, "cpu", id="kernel"),
    pytest.param(matches_triton, "cuda", id="kernel on a GPU", marks=pytest.mark.gpu),
]
KERNELS = IMPLEMENTATIONS[1:]
BOUNDS = Bounds(2, 5)


def ring_of(size, *texts, device="cpu"):
    """A ring that these texts, (namespace, tokens), were written to in turn."""
    ids = torch.full((size,), END, dtype=torch.int32)
    spaces = torch.zeros(size // BLOCK, dtype=torch.int32)
    start = filled = 0
    for space, tokens in texts:
        num = -(-(len(tokens) + 1) // BLOCK) * BLOCK
        if start + num > size:
            start = 0
        ids[start : start + num] = END
        ids[start : start + len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        spaces[start // BLOCK : (start + num) // BLOCK] = space
        start += num
        filled = max(filled, start)
    bounds = torch.tensor([start % size, filled])
    return RingText(ids.to(device), spaces.to(device), bounds.to(device))


def drafts(by, device, *given, **others):
    """Drafts of each text, as lists."""
    found = found_by(by, device, *given, **others)
    return [
        row[:count]
        for row, count in zip(found.tokens_RK.tolist(), found.counts_R.tolist(), strict=True)
    ]


def found_by(by, device, texts, num_draft, ring=None, spaces=None, bounds=BOUNDS, **how):
    most = max(map(len, texts)) + 3
    lanes = torch.full((len(texts) + 1, most), 77, dtype=torch.int32)  # garbage behind each text
    for lane, text in enumerate(texts, start=1):
        lanes[lane, : len(text)] = torch.tensor(text, dtype=torch.int32)
    return by.text_drafts(
        lanes.to(device),
        torch.arange(1, len(texts) + 1, dtype=torch.int32, device=device),
        torch.tensor([len(text) for text in texts], device=device),
        torch.tensor(spaces or [1] * len(texts), device=device),
        ring,
        num_draft,
        bounds,
        **how,
    )


@pytest.mark.parametrize(("by", "device"), IMPLEMENTATIONS)
class TestOwnText:
    def test_the_longest_match_is_continued(self, by, device):
        text = [1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]
        assert drafts(by, device, [text], 3) == [[4, 9, 2]]

    def test_the_length_of_the_match_is_told(self, by, device):
        ring = ring_of(4 * BLOCK, (1, [4, 5, 6, 7, 8]), device=device)
        texts = [[1, 2, 3, 9, 1, 2, 3], [9, 4, 5, 6, 7], [7, 9]]
        assert found_by(by, device, texts, 2, ring).matched_R.tolist() == [3, -4, 0]

    def test_the_latest_of_equally_long_ones(self, by, device):
        text = [2, 3, 4, 8, 2, 3, 5, 8, 8, 2, 3]
        assert drafts(by, device, [text], 2) == [[5, 8]]

    def test_a_match_longer_than_bounded_counts_as_that_long(self, by, device):
        text = [9, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 8, 9, 1, 2, 3, 4, 5, 6]
        assert drafts(by, device, [text], 1, bounds=Bounds(2, 3)) == [[8]]
        assert drafts(by, device, [text], 1, bounds=Bounds(2, 9)) == [[7]]

    def test_text_that_ends_before_the_draft_goes_on_as_it_repeats(self, by, device):
        assert drafts(by, device, [[7, 5, 6, 5, 6]], 5) == [[5, 6, 5, 6, 5]]

    @pytest.mark.parametrize("text", [[4], [4, 5], [1, 2, 9, 3, 2]])
    def test_without_a_match_the_last_token_is_drafted_again(self, by, device, text):
        assert drafts(by, device, [text], 4) == [[text[-1]]]


@pytest.mark.parametrize(("by", "device"), IMPLEMENTATIONS)
class TestRing:
    def test_what_followed_in_a_finished_text(self, by, device):
        ring = ring_of(4 * BLOCK, (1, [5, 1, 2, 3, 4]), device=device)
        assert drafts(by, device, [[9, 1, 2]], 4, ring) == [[3, 4]]

    def test_own_text_wins_ties_and_length_wins_over_both(self, by, device):
        ring = ring_of(4 * BLOCK, (1, [0, 1, 2, 3]), device=device)
        assert drafts(by, device, [[1, 2, 8, 1, 2]], 1, ring) == [[8]]
        assert drafts(by, device, [[1, 2, 8, 0, 1, 2]], 1, ring) == [[3]]

    def test_other_namespaces_are_not_seen(self, by, device):
        ring = ring_of(4 * BLOCK, (1, [1, 2, 3]), (2, [1, 2, 4]), device=device)
        texts = [[1, 2], [1, 2], [1, 2]]
        assert drafts(by, device, texts, 1, ring, spaces=[1, 2, 3]) == [[3], [4], [2]]

    def test_a_match_does_not_reach_into_the_text_before(self, by, device):
        first = [*range(100, 100 + BLOCK - 1)]
        ring = ring_of(4 * BLOCK, (1, first), (1, [7, 8, 9]), device=device)
        assert drafts(by, device, [[first[-1], 7]], 1, ring) == [[7]]

    def test_the_end_of_a_text_is_no_match(self, by, device):
        ring = ring_of(4 * BLOCK, (1, [0, 1, 2, 6]), (1, [0, 1, 2]), device=device)
        assert drafts(by, device, [[0, 1, 2]], 2, ring) == [[6]]

    def test_the_latest_text_counts_also_where_the_ring_began_again(self, by, device):
        texts = [(1, [1, 2, n]) for n in range(10, 15)]
        for written in range(1, len(texts) + 1):
            ring = ring_of(3 * BLOCK, *texts[:written], device=device)
            assert drafts(by, device, [[1, 2]], 1, ring) == [[9 + written]]


def random_text(some, most, *, num_kinds=4):
    """1 to ``most`` - 1 tokens of few kinds."""
    length = int(torch.randint(1, most, (1,), generator=some))
    return torch.randint(num_kinds, (length,), generator=some).tolist()


def assert_drafts_like_definition(by, device, texts, num_draft, ring, spaces, bounds, **how):
    """That a kernel's tokens, counts and lengths of matches equal the definition's."""
    want = found_by(matches, "cpu", texts, num_draft, ring, spaces, bounds)
    there = None if ring is None else RingText(
        *(one.to(device) for one in (ring.ids_M, ring.spaces_B, ring.bounds_2))
    )  # fmt: skip
    got = found_by(by, device, texts, num_draft, there, spaces, bounds, **how)
    for name in ("tokens_RK", "counts_R", "matched_R"):
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name


@pytest.mark.parametrize(("by", "device"), KERNELS)
@pytest.mark.parametrize("num_draft", [1, 3, 16])
def test_kernels_draft_what_the_definition_does(by, device, num_draft):
    some = torch.Generator().manual_seed(num_draft)
    for longest in (1, 3, 12):
        texts = [random_text(some, most) for most in (3, 40, 1100, 2500)]
        spaces = torch.randint(1, 4, (len(texts),), generator=some).tolist()
        finished = [(1 + n % 3, random_text(some, 300)) for n in range(14)]
        for ring in (None, ring_of(24 * BLOCK, *finished), ring_of(24 * BLOCK)):
            bounds = Bounds(1, longest)
            assert_drafts_like_definition(by, device, texts, num_draft, ring, spaces, bounds)


@pytest.mark.parametrize(("by", "device"), KERNELS)
class TestGroups:
    """Requests that are compared with finished texts together, by programs that read many spans."""

    @pytest.mark.parametrize(
        ("programs", "num_requests", "shortest"),
        [(Programs(8, 256, 4, parts=2), 17, 2), (Programs(16, 128, 4, parts=1), 3, 1)],
    )
    def test_each_drafts_what_it_does_alone(self, by, device, programs, num_requests, shortest):
        some = torch.Generator().manual_seed(num_requests)
        texts = [random_text(some, 400) for _ in range(num_requests)]
        spaces = torch.randint(1, 3, (num_requests,), generator=some).tolist()
        finished = [(1 + n % 2, random_text(some, 200)) for n in range(12)]
        # Not full; full, with the oldest text in the middle of a span.
        for num_texts in (4, 12):
            ring = ring_of(9 * BLOCK, *finished[:num_texts])
            assert_drafts_like_definition(
                by, device, texts, 3, ring, spaces, Bounds(shortest, 12), programs=programs
            )

    def test_older_spans_count_with_longer_matches_alone(self, by, device):
        older = [(1, [1, 2, 3, 9]), (1, [0, 1, 2, 3, 8])]
        programs = Programs(8, 128, 4, parts=1)
        for num_older, want in ((1, 7), (2, 8)):
            ring = ring_of(16 * BLOCK, *older[:num_older], *[(1, [1, 2, 3, 7])] * 4)
            there = RingText(
                *(one.to(device) for one in (ring.ids_M, ring.spaces_B, ring.bounds_2))
            )
            assert drafts(by, device, [[0, 1, 2, 3]], 1, there, programs=programs) == [[want]]

    @pytest.mark.parametrize("num_texts", [5, 6], ids=["in a span", "between spans"])
    def test_the_latest_texts_vote_wherever_the_oldest_one_begins(self, by, device, num_texts):
        texts = [(1, [1, 2, n, 1, 2, n]) for n in range(10, 10 + num_texts)]
        ring = ring_of(4 * BLOCK, *texts, device=device)
        found = drafts(by, device, [[1, 2]], 1, ring, programs=Programs(8, 256, 4, parts=1))
        assert found == [[9 + num_texts]]

    @pytest.mark.parametrize("lasts", [range(32), [7] * 32], ids=["all differ", "all are the same"])
    def test_as_many_as_a_group_can_have(self, by, device, lasts):
        ring = ring_of(32 * BLOCK, *((1, [n, 50, 51 + n]) for n in range(32)), device=device)
        texts = [[n, 50] for n in lasts]
        found = drafts(by, device, texts, 1, ring, programs=Programs(32, 2048, 8))
        assert found == [[51 + n] for n in lasts]

    def test_nothing_is_read_behind_the_requests(self, by, device):
        # The number of this pair is that of places in a group that no request has.
        ring = ring_of(4 * BLOCK, (1, [1, 65_534, 9]), device=device)
        far = torch.full((8,), 1 << 30, dtype=torch.int32, device=device)
        lengths, spaces = far.long(), torch.ones(8, dtype=torch.int64, device=device)
        far[0], lengths[0] = 0, 2
        texts = torch.tensor([[3, 4]], dtype=torch.int32, device=device)
        found = by.text_drafts(texts, far[:1], lengths[:1], spaces[:1], ring, 1, BOUNDS)
        assert found.tokens_RK.tolist() == [[4]]

    def test_tokens_that_are_everywhere(self, by, device):
        finished = [(1, [6] * 100 + [7 + n]) for n in range(4)] + [(1, [6] * 200)] * 2
        texts = [[6] * (1 + n) for n in range(9)]
        assert_drafts_like_definition(
            by, device, texts, 2, ring_of(7 * BLOCK, *finished), None, BOUNDS,
            programs=Programs(8, 256, 4, parts=1),
        )  # fmt: skip


@pytest.mark.parametrize(("by", "device"), IMPLEMENTATIONS)
@pytest.mark.parametrize("other", [[5 + (1 << 16), 9], [4, 9 ^ (1 << 16)]])
def test_large_ids_are_not_taken_for_others(by, device, other):
    ring = ring_of(4 * BLOCK, (1, [*other, 3]), (1, [5, 9, 4]), (1, [*other, 2]), device=device)
    assert drafts(by, device, [[5, 9]], 1, ring) == [[4]]
    assert drafts(by, device, [other], 1, ring) == [[2]]


@pytest.mark.parametrize(("by", "device"), IMPLEMENTATIONS)
class TestVotes:
    def test_the_most_frequent_next_token_wins(self, by, device):
        text = [2, 3, 5, 0, 2, 3, 5, 8, 2, 3, 4, 2, 3]
        assert drafts(by, device, [text], 1) == [[5]]

    def test_the_latest_on_ties_and_those_that_agreed_go_on(self, by, device):
        text = [2, 3, 5, 6, 7, 2, 3, 5, 6, 8, 2, 3, 4, 9, 9, 2, 3]
        assert drafts(by, device, [text], 3) == [[5, 6, 8]]

    def test_only_the_latest_few_vote(self, by, device):
        text = [2, 3, 5] * 3 + [2, 3, 6] * 4 + [2, 3]
        assert drafts(by, device, [text], 1, bounds=Bounds(2, 2)) == [[6]]

    def test_shorter_matches_have_no_vote(self, by, device):
        text = [9, 2, 3, 6, 8, 2, 3, 5, 8, 2, 3, 5, 9, 2, 3]
        assert drafts(by, device, [text], 1) == [[6]]

    def test_finished_texts_vote_and_go_on_as_long_as_one_does(self, by, device):
        texts = [(1, [1, 2, 3, 4]), (1, [1, 2, 3]), (1, [1, 2, 5, 6])]
        ring = ring_of(4 * BLOCK, *texts, device=device)
        assert drafts(by, device, [[1, 2]], 4, ring) == [[3, 4]]

    def test_own_occurrences_vote_alone_where_they_are_as_long(self, by, device):
        texts = [(1, [1, 2, 3])] * 3
        ring = ring_of(4 * BLOCK, *texts, device=device)
        assert drafts(by, device, [[1, 2, 4, 1, 2]], 1, ring) == [[4]]
