"""How much of a draft is taken from text: what the definition says, and that the kernels say the
same."""

from __future__ import annotations

import pytest
import torch

from specops import text_first, text_first_triton
from specops.text_first import EXPLORE, KEPT, MOST_TRIES, NEURAL, NUM_KINDS, TEXT, TRIED

IMPLEMENTATIONS = [
    pytest.param(text_first, "cpu", id="definition"),
    pytest.param(text_first_triton, "cpu", id="kernel"),
    pytest.param(text_first_triton, "cuda", id="kernel on a GPU", marks=pytest.mark.gpu),
]
KERNELS = IMPLEMENTATIONS[1:]
GREEDY, SAMPLED = 0, 1
OWN_5 = 11
"""Kind of a match of 5 or 6 tokens of the request's own text."""


def counts_of(device, most=8, tried=400.0, **rates):
    """Counts of the kind ``OWN_5``, greedy and sampled: rate of text and of the neural drafter at
    each place."""
    counts = text_first.new_counts(most, torch.device("cpu"))
    for who, name in ((TEXT, "text"), (NEURAL, "neural")):
        kept = torch.tensor(rates[name])
        counts[who, :, OWN_5, : len(kept), TRIED] = tried
        counts[who, :, OWN_5, : len(kept), KEPT] = tried * kept
    return counts.to(device)


def lengths_by(by, counts, matched, available, num_draft, num_passes, temperature=0.0, at=1):
    device, num = counts.device, len(matched)
    begun = by.begin_drafts(
        counts,
        torch.tensor(matched, device=device),
        torch.tensor(available, device=device),
        torch.full((num,), temperature, device=device),
        torch.zeros(num, dtype=torch.int32, device=device),
        torch.full((num,), at, device=device),
        torch.full((num,), num_draft, device=device),
        num_draft,
        num_passes,
    )
    assert begun.is_text_RK.sum(1).tolist() == begun.text_R.tolist()
    assert begun.lens_R.tolist() == [max(n, num_passes) for n in begun.text_R.tolist()]
    return begun.text_R.tolist()


