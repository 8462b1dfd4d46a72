"""What learning costs a server over a window, and when it takes more of it at once. On a clock of
its own."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import pytest
import torch

from configs.choices import SettingsError
from configs.load import load_settings
from policies.sharing import Sharing
from tests.trainer.test_duty import World, train
from trainer.allowance import Allowance
from trainer.duty import Duty, duty_of

MOST, BURST, WINDOW_S = 0.05, 0.2, 200.0


def beside(world: World, window_s: float = WINDOW_S) -> tuple[Duty, Allowance]:
    allowance = Allowance(MOST, BURST, window_s)
    duty = Duty(
        sharing=Sharing(MOST),
        allowance=allowance,
        server=world,
        device="GPU-1",
        stop=world,
        clock=world.clock,
    )
    return duty, allowance


def lost(world: World, do: Callable[[], object]) -> tuple[float, float]:
    """Seconds of serving that something cost, and how long it took."""
    done, began_s = world.done, world.now_s
    do()
    took_s = world.now_s - began_s
    return took_s - (world.done - done) * world.pass_s, took_s


@pytest.mark.parametrize("slowdown", [0.2, 0.4, 0.7])
@pytest.mark.parametrize("shifts_every_s", [None, 130.0], ids=["always urgent", "with shifts"])
def test_no_window_loses_more_than_what_is_allowed(
    slowdown: float, shifts_every_s: float | None
) -> None:
    """Urgent all the time is the worst that there can be."""
    world = World(slowdown=slowdown)
    duty, allowance = beside(world)
    slices: list[float] = []
    for number in range(120):
        if shifts_every_s is None or number * 5 % shifts_every_s == 0:
            allowance.hurry("d", "acceptance has fallen")
        elif number * 5 % shifts_every_s == 40:
            allowance.calm("d")
        slices.append(lost(world, lambda: train(world, duty, 5.0))[0])

    length = int(WINDOW_S / 5)
    windows = [sum(slices[at : at + length]) for at in range(len(slices) - length)]
    assert max(windows) < 1.05 * MOST * WINDOW_S
    assert max(slices) < 1.15 * BURST * 5.1, "nor at any moment more than a burst may"
    if shifts_every_s is None:
        assert sum(slices) > 0.55 * MOST * 600.0, "and what is allowed is used"


def test_what_is_urgent_is_learnt_several_times_as_fast() -> None:
    world = World(slowdown=0.4)
    duty, allowance = beside(world)
    calm = train(world, duty, 60.0)
    allowance.hurry("d", "nothing has been learnt yet")
    train(world, duty, 4.0)  # a duty rises by a tenth at a time

    urgent = train(world, duty, 15.0)

    assert 0.04 < calm < 0.075
    assert urgent == pytest.approx(BURST / 0.4, rel=0.15)


def test_a_burst_is_repaid_by_rests_and_can_come_again() -> None:
    world = World(slowdown=0.4)
    duty, allowance = beside(world)
    allowance.hurry("d", "acceptance has fallen")
    train(world, duty, 60.0)
    assert allowance.balance_s < 0.3 * allowance.largest_s
    allowance.calm("d")

    repaying = train(world, duty, 30.0)
    train(world, duty, 600.0)

    assert repaying < 0.04
    assert allowance.balance_s > 0.6 * allowance.largest_s
    allowance.hurry("d", "acceptance has fallen")
    train(world, duty, 4.0)
    assert train(world, duty, 10.0) > 0.4


def test_time_without_requests_costs_nothing_and_earns_nothing() -> None:
    world = World(running=0)
    duty, allowance = beside(world)
    allowance.empty()

    assert train(world, duty, 100.0) == pytest.approx(1.0)

    assert allowance.balance_s == 0.0


def test_a_burst_gives_way_within_one_update_when_load_rises() -> None:
    world = World(slowdown=0.4, running=8)
    duty, allowance = beside(world)
    train(world, duty, 120.0)
    allowance.hurry("d", "acceptance has fallen")
    train(world, duty, 6.0)
    assert train(world, duty, 2.0) > 0.3

    world.running = 32
    duty.begin()
    world.work(0.008)
    began_s = world.now_s
    duty.rest(0.008, lambda: None)

    assert world.now_s - began_s > 5 * 0.008, "the first update that sees it is followed by a rest"
    assert train(world, duty, 2.0) < 0.15
    # What stays is usual after a while.
    train(world, duty, 120.0)
    assert allowance.share(32) > allowance.steady


def test_a_burst_ends_smoothly() -> None:
    allowance = Allowance(MOST, BURST, WINDOW_S)
    allowance.hurry("d", "acceptance has fallen")
    shares = []
    for _ in range(400):
        share = allowance.share(8)
        shares.append(share)
        allowance.served(0.5, 8, 0.5 * share)

    falls = [one - other for one, other in itertools.pairwise(shares)]
    assert shares[0] == BURST and shares[-1] == pytest.approx(allowance.steady, rel=0.02)
    assert min(falls) >= 0 and max(falls) < 0.02
    assert allowance.balance_s >= 0


def test_a_cost_that_was_underrated_is_repaid() -> None:
    allowance = Allowance(MOST, BURST, WINDOW_S)
    allowance.served(10.0, 8, 9.0)
    assert allowance.balance_s < 0

    assert allowance.share(8) == allowance.least
    allowance.hurry("d", "acceptance has fallen")
    assert allowance.share(8) == allowance.least


def test_drafters_that_share_a_device_are_urgent_each_for_itself() -> None:
    allowance = Allowance(MOST, BURST, WINDOW_S)
    allowance.hurry("a", "one")
    allowance.hurry("b", "two")
    assert allowance.figures()["urgent"] == "one; two"
    allowance.calm("a")
    assert allowance.share(8) == BURST

    allowance.calm("b")
    assert allowance.share(8) == allowance.steady
    assert allowance.figures()["urgent"] is None


def test_settings_say_whether_there_are_bursts() -> None:
    stop = threading.Event()

    def of(*chosen: str) -> Duty:
        settings = load_settings([], list(chosen), {})
        return duty_of(settings.trainer, settings.run_dir, stop, torch.device("cpu"))

    assert of().allowance is None
    found = of("trainer.burst.serving_loss=0.2", "trainer.burst.window_s=100").allowance
    assert found == Allowance(0.05, 0.2, 100.0)
    with pytest.raises(SettingsError, match=r"below trainer\.max_serving_loss 0\.05"):
        of("trainer.burst.serving_loss=0.02")
    with pytest.raises(SettingsError, match=r"needs trainer\.duty auto"):
        of("trainer.burst.serving_loss=0.2", "trainer.duty=0.5")
    for wrong in ("serving_loss=0", "serving_loss=1", "window_s=0", "most=0.2"):
        with pytest.raises(SettingsError, match=r"trainer\.burst"):
            of(f"trainer.burst.{wrong}")
