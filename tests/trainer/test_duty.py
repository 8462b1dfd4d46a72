"""A trainer's rests beside a server that it slows down, on a clock of their own."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from buffer.load import Load
from configs.load import SettingsError, load_settings
from policies.sharing import Sharing
from trainer.duty import Duty, duty_of
from trainer.process import notice_suspension


@dataclass
class World(threading.Event):
    """A server whose passes take ``pass_s``, longer while the trainer works, and whose clock moves
    when either of them does something. It is what ends the trainer's rests, too."""

    pass_s: float = 0.002
    slowdown: float = 0.4
    running: int = 32
    now_s: float = 100.0
    done: float = 0.0
    """Passes, with the part of the one under way."""
    busy_s: float = 0.0
    worked_s: float = 0.0
    at_s: float = 100.0
    device: str = "GPU-1"

    def __post_init__(self) -> None:
        super().__init__()

    def clock(self) -> float:
        return self.now_s

    def read(self) -> Load:
        passes = int(self.done)
        return Load(passes, 32 * passes, self.busy_s, self.running, self.at_s, self.device)

    def run(self, seconds: float, speed: float) -> None:
        """The server runs on; what it shows is that of its last whole pass."""
        self.now_s += seconds
        if self.running:
            whole = int(self.done)
            self.done += seconds * speed / self.pass_s
            if int(self.done) > whole:
                late_s = (self.done - int(self.done)) * self.pass_s / speed
                self.busy_s += self.now_s - late_s - self.at_s
                self.at_s = self.now_s - late_s
        else:
            self.at_s = self.now_s

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None and timeout < 60
        self.run(timeout, 1.0)
        return False

    def work(self, seconds: float) -> None:
        self.worked_s += seconds
        self.run(seconds, 1 - self.slowdown)


def train(world: World, duty: Duty, seconds: float, update_s: float = 0.008) -> float:
    """Updates for so many seconds; returns the share of time that they took."""
    began_s, worked_s = world.now_s, world.worked_s
    while world.now_s < began_s + seconds:
        duty.begin()
        world.work(update_s)
        duty.rest(update_s, lambda: None)
    return (world.worked_s - worked_s) / (world.now_s - began_s)


def duty_beside(world: World, most: float = 0.05) -> Duty:
    return Duty(sharing=Sharing(most), server=world, device="GPU-1", stop=world, clock=world.clock)


@pytest.mark.parametrize("slowdown", [0.2, 0.4, 0.7])
@pytest.mark.parametrize("most", [0.05, 0.2])
def test_a_server_keeps_its_speed_but_for_what_it_may_lose(slowdown: float, most: float) -> None:
    world = World(slowdown=slowdown)
    duty = duty_beside(world, most)
    train(world, duty, 30.0)
    done, began_s = world.done, world.now_s

    train(world, duty, 60.0)

    kept = (world.done - done) * world.pass_s / (world.now_s - began_s)
    assert 1 - 1.1 * most < kept < 1 - 0.7 * most


def test_beside_an_idle_server_and_without_one_a_trainer_does_not_rest() -> None:
    world = World(running=0)
    duty = duty_beside(world)
    assert train(world, duty, 10.0) == pytest.approx(1.0)

    alone = Duty(sharing=Sharing(0.05), server=None, stop=world, clock=world.clock)
    assert not alone.waits
    assert train(world, alone, 10.0) == pytest.approx(1.0)


def test_a_server_on_another_device_is_left_alone() -> None:
    world = World(device="GPU-2")
    duty = duty_beside(world)

    assert not duty.waits, "updates may be in the queue"
    assert train(world, duty, 10.0) == pytest.approx(1.0)


def test_a_trainer_that_waits_for_traces_after_each_update_is_held_as_well() -> None:
    world = World(slowdown=0.6)
    duty = duty_beside(world)
    for part in range(2):
        done, began_s = world.done, world.now_s
        for _ in range(2000 if part else 500):
            duty.begin()
            world.work(0.03)
            duty.rest(0.03, lambda: None)
            duty.begin()
            world.work(0.03)
            duty.is_idle(lambda: None)
            for _ in range(3):
                world.run(0.01, 1.0)  # waits, and looks for traces
                duty.is_idle(lambda: None)

    kept = (world.done - done) * world.pass_s / (world.now_s - began_s)
    assert 0.94 < kept < 0.97
    assert duty.sharing is not None
    assert duty.sharing.slowdown == pytest.approx(0.45, abs=0.03), "with the passes that spill"