def test_kinds_tell_the_text_and_the_length():
    matched = torch.tensor([0, -2, -3, -4, -5, -6, -7, -9, -10, -15, -16, -90])
    kinds = [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    assert text_first.kinds_of(matched).tolist() == kinds
    assert text_first.kinds_of(-matched).tolist() == [0, *[kind + 7 for kind in kinds[1:]]]
    assert max(text_first.kinds_of(-matched)) == NUM_KINDS - 1


@pytest.mark.parametrize(("by", "device"), IMPLEMENTATIONS)
class TestHowMuch:
    def test_where_text_is_better_all_of_it_is_taken(self, by, device):
        counts = counts_of(device, text=[0.9] * 6, neural=[0.6] * 6)
        assert lengths_by(by, counts, [5, 5], [6, 3], 6, 4) == [6, 3]

    def test_where_the_neural_drafter_is_better_none_is(self, by, device):
        counts = counts_of(device, text=[0.5] * 6, neural=[0.7] * 6)
        assert lengths_by(by, counts, [5], [6], 6, 6) == [0]

    def test_text_begins_where_only_its_first_tokens_are_better(self, by, device):
        counts = counts_of(device, text=[0.9, 0.9, 0.2, 0.2], neural=[0.6] * 4)
        assert lengths_by(by, counts, [5], [4], 4, 4) == [2]

    def test_places_that_the_neural_drafter_does_not_reach_are_filled(self, by, device):
        """A worse start is taken if only text goes on long enough."""
        counts = counts_of(device, text=[0.8] * 8, neural=[0.85] * 8)
        assert lengths_by(by, counts, [5], [8], 8, 2) == [8]
        assert lengths_by(by, counts, [5], [8], 8, 8) == [0]

    def test_greedy_and_sampled_requests_are_apart(self, by, device):
        counts = counts_of(device, text=[0.9] * 3, neural=[0.5] * 3)
        counts[TEXT, SAMPLED, OWN_5, :, KEPT] = 0
        assert lengths_by(by, counts, [5], [3], 3, 3) == [3]
        assert lengths_by(by, counts, [5], [3], 3, 3, temperature=0.3) == [0]

    def test_other_kinds_of_match_do_not_count(self, by, device):
        counts = counts_of(device, text=[0.0] * 3, neural=[0.5] * 3)
        assert lengths_by(by, counts, [5, 90, 0], [3, 3, 1], 3, 3) == [0, 3, 0]

    def test_some_rounds_take_none(self, by, device):
        counts = counts_of(device, text=[0.9] * 3, neural=[0.1] * 3)
        found = [lengths_by(by, counts, [5], [3], 3, 3, at=at)[0] for at in range(2 * EXPLORE)]
        assert sorted(found) == [0] * 2 + [3] * (2 * EXPLORE - 2)

    def test_a_place_where_nothing_is_kept_is_not_divided_by(self, by, device):
        counts = counts_of(device, text=[0.0] * 8, neural=[0.0] * 8, tried=1e9)
        (found,) = lengths_by(by, counts, [5], [3], 8, 8)
        assert 0 <= found <= 3


def noted(by, counts, rounds, num_draft):
    """Counts after rounds of requests: (matched, available, temperature, begun, lens, text,
    emitted, how many of these were emitted)."""
    judged(by, counts, rounds, num_draft)
    return counts.cpu()


def judged(by, counts, rounds, num_draft):
    """What ``note_kept`` tells of text alone."""
    device = counts.device
    matched, available, heat, begun, lens, text, emitted, count = zip(*rounds, strict=True)

    def padded(rows, width):
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)

    told = by.note_kept(
        counts,
        torch.tensor(matched, device=device),
        torch.tensor(available, device=device),
        torch.tensor(heat, dtype=torch.float32, device=device),
        torch.tensor(begun, device=device),
        torch.tensor(lens, device=device),
        padded(text, num_draft),
        padded(emitted, num_draft + 1),
        torch.tensor(count, device=device),
    )
    return told.tolist()


@pytest.mark.parametrize(("by", "device"), IMPLEMENTATIONS)
class TestNoting:
    def test_text_is_judged_whoever_drafted(self, by, device):
        counts = text_first.new_counts(4, torch.device(device))
        rounds = [
            (5, 4, 0.0, 0, 4, [1, 2, 3, 4], [1, 2, 9, 9, 9], 3),  # the neural drafter, 2 kept
            (5, 2, 0.0, 2, 2, [1, 2], [1, 2, 7], 3),  # text, both kept
        ]
        found = noted(by, counts, rounds, 4)

        assert found[TEXT, GREEDY, OWN_5].tolist() == [[2, 2], [2, 2], [1, 0], [0, 0]]
        assert found[NEURAL, GREEDY, OWN_5].tolist() == [[1, 1], [1, 1], [1, 0], [0, 0]]

    def test_the_neural_drafter_goes_on_after_text(self, by, device):
        counts = text_first.new_counts(4, torch.device(device))
        found = noted(by, counts, [(5, 2, 0.7, 2, 4, [1, 2], [1, 2, 3, 8, 8], 4)], 4)

        assert found[TEXT, SAMPLED, OWN_5].tolist() == [[1, 1], [1, 1], [0, 0], [0, 0]]
        assert found[NEURAL, SAMPLED, OWN_5].tolist() == [[0, 0], [0, 0], [1, 1], [1, 0]]
        assert float(found.sum()) == 7

    def test_what_was_not_verified_is_not_counted(self, by, device):
        counts = text_first.new_counts(4, torch.device(device))
        rounds = [
            (5, 4, 0.0, 4, 0, [1, 2, 3, 4], [1, 1, 1, 1, 1], 1),  # no draft at all
            (5, 4, 0.0, 4, 4, [1, 2, 3, 4], [6, 6, 6, 6, 6], 1),  # the first one failed
        ]
        found = noted(by, counts, rounds, 4)
        assert found[TEXT, GREEDY, OWN_5].tolist() == [[1, 0], [0, 0], [0, 0], [0, 0]]
        assert float(found.sum()) == 1

    def test_it_tells_what_text_alone_would_have_kept_as_far_as_that_is_decided(self, by, device):
        counts = text_first.new_counts(4, torch.device(device))
        rounds = [
            (5, 4, 0.0, 0, 4, [1, 2, 3, 4], [1, 2, 9, 9, 9], 3),  # the neural drafter kept as many
            (5, 4, 0.7, 0, 4, [1, 2, 3, 4], [1, 2, 9, 9, 9], 2),  # too few tokens to tell
            (0, 4, 0.0, 0, 4, [7, 2, 3, 4], [1, 2, 3, 4, 5], 5),  # it failed at once
            (5, 2, 0.0, 2, 4, [1, 2], [1, 2, 3, 4, 5], 5),  # it had no more to say
            (5, 4, 0.0, 4, 4, [1, 2, 3, 4], [1, 2, 3, 4, 5], 5),
            (5, 4, 0.0, 4, 0, [1, 2, 3, 4], [1, 1, 1, 1, 1], 1),  # no draft at all
        ]
        assert judged(by, counts, rounds, 4) == [[3, 2], [2, 2], [1, 0], [3, 2], [4, 4], [0, 0]]

    def test_counts_are_halved_once_they_are_many(self, by, device):
        counts = text_first.new_counts(2, torch.device(device))
        counts[TEXT, GREEDY, OWN_5, 0] = torch.tensor([MOST_TRIES - 1.0, 101.0])
        found = noted(by, counts, [(5, 1, 0.0, 1, 1, [1], [1, 3], 2)], 2)
        assert found[TEXT, GREEDY, OWN_5, 0].tolist() == [MOST_TRIES / 2, 51]


