"""The kernels' greedy choice equals torch's."""

from __future__ import annotations

import pytest
import torch

from specops import best_ids, best_ids_triton
from specops.draft_sampling import Instead
from specops.verify_logits import UNSOUND

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def poisoned(monkeypatch):
    """Fill the memory that kernels write to with garbage."""
    right = torch.empty

    def empty(*shape, **options):
        made = right(*shape, **options)
        return made.fill_(True if made.dtype == torch.bool else 113)

    monkeypatch.setattr(torch, "empty", empty)


def few_values(shape, dtype, device):
    """Small integers, so that a row's maximum occurs many times."""
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randint(-4, 4, shape, generator=generator).to(dtype).to(device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "num_programs"),
    [((1, 1), 1056), ((1, 1, 2100), 1056), ((5, 77), 1056), ((3, 2, 130), 20), ((7, 200), 7)],
    ids=str,
)
def test_the_lowest_of_tied_ids_wins(shape, num_programs, dtype, device):
    """Rows of one part and of many, parts of one span and of several; the last span is partial."""
    logits = few_values(shape, dtype, device)

    got = best_ids_triton.best_ids(logits, span=16, num_programs=num_programs)

    assert torch.equal(got, best_ids.best_ids(logits))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nan(dtype, device):
    """Torch chooses the first NaN, else the first infinity."""
    logits = few_values((9, 300), dtype, device)
    logits[0] = -torch.inf
    logits[1, :299] = -torch.inf
    logits[2] = torch.nan
    logits[3, [40, 250]] = torch.nan
    logits[4, [3, 200]] = torch.inf
    logits[5, 2], logits[5, 299] = torch.inf, torch.nan
    logits[6, 100], logits[6, 101] = torch.nan, torch.inf
    logits[7] = 0.0
    logits[7, :7] = -0.0
    logits[8] = -torch.inf
    logits[8, 117] = torch.nan

    got = best_ids_triton.best_ids(logits, span=16)

    assert got.tolist() == best_ids.best_ids(logits).tolist() == logits.argmax(-1).tolist()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
def test_ids_of_a_reduced_vocabulary_become_the_targets(device):
    logits = few_values((7, 90), torch.float32, device)
    d2t = 3 * torch.arange(90, device=device) + 5

    got = best_ids_triton.best_ids(logits, d2t, span=16)

    assert torch.equal(got, best_ids.best_ids(logits, d2t))
    assert torch.equal(got, 4 * logits.argmax(-1) + 5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_map", [False, True])
def test_tokens_of_others_are_returned_in_place_of_the_best(has_map, device):
    """They are target ids, and rows of theirs are not adjacent."""
    logits = few_values((7, 90), torch.float32, device)
    d2t = 3 * torch.arange(90, device=device) + 5 if has_map else None
    tokens = 1000 + torch.arange(14, device=device).view(7, 2)
    is_taken = torch.zeros(7, 3, dtype=torch.bool, device=device)
    is_taken[[0, 3, 6], 1], is_taken[2, 0] = True, True
    instead = Instead(tokens[:, 1], is_taken[:, 1])

    got = best_ids_triton.best_ids(logits, d2t, span=16, instead=instead)

    want = best_ids.best_ids(logits, d2t).tolist()
    want[0], want[3], want[6] = 1001, 1007, 1013
    assert got.tolist() == best_ids.best_ids(logits, d2t, instead=instead).tolist() == want


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 32, 640])
def test_rows_as_wide_as_a_vocabulary(num_rows):
    logits = torch.randn(num_rows, 151_936, device="cuda").bfloat16()

    assert torch.equal(best_ids_triton.best_ids(logits), logits.float().argmax(-1))


def test_rows_that_are_not_adjacent_are_refused():
    with pytest.raises(ValueError, match="contiguous rows of at least one"):
        best_ids_triton.best_ids(torch.zeros(4, 6)[:, :5])
    with pytest.raises(ValueError, match="contiguous rows of at least one"):
        best_ids_triton.best_ids(torch.zeros(4, 0))
    assert best_ids_triton.best_ids(torch.zeros(0, 6)).shape == (0,)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_target_without_a_finite_best_logit_has_no_choice(dtype, device):
    """One masked token is none the worse."""
    logits = few_values((6, 300), dtype, device)
    logits[0] = -torch.inf
    logits[1, 299] = torch.nan
    logits[2, 0] = torch.inf
    logits[3, [5, 6]] = torch.tensor([torch.inf, torch.nan], dtype=dtype, device=device)
    logits[4, :299] = -torch.inf

    got = best_ids_triton.best_ids(logits, span=16, is_target=True)

    assert torch.equal(got, best_ids.best_ids(logits, is_target=True))
    assert got[:4].tolist() == [UNSOUND] * 4
    assert got[4] == 299
    assert got[5] == logits[5].argmax()
