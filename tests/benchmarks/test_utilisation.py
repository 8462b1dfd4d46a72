"""Model FLOPs of an update, against those that torch counts while it computes one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.shapes import SHAPES, draft_vocab_size
from benchmarks.update_parts import marked_update, products_of
from benchmarks.utilisation import (
    Case,
    Sizes,
    flops_of,
    one_of_each_shape,
    place_of,
    rows_of,
    sizes_of,
    with_ratios,
)
from drafters.eagle3.training import ChainPlan, ttt_loss
from trainer.packing import HeldPiece, pack

CPU = torch.device("cpu")


def added(total: torch.Size, a: torch.Size, b: torch.Size, *_: object, **__: object) -> int:
    """FLOPs of ``addmm_``, which torch does not count."""
    return 2 * a[0] * a[1] * b[1]


def computed(num_steps: int, folder: Path) -> tuple[list[HeldPiece], Sizes, int]:
    """A batch, its sizes, and FLOPs of its products with weights."""
    place = place_of(Case("tiny", "cpu", 1, 0, 512, 1.0), CPU, folder)
    model = place.learner(False).model
    pieces = [piece for sample in place.held[:3] for piece in sample.pieces]
    batch = place.store.batch(pack(pieces, None), torch.float32)
    plan = ChainPlan(num_steps, keep_logits=False, chunk_rows=1 << 20)
    more = {torch.ops.aten.addmm_: added}
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        given = model, place.head.embed_VH, place.head.lm_head, batch, plan
        ttt_loss(*given).loss.backward()  # type: ignore[arg-type,no-untyped-call]
    by_name = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    linear = sum(
        flops for op, flops in by_name.items() if op.endswith((".mm", ".addmm", ".addmm_"))
    )
    config = SHAPES["tiny"]()
    sizes = sizes_of(config, draft_vocab_size(config.vocab_size), num_steps)
    return pieces, sizes, linear


def test_products_with_weights_are_those_that_are_computed(tmp_path: Path):
    pieces, sizes, linear = computed(1, tmp_path)

    assert flops_of(pieces, replace(sizes, attended=0)) == linear


def test_chains_past_the_end_of_their_piece_are_not_counted(tmp_path: Path):
    pieces, sizes, linear = computed(4, tmp_path)

    counted = flops_of(pieces, replace(sizes, attended=0))
    dead = (1 + 2 + 3) * len(pieces)
    assert linear == counted + 6 * dead * (sizes.layer + sizes.head)


def test_attention_counts_the_keys_that_a_row_sees():
    piece = HeldPiece(torch.arange(4).numpy(), torch.arange(1, 4).numpy())
    only = Sizes(0, 0, attended=1, head=0, target_head=0, num_steps=1)

    assert flops_of([piece], only) == 12 * (1 + 2 + 3 + 4)
    # Anchors 1 and 2 go one step further: they see 2 and 3 keys, and one of their own.
    assert flops_of([piece], replace(only, num_steps=2)) == 12 * (10 + 3 + 4)


def test_utilisation_is_that_of_all_cards_and_rows_are_held_against_one_process():
    one = {"shape": "Qwen3-8B", "device": "cuda", "batch_tokens": 8192, "stage": 0}
    found = [
        {**one, "processes": 1, "tflops": 400.0, "rows_per_s": 1000.0},
        {**one, "processes": 2, "stage": 2, "tflops": 700.0, "rows_per_s": 1750.0},
    ]

    single, double = with_ratios(found, peak_tflops=1000.0)
    rows = list(rows_of([single, double], 1000.0))

    assert single["utilisation"] == pytest.approx(0.4)
    assert (double["utilisation"], double["over_one"]) == pytest.approx((0.35, 1.75))
    assert [(row.goal, row.holds) for row in rows] == [
        ("at least 0.4", True),
        (None, None),
        ("at least 1.8", False),
    ]


def test_products_alone_are_those_of_the_model_flops(tmp_path: Path) -> None:
    place = place_of(Case("tiny", "cpu", 1, 0, 512, 1.0), CPU, tmp_path)
    learner = place.learner(False)
    pieces = [piece for sample in place.held[:3] for piece in sample.pieces]
    packed = pack(pieces, None)
    config = SHAPES["tiny"]()
    sizes = sizes_of(config, draft_vocab_size(config.vocab_size), learner.settings.ttt_steps)

    alone = sum(one.flops for one in products_of(learner, packed))

    dead = (1 + 2 + 3) * len(pieces)
    counted = flops_of(pieces, replace(sizes, attended=0))
    assert alone == counted + 6 * dead * (sizes.layer + sizes.head)


def test_the_parts_of_an_update_are_all_there_and_change_the_weights(tmp_path: Path) -> None:
    place = place_of(Case("tiny", "cpu", 1, 0, 512, 1.0), CPU, tmp_path)
    learner = place.learner(False)
    before = [p.clone() for p in learner.model.parameters()]

    ms = marked_update(learner, pack(next(place.batches()), None))

    names = ["gather", "forward", "loss", "backward", "clip", "optimizer", "average"]
    assert list(ms) == names and all(value > 0 for value in ms.values())
    assert not all(a.equal(b) for a, b in zip(before, learner.model.parameters(), strict=True))


def test_a_batch_of_each_shape_warms_up(tmp_path: Path) -> None:
    place = place_of(Case("tiny", "cpu", 1, 0, 512, 1.0), CPU, tmp_path)
    learner = place.learner(False)
    drawn = [next(place.batches()) for _ in range(6)]

    assert one_of_each_shape(learner, drawn) == drawn[:4], "on a CPU, shapes are not fixed"
