"""Updates that are not finite change nothing; a restored learner continues bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from drafters.eagle3.trainable import Eagle3Trainable
from drafters.eagle3.training import ChainPlan, ttt_loss
from drafters.trainable import trainable
from targets.head import load_target_head
from tests.trainer.conftest import World
from tests.trainer.test_replay import samples_of
from tests.trainer.traffic import settings_for
from trainer.figures import UpdateReport
from trainer.learner import Learner
from trainer.packing import HeldPiece, pack
from trainer.rows import RowStore

CPU = torch.device("cpu")


def new_learner(world: World, **trainer: object) -> Learner:
    head = load_target_head(world.target, CPU, torch.float32)
    learns = trainable("eagle3")
    model = learns.new_model(head.config, head.lm_head.weight_VH, None, seed=0)
    settings = settings_for(world.target, world.target, **trainer)
    return Learner(learns, model, head, settings.trainer, RowStore(CPU, 1 << 22))


def some_batch(world: World, learner: Learner, first: int = 0) -> list[HeldPiece]:
    """Pieces of six samples."""
    held = learner.store.put(samples_of(world)[first : first + 6])
    return [piece for sample in held for piece in sample.pieces]


def updated(learner: Learner, batch: list[HeldPiece]) -> UpdateReport:
    """The report of one more update."""
    (report,) = learner.update(batch)
    return report


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_updates_lower_the_loss_and_raise_the_overlap(world: World, optimizer: str) -> None:
    learner = new_learner(world, optimizer=optimizer)
    batch = some_batch(world, learner)

    reports = [updated(learner, batch) for _ in range(30)]

    assert reports[-1].loss < 0.7 * reports[0].loss
    assert reports[-1].alpha[0] > reports[0].alpha[0]
    assert not any(report.skipped for report in reports)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(world: World) -> None:
    learner = new_learner(world)
    batch = some_batch(world, learner)
    updated(learner, batch)
    before = weights_of(learner)
    hook = learner.model.fc.weight.register_hook(lambda slope: slope * float("nan"))

    report = updated(learner, batch)

    assert report.skipped
    assert (learner.num_skipped, learner.skips_in_row, learner.step) == (1, 1, 2)
    for name, tensor in learner.model.state_dict().items():
        assert tensor.equal(before[name]), name
    hook.remove()
    assert not updated(learner, batch).skipped
    assert learner.skips_in_row == 0


def test_a_loss_that_is_not_finite_is_skipped(world: World) -> None:
    learner = new_learner(world)
    batch = some_batch(world, learner)
    with torch.no_grad():
        learner.model.norm.weight.fill_(float("inf"))

    assert updated(learner, batch).skipped


def test_tensors_that_are_not_finite_are_named(world: World) -> None:
    learner = new_learner(world)
    assert learner.not_finite() == []

    name, weight = next(iter(learner.model.named_parameters()))
    moments = learner.weights.optimizer.state[weight]
    with torch.no_grad():
        weight.view(-1)[-1] = torch.inf
        moments["exp_avg"].view(-1)[0] = torch.nan

    assert learner.not_finite() == [f"model.{name}", f"adam.exp_avg.{name}"]


def test_on_a_cpu_there_are_no_graphs_to_give_up(world: World) -> None:
    learner = new_learner(world)

    assert not learner.give_up_graphs()
    assert not updated(learner, some_batch(world, learner)).skipped


def test_gradients_are_clipped(world: World) -> None:
    learner = new_learner(world, grad_clip=1e-3)

    report = updated(learner, some_batch(world, learner))

    slopes = [p.grad for p in learner.model.parameters() if p.grad is not None]
    norm = torch.stack([slope.norm() for slope in slopes]).norm()
    assert report.grad_norm > 1e-3
    assert float(norm) <= 1.001e-3


def test_learning_rate_warms_up(world: World) -> None:
    learner = new_learner(world, lr=1e-3, warmup_steps=4)

    batch = some_batch(world, learner)

    rates = [updated(learner, batch).lr for _ in range(6)]

    assert rates == [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_restored_learner_goes_on_as_if_it_had_not_stopped(world: World, optimizer: str) -> None:
    one, other = (new_learner(world, optimizer=optimizer) for _ in range(2))
    batch = some_batch(world, one)
    for _ in range(3):
        one.update(batch)
    other.load_state_tensors(one.state_tensors())
    other.step = one.step

    reports = [x.update(some_batch(world, x, 6)) for x in (one, other)]

    assert reports[0] == reports[1]
    for name, tensor in one.model.state_dict().items():
        assert tensor.equal(other.model.state_dict()[name]), name
    assert one.average.fc.weight.equal(other.average.fc.weight)


def test_candidates_are_the_running_average_of_the_weights(world: World) -> None:
    learner = new_learner(world, average_decay=0.5)
    batch = some_batch(world, learner)
    expected = learner.model.fc.weight.detach().clone()

    for n in range(20):
        learner.update(batch)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * learner.model.fc.weight.detach()

    torch.testing.assert_close(learner.average.fc.weight, expected)
    assert not learner.average.fc.weight.requires_grad


def test_the_first_candidates_are_not_the_initial_weights(world: World) -> None:
    """After ten updates less than a ten thousandth of the initial weights is left."""
    learner = new_learner(world)
    batch = some_batch(world, learner)
    with torch.no_grad():
        learner.average.fc.weight.fill_(1e3)

    for _ in range(10):
        learner.update(batch)

    assert float(learner.average.fc.weight.abs().max()) < 1.0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_update_leaves_the_average_and_the_moments(world: World, optimizer: str) -> None:
    learner = new_learner(world, optimizer=optimizer)
    batch = some_batch(world, learner)
    learner.update(batch)
    before = learner.state_tensors()
    learner.model.fc.weight.register_hook(lambda slope: slope * float("nan"))

    learner.update(batch)

    for name, tensor in learner.state_tensors().items():
        if name != "generator":
            assert tensor.equal(before[name]), name


def test_a_batch_of_fixed_shape_is_the_same_update(world: World) -> None:
    """What a GPU runs: padding behind the positions and behind the rows with a loss."""
    one, other = new_learner(world), new_learner(world)
    for learner, fixed in ((one, None), (other, (512, 64))):
        learner.program.trainable = Whole()
        packed = pack(some_batch(world, learner), fixed)
        for _ in range(5):
            learner.program.launch(packed, 1e-3)

    assert len(packed.row_R) > packed.num_rows
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(tensor, other.model.state_dict()[name])


class Whole(Eagle3Trainable):
    """Carries all chains, as on a GPU, so that no draw depends on the padding."""

    def loss(self, model, head, batch, settings, generator):  # type: ignore[no-untyped-def]
        plan = ChainPlan(settings.ttt_steps, keep_logits=False)
        return ttt_loss(model, head.embed_VH, head.lm_head, batch, plan, generator)


class HostReads(TorchDispatchMode):
    """Collects operations that read a value of a tensor on the host, or whose shape depends on it:
    on a GPU each of them waits, and none can be captured in a graph."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        self.count += 1
        if name in self.WAITS:
            self.found.append(name)
        if name in ("index", "index_put", "index_put_"):
            indices = [x for x in args[1] if x is not None]
            self.found += [f"{name} by mask" for x in indices if x.dtype == torch.bool]
        return func(*args, **(kwargs or {}))


def test_an_update_reads_nothing_on_the_host(world: World) -> None:
    learner = new_learner(world)
    learner.program.trainable = Whole()
    packed = pack(some_batch(world, learner), (512, 64))
    learner.program.launch(packed, 1e-3)  # what depends on shapes alone is computed once

    with HostReads() as seen:
        learner.program.launch(packed, 1e-3)

    assert seen.count > 500
    assert seen.found == []
