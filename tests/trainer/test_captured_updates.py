"""Updates captured in CUDA graphs are those that eager code computes, whatever ran between them."""

from __future__ import annotations

import pytest
import torch

from drafters.trainable import trainable
from targets.head import load_target_head
from tests.trainer.conftest import World
from tests.trainer.test_replay import samples_of
from tests.trainer.traffic import settings_for
from trainer.learner import Learner
from trainer.packing import HeldPiece, every_shape, pack
from trainer.rows import RowStore

CUDA = torch.device("cuda")


def test_every_shape_that_a_batch_can_have_is_known_before(world: World) -> None:
    store = RowStore(torch.device("cpu"), 1 << 22)
    pieces = [piece for sample in store.put(samples_of(world)) for piece in sample.pieces]
    longest = max(len(piece.slots) for piece in pieces)
    for total in (longest, longest + 37, 4 * longest):
        fixed = (total, longest)
        known = {(len(p.slots_T), len(p.row_R), len(p.columns())) for p in every_shape(fixed)}
        for piece in pieces:
            packed = pack([piece], fixed)
            assert (len(packed.slots_T), len(packed.row_R), len(packed.columns())) in known
            assert len(set(packed.row_R.tolist())) == len(packed.row_R)


def learner_on(world: World, use_graphs: bool, optimizer: str) -> tuple[Learner, list[HeldPiece]]:
    head = load_target_head(world.target, CUDA, torch.bfloat16)
    learns = trainable("eagle3")
    model = learns.new_model(head.config, head.lm_head.weight_VH, None, seed=0)
    settings = settings_for(world.target, world.target, warmup_steps=0, optimizer=optimizer)
    learner = Learner(learns, model, head, settings.trainer, RowStore(CUDA, 1 << 24), use_graphs)
    held = learner.store.put(samples_of(world))
    return learner, [piece for sample in held for piece in sample.pieces]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_updates_go_on_without_the_graphs_that_are_given_up(world: World) -> None:
    captured, pieces = learner_on(world, True, "adamw")
    eager, same = learner_on(world, False, "adamw")
    captured.capture_all()
    captured.update(pieces[:4])
    eager.update(same[:4])

    assert captured.give_up_graphs()
    assert not captured.give_up_graphs()
    captured.update(pieces[2:6])
    eager.update(same[2:6])

    captured.settle(), eager.settle()
    assert captured.num_skipped == 0
    for name, tensor in captured.model.state_dict().items():
        assert tensor.equal(eager.model.state_dict()[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's own: float32 norms of bfloat16 rows
def test_captured_updates_stay_right_between_gates_of_many_shapes(
    world: World, optimizer: str
) -> None:
    captured, pieces = learner_on(world, True, optimizer)
    eager, same = learner_on(world, False, optimizer)
    before = {name: tensor.clone() for name, tensor in captured.model.state_dict().items()}
    captured.capture_all()
    for name, tensor in captured.model.state_dict().items():
        assert tensor.equal(before[name]), f"{name} changed while updates were captured"
    assert float(captured.weights.num_averaged) == 0

    for number in range(12):
        part = slice(number % 5, number % 5 + 4)
        captured.update(pieces[part])
        eager.update(same[part])
        # A gate has batches of any shape: what they allocate and cache must not move a graph's own.
        for count in range(1, 9):
            packed = pack(pieces[number : number + count], None)
            batch = captured.store.batch(packed, torch.bfloat16)
            captured.trainable.acceptance(captured.average, captured.head, batch, 4)
        torch.cuda.empty_cache()

    captured.settle(), eager.settle()
    assert captured.num_skipped == eager.num_skipped == 0
    for name, tensor in captured.model.state_dict().items():
        assert tensor.equal(eager.model.state_dict()[name]), name