@pytest.mark.parametrize(("by", "device"), KERNELS)
@pytest.mark.parametrize(("num_requests", "num_draft"), [(1, 1), (70, 3), (130, 8), (9, 16)])
def test_kernels_say_what_the_definition_says(by, device, num_requests, num_draft):
    numbers = torch.Generator().manual_seed(num_requests)

    def drawn(low, high, *shape):
        return torch.randint(low, high, shape or (num_requests,), generator=numbers)

    counts = text_first.new_counts(16, torch.device("cpu"))
    counts[..., TRIED] = drawn(0, MOST_TRIES, *counts.shape[:-1]).float()
    counts[..., KEPT] = (
        counts[..., TRIED] * torch.rand(counts.shape[:-1], generator=numbers)
    ).floor()
    matched, available = drawn(-20, 21), drawn(1, num_draft + 1)
    heat = torch.where(drawn(0, 2) > 0, 0.7, 0.0)
    lanes, lengths = drawn(0, 9).int(), drawn(1, 500)
    passes = max(1, num_draft // 2)
    most = drawn(0, num_draft + 1)
    given = (matched, available, heat, lanes, lengths, most)
    begun = text_first.begin_drafts(counts, *given, num_draft, passes)

    found = by.begin_drafts(
        counts.to(device), *(one.to(device) for one in given), num_draft, passes
    )

    for name in ("text_R", "lens_R", "who_R", "is_text_RK"):
        assert torch.equal(getattr(found, name).cpu(), getattr(begun, name)), name
    expected, lens = begun.text_R, begun.lens_R
    text, emitted = drawn(0, 2, num_requests, num_draft), drawn(0, 2, num_requests, num_draft + 1)
    count = 1 + torch.minimum(drawn(0, num_draft + 1), lens)
    given = (matched, available, heat, expected, lens, text, emitted, count)
    ours = counts.to(device, copy=True)
    told = text_first.note_kept(counts, *given)
    own = by.note_kept(ours, *(one.to(device) for one in given))
    assert torch.equal(ours.cpu(), counts)
    assert torch.equal(own.cpu(), told)
