"""Only traces that fit the target reach a batch, and each of their rows does so once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from buffer.records import FeatureRows, Rounds, Sampling, Trace
from drafters.batch import collate
from drafters.samples import Sample
from tests.trainer.conftest import World
from tests.trainer.traffic import HIDDEN, LAYER_IDS, LENGTH, PROMPT, VOCAB, with_rows
from trainer.dataset import Emphasis, Expected, Refusal, cut, sample_of
from trainer.packing import pack
from trainer.rows import RowStore


def expected(world: World) -> Expected:
    return Expected(world.fingerprint, LAYER_IDS, HIDDEN, VOCAB)


def sample_from(world: World, trace: Trace, max_sequence: int = 64, **options: Any) -> Sample:
    sample = sample_of(trace, expected(world), max_sequence, **options)
    assert isinstance(sample, Sample)
    return sample


def rows_of(trace: Trace) -> np.ndarray[Any, Any]:
    assert trace.features is not None
    return trace.features.rows.copy()


@pytest.mark.parametrize(
    ("reason", "text", "spoil"),
    [
        ("target", "rows of target feed", lambda t: replace(t, target_fingerprint="feed" * 16)),
        ("vocabulary", "token 96 is not below 96", lambda t: with_token(t, VOCAB)),
        ("vocabulary", "token 97 is not below 96", lambda t: with_draft(t, VOCAB + 1, 0)),
        ("vocabulary", "token 98 is not below 96", lambda t: with_draft(t, 0, VOCAB + 2)),
        ("no_features", "no hidden rows", lambda t: replace(t, features=None)),
        ("short", "no two captured rows", lambda t: replace(t, prompt_length=LENGTH)),
        ("layers", r"layers \(0, 1\) tapped", lambda t: with_layers(t, (0, 1))),
        ("shape", "rows are 16 wide, expected 32", lambda t: with_rows(t, rows_of(t)[..., :16])),
    ],
)
def test_a_trace_that_does_not_fit_is_refused_with_a_reason(world, reason, text, spoil):  # type: ignore[no-untyped-def]
    refusal = sample_of(spoil(world.traces[0]), expected(world), 64)

    assert isinstance(refusal, Refusal)
    assert refusal.reason == reason
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(refusal.text)


@pytest.mark.parametrize(
    ("values", "by_match"),
    [
        ({"temperature": 0.0}, True),
        ({"temperature": 0.7}, False),
        ({"temperature": 0.7, "seed": None}, False),
        ({"temperature": 0.7, "seed": 0}, True),
    ],
)
def test_greedy_and_seeded_requests_kept_their_drafts_by_match(
    world: World, values: dict[str, Any], by_match: bool
) -> None:
    sample = sample_from(world, replace(world.traces[0], sampling=Sampling(values)))
    stored = RowStore(torch.device("cpu"), 1 << 22)
    pieces = [piece for held in stored.put([sample]) for piece in held.pieces]

    for batch in (
        collate([(sample, piece) for piece in sample.pieces]),
        stored.batch(pack(pieces, None), torch.float32),
    ):
        assert len(batch.by_match_R) == sample.num_loss_rows
        assert batch.by_match_R.tolist() == [by_match] * sample.num_loss_rows
        assert float(batch.temperature_R[0]) == pytest.approx(values["temperature"])


def with_draft(trace: Trace, drafted: int, next_id: int) -> Trace:
    one = replace(trace.rounds[0], draft_ids=(drafted,), next_id=next_id)
    return replace(trace, rounds=Rounds.of([one]))


def with_token(trace: Trace, token: int) -> Trace:
    ids = trace.token_ids.copy()
    ids[-1] = token
    return replace(trace, token_ids=ids)


def with_layers(trace: Trace, layer_ids: tuple[int, ...]) -> Trace:
    assert trace.features is not None
    return replace(trace, features=replace(trace.features, layer_ids=layer_ids))


@pytest.mark.parametrize("num_tokens", [2, 15, 16, 17, 40, 100, 257])
@pytest.mark.parametrize("first_loss", [0, 1, 14, 39])
def test_pieces_teach_every_row_once_and_see_what_came_before(num_tokens, first_loss):  # type: ignore[no-untyped-def]
    pieces = cut(num_tokens, first_loss, 16)

    taught = [p for piece in pieces for p in range(piece.loss_from, piece.stop - 1)]
    assert taught == list(range(first_loss, num_tokens - 1))
    for piece in pieces:
        assert piece.stop - piece.start <= 16
        assert piece.loss_from - piece.start >= min(4, piece.loss_from)


def test_a_batch_holds_the_rows_of_the_trace_at_their_places(world: World) -> None:
    trace = world.traces[0]
    sample = sample_from(world, trace)
    rows = torch.from_numpy(rows_of(trace)).view(torch.bfloat16).float()

    batch = collate([(sample, piece) for piece in sample.pieces])

    assert batch.token_ids_T.equal(torch.from_numpy(trace.token_ids).long())
    assert batch.positions_T.equal(torch.arange(LENGTH))
    assert batch.features_TF[:-1].equal(rows[:, :-1].flatten(1))
    assert batch.last_hidden_RH.equal(rows[batch.row_R, -1])
    assert batch.known_T.tolist() == [True] * (LENGTH - 1) + [False]
    taught = batch.row_R.tolist()
    assert taught == list(range(PROMPT - 1, LENGTH - 1))
    assert sample.num_loss_rows == len(taught)


def test_prompts_are_learnt_from_when_asked(world: World) -> None:
    sample = sample_from(world, world.traces[0], train_on_prompts=True)

    batch = collate([(sample, piece) for piece in sample.pieces])

    assert batch.row_R.tolist() == list(range(1, LENGTH - 1))


def test_pieces_of_one_trace_hold_together_what_the_whole_holds(world: World) -> None:
    whole = sample_from(world, world.traces[0])
    parts = sample_from(world, world.traces[0], max_sequence=16)
    assert len(parts.pieces) > 1

    batch = collate([(parts, piece) for piece in parts.pieces] + [(whole, whole.pieces[0])])

    last = len(parts.pieces)
    is_whole = batch.segment_T[batch.row_R] == last
    taught = batch.positions_T[batch.row_R]
    assert taught[~is_whole].tolist() == taught[is_whole].tolist()
    there = batch.segment_T == last
    for number, piece in enumerate(parts.pieces):
        here, same = batch.segment_T == number, slice(piece.start, piece.stop)
        assert batch.features_TF[here].equal(batch.features_TF[there][same])
        assert batch.token_ids_T[here].equal(batch.token_ids_T[there][same])


def test_rows_that_a_prefix_cache_left_out_are_neither_known_nor_taught(world: World) -> None:
    trace = world.traces[0]
    assert trace.features is not None
    kept = np.array([p for p in range(LENGTH - 1) if p not in (0, 1, 2, 20)])
    partial = replace(
        trace.features, positions=kept.astype(np.int32), rows=trace.features.rows[kept]
    )
    sample = sample_from(world, replace(trace, features=partial))

    batch = collate([(sample, piece) for piece in sample.pieces])

    assert (~batch.known_T).nonzero()[:, 0].tolist() == [0, 1, 2, 20, LENGTH - 1]
    assert not {20, 21} & set(batch.row_R.tolist())
    assert sample.num_loss_rows == LENGTH - PROMPT - 2  # neither row 20 nor 21, which needs it


def test_fp8_rows_are_restored_by_their_scale(world: World) -> None:
    trace = world.traces[0]
    wide = torch.from_numpy(rows_of(trace)).view(torch.bfloat16).float()
    scale = wide.abs().amax(-1) / 448
    packed = (wide / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    positions = np.arange(LENGTH - 1, dtype=np.int32)
    rows = FeatureRows(positions, LAYER_IDS, "float8_e4m3fn", packed, scale.numpy())
    sample = sample_from(world, replace(trace, features=rows))

    batch = collate([(sample, piece) for piece in sample.pieces])

    restored, wanted = batch.last_hidden_RH, wide[batch.row_R, -1]
    torch.testing.assert_close(restored, wanted, rtol=2**-4, atol=float(scale.max()) * 2**-9)


def test_a_rejected_draft_of_the_drafter_in_training_makes_its_row_weigh_more(world: World) -> None:
    trace = world.traces[0]  # one token drafted at the end of the prompt, and rejected
    ours, other = (
        replace(expected(world), emphasis=Emphasis(kind, 4.0)) for kind in ("eagle3", "suffix")
    )

    weighted, plain = (sample_of(trace, one, 64) for one in (ours, other))

    assert isinstance(weighted, Sample) and isinstance(plain, Sample)
    assert weighted.weight_T is not None and plain.weight_T is not None
    assert weighted.weight_T.nonzero().numel() == LENGTH
    assert (weighted.weight_T > 1).nonzero()[:, 0].tolist() == [PROMPT]
    assert float(weighted.weight_T[PROMPT]) == 4
    assert (plain.weight_T == 1).all()
    assert sample_from(world, trace).weight_T is None
