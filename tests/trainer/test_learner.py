"""Updates that are not finite change nothing; a restored learner continues bit by bit."""

from __future__ import annotations

import torch

from drafters.eagle3.batch import TTTBatch, collate
from drafters.trainable import trainable
from targets.head import load_target_head
from tests.trainer.conftest import World
from tests.trainer.test_replay import samples_of
from tests.trainer.traffic import settings_for
from trainer.learner import Learner

CPU = torch.device("cpu")


def new_learner(world: World, **trainer: object) -> Learner:
    head = load_target_head(world.target, CPU, torch.float32)
    learns = trainable("eagle3")
    model = learns.new_model(head.config, head.lm_head.weight_VH, None, seed=0)
    settings = settings_for(world.target, world.target, **trainer)
    return Learner(learns, model, head, settings.trainer, CPU)


def some_batch(world: World, first: int = 0) -> TTTBatch:
    samples = samples_of(world)[first : first + 6]
    return collate([(x, piece) for x in samples for piece in x.pieces])


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}


def test_updates_lower_the_loss_and_raise_the_overlap(world: World) -> None:
    learner, batch = new_learner(world), some_batch(world)

    reports = [learner.update(batch) for _ in range(30)]

    assert reports[-1].loss < 0.7 * reports[0].loss
    assert reports[-1].alpha[0] > reports[0].alpha[0]
    assert not any(report.skipped for report in reports)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(world: World) -> None:
    learner, batch = new_learner(world), some_batch(world)
    learner.update(batch)
    before = weights_of(learner)
    hook = learner.model.fc.weight.register_hook(lambda slope: slope * float("nan"))

    report = learner.update(batch)

    assert report.skipped
    assert (learner.num_skipped, learner.skips_in_row, learner.step) == (1, 1, 2)
    for name, tensor in learner.model.state_dict().items():
        assert tensor.equal(before[name]), name
    hook.remove()
    assert not learner.update(batch).skipped
    assert learner.skips_in_row == 0


def test_a_loss_that_is_not_finite_is_skipped(world: World) -> None:
    learner, batch = new_learner(world), some_batch(world)
    with torch.no_grad():
        learner.model.norm.weight.fill_(float("inf"))

    assert learner.update(batch).skipped


def test_gradients_are_clipped(world: World) -> None:
    learner = new_learner(world, grad_clip=1e-3)

    report = learner.update(some_batch(world))

    slopes = [p.grad for p in learner.model.parameters() if p.grad is not None]
    norm = torch.stack([slope.norm() for slope in slopes]).norm()
    assert report.grad_norm > 1e-3
    assert float(norm) <= 1.001e-3


def test_learning_rate_warms_up(world: World) -> None:
    learner = new_learner(world, lr=1e-3, warmup_steps=4)

    rates = [learner.update(some_batch(world)).lr for _ in range(6)]

    assert rates == [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3]


def test_a_restored_learner_goes_on_as_if_it_had_not_stopped(world: World) -> None:
    one, other = new_learner(world), new_learner(world)
    for _ in range(3):
        one.update(some_batch(world))
    other.load_state_tensors(one.state_tensors())
    other.step = one.step

    reports = [x.update(some_batch(world, 6)) for x in (one, other)]

    assert reports[0] == reports[1]
    for name, tensor in one.model.state_dict().items():
        assert tensor.equal(other.model.state_dict()[name]), name
    assert one.average.fc.weight.equal(other.average.fc.weight)


def test_candidates_are_the_running_average_of_the_weights(world: World) -> None:
    learner = new_learner(world)
    expected = learner.model.fc.weight.detach().clone()

    for _ in range(5):
        learner.update(some_batch(world))
        expected = 0.96 * expected + 0.04 * learner.model.fc.weight.detach()

    torch.testing.assert_close(learner.average.fc.weight, expected)
    assert not learner.average.fc.weight.requires_grad
