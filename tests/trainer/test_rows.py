"""What is gathered from the store is what was captured."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from drafters.batch import TrainingBatch, collate
from drafters.samples import Piece, Sample, widen
from specops.capture_pack import quantise
from tests.trainer.conftest import World
from tests.trainer.test_replay import samples_of
from trainer.packing import pack, row_step
from trainer.rows import PAGE, RowStore, pages_of

CPU = torch.device("cpu")


def as_fp8(sample: Sample) -> Sample:
    rows, scale = quantise(sample.rows)
    return replace(sample, rows=rows, scale=scale)


def as_float32(sample: Sample) -> Sample:
    return replace(sample, rows=sample.rows.float())


def with_gap(sample: Sample) -> Sample:
    keep = (sample.positions_N < 12) | (sample.positions_N > 15)
    return replace(sample, positions_N=sample.positions_N[keep], rows=sample.rows[keep])


def with_weights(sample: Sample) -> Sample:
    return replace(sample, weight_T=torch.arange(len(sample.token_ids_T)).float())


def in_pieces(sample: Sample) -> Sample:
    """Two pieces, both without the first tokens."""
    return replace(sample, pieces=(Piece(3, 20, 6), Piece(14, 36, 19)))


def assert_equal(found: TrainingBatch, wanted: TrainingBatch) -> None:
    for field in fields(TrainingBatch):
        left, right = getattr(found, field.name), getattr(wanted, field.name)
        if isinstance(left, Tensor):
            assert left.dtype == right.dtype, field.name
            assert left.equal(right), field.name
        else:
            assert left == right, field.name


@pytest.mark.parametrize(
    "change", [lambda x: x, as_fp8, as_float32, with_gap, with_weights, in_pieces]
)
def test_a_gathered_batch_is_the_collated_one(world: World, change) -> None:  # type: ignore[no-untyped-def]
    samples = [change(x) for x in samples_of(world)[40:52]]
    store = RowStore(CPU, 1 << 22)
    filler = store.put(samples[:3])
    held = store.put(samples[3:8])
    store.drop(filler)
    held += store.put(samples[8:])  # into pages that are no longer behind each other

    pieces = [piece for x in held for piece in x.pieces]
    batch = store.batch(pack(pieces, None), torch.float32)

    assert_equal(batch, collate([(x, piece) for x in samples[3:] for piece in x.pieces]))


def test_padding_is_behind_everything_and_known_to_be_padding(world: World) -> None:
    samples = samples_of(world)[:3]
    store = RowStore(CPU, 1 << 22)
    pieces = [piece for x in store.put(samples) for piece in x.pieces]
    exact = store.batch(pack(pieces, None), torch.float32)

    batch = store.batch(pack(pieces, (160, 64)), torch.float32)

    num, rows = len(exact.token_ids_T), len(exact.row_R)
    assert batch.token_ids_T.shape == (160,) and batch.longest == 64
    assert len(batch.row_R) % row_step(160) == 0 and len(batch.row_R) >= rows
    assert len(set(batch.row_R.tolist())) == len(batch.row_R)
    assert batch.is_row_R.tolist() == [place < rows for place in range(len(batch.row_R))]
    assert batch.features_TF[:num].equal(exact.features_TF)
    assert batch.row_R[:rows].equal(exact.row_R)
    assert (batch.segment_T[num:] == -1).all()
    assert not batch.known_T[num:].any() and not batch.features_TF[num:].any()


def test_few_numbers_of_rows_occur(world: World) -> None:
    store = RowStore(CPU, 1 << 22)
    held = store.put(samples_of(world)[:14])

    lengths = {
        len(pack([p for x in held[:count] for p in x.pieces], (512, 64)).row_R)
        for count in range(1, 15)
    }

    assert lengths <= {64 * n for n in range(1, 9)}


def test_pieces_that_do_not_fit_are_an_error(world: World) -> None:
    pieces = [p for x in RowStore(CPU, 1 << 22).put(samples_of(world)[:3]) for p in x.pieces]

    with pytest.raises(ValueError, match="108 positions do not fit a batch of 100"):
        pack(pieces, (100, 64))


def test_a_store_of_another_dtype_converts(world: World) -> None:
    one, other = samples_of(world)[:2]
    for first, second in ((one, as_fp8(other)), (as_fp8(one), other)):
        store = RowStore(CPU, 1 << 22)
        held = store.put([first, second])

        batch = store.batch(pack([held[1].pieces[0]], None), torch.float32)

        wide = widen(second.rows, second.scale)[:, :-1].flatten(1)
        found = batch.features_TF[batch.known_T]
        torch.testing.assert_close(found, wide, rtol=0.07, atol=1e-2)


def test_a_full_store_is_an_error(world: World) -> None:
    samples = samples_of(world)
    slot_bytes = samples[0].rows[0].numel() * 2 + 24
    store = RowStore(CPU, slot_bytes * PAGE * (1 + 2 * pages_of(samples[0])))
    store.put(samples[:2])

    with pytest.raises(ValueError, match="3 pages do not fit 0 free ones"):
        store.put(samples[2:3])


def test_memory_that_was_never_written_is_not_read(world: World) -> None:
    """A position without a captured row reads as zero, whatever is in memory there."""
    store = RowStore(CPU, 1 << 22)
    sample = with_gap(samples_of(world)[0])
    store.prepare(sample)
    assert store._columns is not None
    store._columns.rows_CmH[PAGE:].fill_(float("nan"))
    held = store.put([sample])

    batch = store.batch(pack(held[0].pieces, None), torch.float32)

    assert torch.isfinite(batch.features_TF).all() and torch.isfinite(batch.last_hidden_RH).all()
    assert np.flatnonzero(~batch.known_T.numpy()).tolist() == [12, 13, 14, 15, 35]


def test_what_became_of_drafts_is_gathered_with_the_rows_if_it_is_asked_for(world: World) -> None:
    def judged(sample: Sample) -> Sample:
        numbers = torch.arange(3 * len(sample.token_ids_T), dtype=torch.int32).view(-1, 3)
        return in_pieces(replace(sample, outcome_T3=numbers))

    samples = [judged(x) for x in samples_of(world)[:5]]
    store = RowStore(CPU, 1 << 22, has_outcomes=True)
    pieces = [piece for held in store.put(samples) for piece in held.pieces]

    found = store.batch(pack(pieces, None), torch.float32)

    parts = [(sample, piece) for sample in samples for piece in sample.pieces]
    wanted = collate(parts).outcome_R3
    assert wanted is not None and found.outcome_R3 is not None
    assert found.outcome_R3.equal(wanted)
    plain = RowStore(CPU, 1 << 22)
    held = plain.put(samples)
    assert plain.batch(pack(held[0].pieces, None), torch.float32).outcome_R3 is None