def test_it_gives_way_after_one_update_when_load_rises() -> None:
    world = World(running=0)
    duty = duty_beside(world)
    train(world, duty, 5.0)
    assert duty.waits, "or several updates would be in the queue"

    world.running = 32
    began_s = world.now_s
    for _ in range(10):
        world.work(0.008)
        duty.rest(0.008, lambda: None)

    assert world.now_s - began_s > 5 * 10 * 0.008


def test_a_rest_ends_when_the_server_has_nothing_to_do_any_more() -> None:
    world = World()
    duty = duty_beside(world)
    train(world, duty, 20.0)
    wait: Callable[[float | None], bool] = world.wait

    def leaves(timeout: float | None = None) -> bool:
        world.running = 0
        return wait(timeout)

    world.wait = leaves  # type: ignore[method-assign]
    world.work(1.5)  # so long that the rest would be a quarter of a minute
    began_s = world.now_s
    duty.rest(1.5, lambda: None)

    assert world.now_s - began_s < 0.2


def test_a_trainer_that_costs_nothing_rests_only_to_measure_that() -> None:
    world = World(slowdown=0.0)
    duty = duty_beside(world)
    train(world, duty, 20.0)

    assert not duty.waits
    assert train(world, duty, 20.0) > 0.97


def test_a_suspended_trainer_learns_nothing_from_the_time_that_it_slept() -> None:
    """The server is faster while the trainer is stopped by a signal in the midst of its work."""
    world = World(slowdown=0.4)
    duty = duty_beside(world)
    train(world, duty, 30.0)
    before = duty.sharing and duty.sharing.slowdown
    assert before is not None

    for _ in range(20):
        world.work(0.004)
        world.run(2.5, 1.0)  # suspended
        duty.was_suspended()
        world.work(0.004)
        duty.rest(0.008, lambda: None)
        train(world, duty, 2.5)

    assert duty.sharing is not None
    assert duty.sharing.slowdown == pytest.approx(before, abs=0.02)


def test_a_process_that_goes_on_after_a_signal_notices_that() -> None:
    duty = Duty()
    former = signal.getsignal(signal.SIGCONT)
    notice_suspension(duty)
    try:
        signal.raise_signal(signal.SIGCONT)  # what ends a stop, in the process that had stopped
    finally:
        signal.signal(signal.SIGCONT, former)

    assert duty.num_suspended == 1


@pytest.mark.parametrize("update_s", [0.5, 2.0, 6.0])
def test_updates_of_seconds_are_held_as_well(update_s: float) -> None:
    world = World(slowdown=0.4, pass_s=0.02)
    duty = duty_beside(world)
    train(world, duty, 600.0, update_s)
    done, began_s = world.done, world.now_s

    train(world, duty, 1200.0, update_s)

    kept = (world.done - done) * world.pass_s / (world.now_s - began_s)
    assert 0.94 < kept < 0.97


def test_another_server_in_its_place_does_not_confuse_it() -> None:
    world = World()
    duty = duty_beside(world)
    train(world, duty, 20.0)
    world.done, world.busy_s = 0.0, 0.0

    train(world, duty, 20.0)

    assert duty.figures()["loss"] == pytest.approx(0.05, abs=0.01)


def test_between_the_pieces_of_a_judgement_it_rests_as_between_updates() -> None:
    world = World()
    duty = duty_beside(world)
    train(world, duty, 20.0)
    began_s = world.now_s
    for _ in range(5):
        world.work(0.03)
        duty.breathe(lambda: None)

    assert world.now_s - began_s > 5 * 5 * 0.03

    fixed = Duty(share=0.5, stop=world, clock=world.clock)
    fixed.breathe(lambda: None)
    assert not fixed.rested_s, "the rest follows the whole judgement"


def test_settings_say_which_duty() -> None:
    stop = threading.Event()

    def of(*chosen: str) -> Duty:
        settings = load_settings([], list(chosen), {})
        return duty_of(settings.trainer, settings.run_dir, stop, torch.device("cpu"))

    assert of().sharing == Sharing(0.05)
    assert of("trainer.max_serving_loss=0.2").sharing == Sharing(0.2)
    assert of("trainer.duty=0.25").sharing is None
    assert of("trainer.duty=0.25").share == 0.25
    assert of("trainer.duty=0.25").waits and not of("trainer.duty=1").waits
    for wrong in ("0", "1.5", "nan", "always"):
        with pytest.raises(SettingsError, match=r"trainer\.duty"):
            of(f"trainer.duty={wrong}")
